"""Kernels compiled before they are launched, here and on another machine: that a launch finds them.

Triton compiles in processes of their own: this one may have told it to interpret.
"""

import dataclasses
import json
import textwrap
import zipfile

import pytest

from tests.forked import compiling, python

pytest.importorskip("triton", reason="the kernels are written in Triton")

from bench import archive
from bench.archive import Maker

KEY = "A" * 52


def run(script, cache, *arguments):
    """What a script prints as JSON, by a process whose Triton compiles into `cache`."""
    command = "-c", textwrap.dedent(script), *arguments
    of_its_own = {"TRITON_CACHE_DIR": str(cache)}
    done = python(*command, imported=("torch", "triton"), environment=compiling(), more=of_its_own)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


KEYS = """
    import functools, json
    from unittest import mock
    import torch
    from triton import knobs
    from bench import ahead, ffn, gpu_parts, kernel_times, smoke
    from bench.baselines.implementation import PASSES, bind
    from bench.cases import FFNCase, expert_ids
    from moebert_kernels import RoutingPlan
    from moebert_kernels.kernels import triton as kernels
    from moebert_kernels.kernels.triton.launch import recorded
    from moebert_kernels.ops import backends

    cpu = torch.device("cpu")

    def keys(launches):
        found = set()
        def hook(*, key, fn, **_):
            found.add(f"{fn.name} {key}")
            return True  # not to be compiled
        knobs.runtime.jit_cache_hook = hook
        for launch in launches:
            launch.kernel.warmup(grid=launch.grid, **launch.arguments)
        return found

    def of(call, *arguments):
        with recorded() as launches:
            call(*arguments)
        return keys(launches)

    with ahead.TARGETS["sm_90"].chosen(), mock.patch.object(backends, "choose", lambda _: kernels):
        compiled = set().union(*(keys(ahead.launches(call)) for call in ahead.CALLS))
        count = len(ahead.distinct(ahead.CALLS))
        launched = {"smoke": set(), "ffn": set(), "kernels": set()}
        for tokens in smoke.TOKENS:
            for case in smoke.cases(tokens, False)[: 4 if tokens < 1000 else 2]:
                plan = RoutingPlan.from_expert_ids(expert_ids(case), case.E)
                launched["smoke"] |= of(smoke.step, smoke.make_inputs(case, cpu), plan)
        for tokens in {*gpu_parts.TOKENS, *kernel_times.TOKENS} - {65536}:  # of the same size class as 16384
            inputs = ffn.make_inputs(FFNCase(tokens), cpu, 0)
            for pass_ in PASSES[:2]:
                launched["ffn"] |= of(bind(ffn.ours, inputs, pass_))
            with mock.patch.object(kernel_times.Step, "run"):
                launched["kernels"] |= keys(kernel_times.record(inputs).launches)
    missing = {name: sorted(found - compiled) for name, found in launched.items()}
    print(json.dumps([missing, {name: len(found) for name, found in launched.items()}, len(compiled), count]))
"""


def test_benchmarks_and_smoke_test_launch_nothing_that_is_not_compiled_ahead(tmp_path):
    """Of 512 tokens another tile is chosen, and what that launches once was not."""
    missing, counts, compiled, distinct = run(KEYS, tmp_path)
    assert missing == {"smoke": [], "ffn": [], "kernels": []}
    assert min(counts.values()) > 10
    assert compiled == distinct  # nothing is compiled twice, nor counted twice


LAUNCHED = """
    import json, sys
    from pathlib import Path
    from bench import archive, standin

    path, action, *activations = sys.argv[1:]
    if action == "unpack":
        archive.unpack(Path(path))
    found = {}  # Triton's cache has it, of each kernel's folder
    standin.install(lambda folder, hit: found.update({str(folder): hit}))
    import torch
    from moebert_kernels import RoutingPlan, moe_ffn

    def weight(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    w1, b1, w2, b2 = weight(2, 64, 64), weight(2, 64), weight(2, 64, 64), weight(2, 64)
    plan = RoutingPlan.from_expert_ids(torch.arange(40, device="cuda") % 2, 2)
    told = []
    for activation in activations:
        before = set(found)
        with torch.no_grad():
            moe_ffn(weight(40, 64), plan, w1, b1, w2, b2, activation=activation)
        told.append([found[folder] for folder in found if folder not in before])
    if action == "pack":
        archive.pack(map(Path, found), Path(path), archive.Maker.here("abc"))
    print(json.dumps(told))
"""


def test_a_launch_finds_what_was_carried_to_another_folder(tmp_path):
    """A cache names its files by absolute paths: copied as it is, it has none of them elsewhere."""
    path = tmp_path / "kernels.zip"
    assert run(LAUNCHED, tmp_path / "home", path, "pack", "gelu") == [[False, False]]
    # What was carried of another source is not asked for: the gather differs, the scatter is the one it was.
    assert run(LAUNCHED, tmp_path / "away", path, "unpack", "gelu", "relu") == [[True, True], [False]]


@pytest.mark.slow
def test_the_gpu_tests_kernels_are_known_without_a_gpu(tmp_path):
    """And pytest says how many were found: 12 workers would compile what an archive lacks."""
    script = """
        import json
        from bench.ahead import keys_of_tests

        print(json.dumps(sorted(keys_of_tests(1, "tests/kernels/test_gpu.py", "-k", "T21-D8 and bfloat16"))))
    """
    keys = run(script, tmp_path)
    assert set(keys) == {path.name for path in tmp_path.iterdir()}
    assert len(keys) == 6


HERE = Maker("3.6.0", "f00", "release 12.8")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (HERE, ""),
        (dataclasses.replace(HERE, commit="abc"), ""),
        (dataclasses.replace(HERE, triton="3.7.0"), "Triton 3.7.0, not 3.6.0"),
        (dataclasses.replace(HERE, build="ba7"), "another build of Triton 3.6.0, as another Python's is"),
        (dataclasses.replace(HERE, assembler="13.0"), "another ptxas, 13.0, not release 12.8"),
    ],
)
def test_it_is_told_why_none_will_be_found(other, reason):
    assert other.differs_from(HERE) == reason


def folder_of_kernel(cache):
    folder = cache / KEY
    folder.mkdir(parents=True)
    for name in ("k.json", "k.cubin", "k.ptx", "k.llir", "__grp__k.json", "launcher.so"):
        (folder / name).write_text("{}")
    return folder


def test_nothing_but_kernels_is_carried(tmp_path):
    """No library that would be loaded, no paths of this machine."""
    path = tmp_path / "deep" / "kernels.zip"
    assert archive.pack([folder_of_kernel(tmp_path)], path, HERE) == 1
    with zipfile.ZipFile(path) as packed:
        assert packed.namelist() == ["made_by.json", *(f"{KEY}/k.{end}" for end in ("cubin", "json", "ptx"))]


def test_more_than_can_be_carried_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="at most 0 can be carried"):
        archive.pack([folder_of_kernel(tmp_path)], tmp_path / "kernels.zip", HERE)


@pytest.mark.parametrize(
    "name", ["../../evil.json", f"{KEY}/../x.json", f"{KEY}/x.so", f"{KEY}/__grp__k.json"]
)
def test_an_archive_of_anything_else_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "kernels.zip", "w") as packed:
        packed.writestr("made_by.json", json.dumps(dataclasses.asdict(HERE)))
        packed.writestr(name, "{}")
    with pytest.raises(ValueError, match="is no archive of kernels"):
        archive.unpack(tmp_path / "kernels.zip")
    assert not (tmp_path / "cache").exists()
