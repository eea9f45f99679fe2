"""A borrowed GPU machine has Python, PyTorch, Triton, NumPy and pytest: what is run there needs no more.

Every other package that is installed here is hidden from a process of its own, and so are pytest's plugins.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import FIRST
from bench.results import read
from tests import ROOT
from tests.forked import python

pytest.importorskip("triton", reason="the kernels are written in Triton")

TESTS = ROOT / "tests"
BARE = ("torch", "triton", "numpy", "pytest")
# What the whole package needs; it would be noticed if an installed package's modules could not be told.
NEVER_THERE = (
    "datasets",
    "dill",
    "multiprocess",
    "typer",
    "rich",
    "sklearn",
    "scipy",
    "matplotlib",
    "hypothesis",
)
# Modules with tests of a GPU that need more, and all that they need.
NEEDING_MORE = {"compress/experts/test_fitting.py", "models/test_packing_device.py"}
MORE = ("transformers", "accelerate", "datasets", "scikit-learn", "scipy", "hypothesis")


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(names):
    """The distributions of that name, what they require, what that requires in turn..."""
    found, left = set(), set(map(normal, names))
    while left:
        name = left.pop()
        found.add(name)
        try:
            requirements = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
        plain = (r for r in requirements if "extra ==" not in r)
        left |= {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in plain} - found
    return found


def hidden_from(names):
    """Every module of the distributions that those do not need."""
    needed = needed_by(names) | {"moebert-kernels"}
    modules = importlib.metadata.packages_distributions()
    seen = {m for m, owners in modules.items() if not needed.isdisjoint(map(normal, owners))}
    others = {m for m in modules.keys() - seen if m.isidentifier()}
    return sorted(others | set(NEVER_THERE) - seen)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Start `python -m MODULE ...`, or a script: it and its own processes see those packages alone."""

    folders = {}  # one for each choice of packages, whose processes then share what they import

    def run(module, *arguments, packages=BARE, cwd=ROOT):
        if packages not in folders:
            folders[packages] = tmp_path_factory.mktemp("startup")
            hide = f"import sys\nsys.modules.update(dict.fromkeys({hidden_from(packages)!r}))\n"
            (folders[packages] / "sitecustomize.py").write_text(hide)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(folders[packages]),
            "TRITON_INTERPRET": "1",
            "PYTHON": sys.executable,
        }
        if module.endswith(".sh"):
            command = ["bash", str(ROOT / module), *arguments]
            done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        else:
            seen = {"imported": BARE, "environment": environment, "folder": cwd}
            done = python("-m", module, *arguments, **seen)
        return done.returncode, done.stdout, done.stderr

    return run


def test_nothing_but_the_bare_packages_is_seen(run):
    """Were nothing hidden, these tests could not fail."""
    assert not {"torch", "triton", "numpy", "pytest", "_pytest", "sympy"} & set(hidden_from(BARE))
    status, _, errors = run("transformers")
    assert status == 1
    assert "transformers" in errors


def collected(out):
    """Modules that pytest has found tests in."""
    return set(re.findall(r"^tests/([\w/]+\.py)(?:: [1-9]|::)", out, re.MULTILINE))


def test_what_tests_of_a_gpu_need_is_known(run):
    options = ["--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    modules = [f"tests/{name}" for name in NEEDING_MORE]
    status, out, errors = run("pytest", *options, *modules, packages=(*BARE, *MORE))
    assert status == 0, out + errors
    assert collected(out) == NEEDING_MORE


def test_a_gpu_test_that_needs_more_is_left_out_with_the_reason(run, tmp_path):
    """And only for want of an installed package: whatever else is wrong with a module is an error."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_more.py").write_text("import matplotlib.pyplot\n")
    (tmp_path / "test_gpu.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n")
    options = ["--rootdir", str(tmp_path), "-c", os.devnull, "-p", "no:cacheprovider", "-rs", str(tmp_path)]
    status, out, errors = run("pytest", "-m", "gpu", *options)
    assert status == 0, out + errors
    assert "matplotlib is not installed" in out
    assert "2 skipped" in out
    assert run("pytest", *options)[0] == 2
    (tmp_path / "test_more.py").write_text("import moebert_kernels.nothing_of_the_kind\n")
    assert run("pytest", "-m", "gpu", *options)[0] == 2


def test_the_ffn_is_timed_and_written_without_a_plot(run, tmp_path):
    options = ["--toy", "--device", "cpu", "--rounds", "1", "--passes", "forward,forward+backward"]
    status, out, errors = run("bench", "ffn", *options, "--out", str(tmp_path))
    assert status == 0, errors
    assert re.search(r"^moebert_kernels +[\d.]+ .?s", out, re.MULTILINE)
    assert re.search(r"^transformers eager did not run: needs transformers", out, re.MULTILINE)
    assert "ffn-cpu.jsonl, with all figures, written; no plot: matplotlib is not installed" in out
    assert [path.name for path in tmp_path.iterdir()] == ["ffn-cpu.jsonl"]


def test_dispatch_is_timed(run):
    status, out, errors = run("bench", "dispatch", "--toy", "--device", "cpu", "--rounds", "1")
    assert status == 0, errors
    assert re.search(r"^moebert_kernels +[\d.]+ .?s", out, re.MULTILINE)


def test_whole_models_need_transformers_and_no_more(run):
    options = ["bench", "model", "--toy", "--device", "cpu", "--rounds", "1", "--text", "README.md"]
    status, out, errors = run(*options)
    assert status == 2
    assert errors.endswith("the benchmark model needs packages not installed here: transformers\n")
    status, out, errors = run(*options, packages=(*BARE, "transformers"))
    assert status == 0, errors
    assert re.search(r"^moebert_kernels +[\d.]+ .?s", out, re.MULTILINE)


def test_the_sanitizers_cases_run(run):
    status, _, errors = run("tests.kernels.sanitize", "--cases", "--interpreted")
    assert status == 0, errors


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_a_session_on_a_gpu_goes_through_its_parts(run, tmp_path):
    """Its folder was looked for in the repository, wherever the script was called.

    And `pytest -m gpu` used to end at collection: most modules need a package that is not there.
    """
    status, out, errors = run("bench/gpu.sh", "first", "--dry-run", "--out", "out", cwd=tmp_path)
    assert status == 0, out + errors
    parts = [part.name for part in FIRST]
    assert re.findall(r"^(\w+): ok, \d+ s$", out, re.MULTILINE) == parts
    meant_for_one = re.compile(r"mark\.gpu|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
    files = [path for path in TESTS.rglob("test_*.py") if meant_for_one.search(path.read_text())]
    modules = {path.relative_to(TESTS).as_posix() for path in files}
    there = modules - {Path(__file__).name} - NEEDING_MORE
    assert collected(out) >= there >= {"kernels/test_gpu.py", "native/test_cuda.py"}
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left >= {"gpu.log", "session.jsonl", "smoke.jsonl", "kernels-cpu.jsonl", "tiles.jsonl"}
    rows = read(tmp_path / "out" / "kernels-cpu.jsonl").rows
    assert {"gather", "scatter"} <= {row.entry.split()[1] for row in rows}
    assert all(row.seconds for row in rows)
    session = [json.loads(line) for line in (tmp_path / "out" / "session.jsonl").read_text().splitlines()]
    assert [(line["part"], line["became"]) for line in session] == [(part, "ok") for part in parts]
    assert "cpu: T=24" in out
    assert "2 of 2 found when asked for" in out  # kernels that were carried
