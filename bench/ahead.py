"""Compile what a session on a GPU launches, all at once, before it launches anything.

    python -m bench.ahead --target sm_90 --pack build/kernels-sm_90.zip     # at home, with no GPU
    python -m bench.ahead --unpack build/kernels-sm_90.zip [--jobs 14]      # on the machine with one

Triton compiles a kernel when it is first launched, one after the other, half a second each. Here the launches
of the layer are recorded and compiled by a pool of processes into Triton's cache, where the
launches on the device find them: a test compares the two. At home the GPU tests' are compiled besides, and
all are packed into a file; it is made by the Python version of the machine with the GPU, since Triton is
built for each anew, and the cache's keys tell its builds apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from moebert_kernels.environment import describe_environment
from moebert_kernels.kernels.call import Call as OperatorCall

from . import archive, standin
from .cases import num_shared
from .gpu import DESELECTED

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Call:
    """One call of the layer, in bfloat16 and with one expert per token."""

    tokens: int
    gate: bool = False
    training: bool = True
    D: int = 768
    F: int = 768
    E: int = 4
    C: int = 0  # of F, neurons that experts share


# What `smoke`, `ffn` and `kernel_times` launch: one T for each size class of the table.
CALLS = tuple(
    Call(tokens, gate, training, C=shared)
    for training in (True, False)
    for tokens in (16384, 4096, 512, 64)
    for gate, shared in ((False, 0), (True, 0), (False, num_shared(Call.F)))
)


@contextmanager
def as_on(family: str, multiprocessors: int) -> Iterator[None]:
    """Let tensors that are on no GPU get the config of such a device."""
    from moebert_kernels.kernels.triton import configs

    with (
        mock.patch.object(configs, "family", return_value=family),
        mock.patch.object(configs, "multiprocessors", return_value=multiprocessors),
    ):
        yield


def launches(call: Call) -> list[Any]:
    """What a call launches, forward and, in training, backward, recorded and not run.

    Its tensors are never read or written, and so take no memory.
    """
    from moebert_kernels.kernels import triton as kernels
    from moebert_kernels.kernels.triton.launch import recorded

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    T, D, E, C = call.tokens, call.D, call.E, call.C
    F = call.F - C
    gate_TK = empty(T, 1, dtype=torch.float32) if call.gate else None
    plan = (empty(*shape, dtype=torch.int32) for shape in ((T, 1), (T,), (T,), (E + 1,)))
    ids, order, inverse, offsets = plan
    experts = empty(E, F, D), empty(E, F), empty(E, D, F), empty(E, D)
    of_all = (empty(C, D), empty(C), empty(D, C)) if C else (None,) * 3
    arguments = OperatorCall(
        empty(T, D), ids, order, inverse, offsets, *experts, gate_TK, *(None,) * 4, *of_all
    )
    with recorded() as record:
        _, saved = kernels.expert_ffn_forward(arguments, call.training)
        if call.training:
            kernels.expert_ffn_backward(arguments, saved, empty(T, D), [True] * 5 + [call.gate])
    return record


def distinct(calls: tuple[Call, ...]) -> list[tuple[Call, int]]:
    """The launches of calls that are compiled apart, each as its call and its place there."""
    found: dict[str, tuple[Call, int]] = {}
    for call in calls:
        for index, launch in enumerate(launches(call)):
            runtime = {p.name: p for p in launch.kernel.params if not p.is_constexpr}
            arguments = {
                name: _decisive(value, runtime.get(name)) for name, value in launch.arguments.items()
            }
            found.setdefault(f"{launch.kernel.__name__} {arguments}", (call, index))
    return list(found.values())


def _decisive(value: Any, parameter: Any) -> Any:
    """What of an argument decides on the binary: of a constant all, and so `parameter` is None."""
    if isinstance(value, torch.Tensor):
        return value.dtype, parameter.do_not_specialize_on_alignment or value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):
        return value.base.dtype, value.block_shape
    if parameter is None or not isinstance(value, int):
        return value
    return "number" if parameter.do_not_specialize else (value == 1, value % 16 == 0)


class Compiled(NamedTuple):
    """A kernel's folder in Triton's cache, and whether it was there before."""

    folder: Path
    hit: bool


def compile_launch(launch: Any) -> Compiled:
    """Compile for the current device what a launch would."""
    from triton import knobs

    found = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **event: found.append(
            Compiled(standin.folder_of(event), event["cache_hit"])
        )
        launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    return found[0]


@dataclass(frozen=True)
class Target:
    """A device, by what the table of tiles asks of it; not `present`, one that is only compiled for."""

    family: str
    multiprocessors: int
    present: bool = True

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """Let tensors that are on no GPU get its config, and Triton compile for it."""
        if not self.present:
            from triton.runtime.driver import driver

            driver.set_active(standin.Driver())
        with as_on(self.family, self.multiprocessors):
            yield


# What can be compiled for with no GPU: those of the machines that are lent.
TARGETS = {"sm_90": Target("sm_90", standin.MULTIPROCESSORS, present=False)}


def _compile(target: Target, call: Call, index: int) -> Compiled:
    with target.chosen():
        return compile_launch(launches(call)[index])


def compile_all(calls: tuple[Call, ...], jobs: int, target: Target) -> list[Compiled]:
    """Compile every kernel of calls with so many processes."""
    with target.chosen():
        wanted = distinct(calls)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [task.result() for task in [pool.submit(_compile, target, *which) for which in wanted]]


def current_device() -> Target:
    """The GPU of this machine."""
    from moebert_kernels.kernels.triton import configs

    here = torch.device("cuda", torch.cuda.current_device())
    return Target(configs.family(here), configs.multiprocessors(here))


def keys_of_tests(jobs: int, *which: str) -> set[str]:
    """Run the GPU tests on a device that is not there; the keys of the kernels that they ask for.

    Raises:
        RuntimeError: pytest could not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-p",
            "bench.standin",
            "--kernels-to",
            str(keys),
        ]
        command += ["-q", "--tb=no", "-p", "no:cacheprovider", *DESELECTED, *which]
        if jobs > 1 and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(jobs)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or not keys.exists():  # 1: tests failed, as they must
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        return set(keys.read_text().split())


def pack(path: Path, jobs: int, target: Target) -> str:
    """Compile the layer's kernels and the tests', and pack them; what was done, in words."""
    begin = time.monotonic()
    of_layer = compile_all(CALLS, jobs, target)
    cache = of_layer[0].folder.parent
    of_tests = keys_of_tests(jobs)
    folders = {one.folder for one in of_layer} | {cache / key for key in of_tests}
    count = archive.pack(folders, path, archive.Maker.here(describe_environment().commit))
    return (
        f"{count} kernels, {len(of_layer)} of the layer and {len(of_tests)} of the tests, in {path}: "
        f"{path.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - begin:.0f} s"
    )


def prepare(path: Path | None, jobs: int) -> Iterator[str]:
    """On a machine with a GPU: unpack, compile what of the layer's kernels is missing, and tell of both."""
    if path is not None:
        try:
            yield archive.unpack(path)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            yield f"nothing unpacked: {error}"
    begin = time.monotonic()
    found = compile_all(CALLS, jobs, current_device())
    hits = sum(one.hit for one in found)
    yield (
        f"{len(found)} kernels of the layer: {hits} were in the cache, {len(found) - hits} compiled by "
        f"{jobs} processes, {time.monotonic() - begin:.1f} s"
    )


def rehearse() -> str:
    """Compile two small kernels with no GPU, carry them to another cache, and ask for them there.

    Raises:
        RuntimeError: they were not found.
    """
    from triton import knobs

    call = Call(16, training=False, D=64, F=64, E=2)
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), TARGETS["sm_90"].chosen():
        knobs.cache.dir = str(Path(folder) / "home")
        carried = Path(folder) / "kernels.zip"
        made = [compile_launch(launch).folder for launch in launches(call)]
        archive.pack(made, carried, archive.Maker.here())
        knobs.cache.dir = str(Path(folder) / "away")
        told = archive.unpack(carried)
        there = launches(call)
        for launch in there:
            launch.kernel.device_caches.clear()  # as in another process
        hits = sum(compile_launch(launch).hit for launch in there)
        if hits != len(there):
            raise RuntimeError(f"{hits} of {len(there)} kernels were found: {told}")
        return f"{told}; {hits} of {len(there)} found when asked for"


def main() -> None:
    """Compile, and say how many were compiled already."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ahead", description="Compile the layer's kernels before they are launched."
    )
    parser.add_argument("--pack", type=Path, help="compile with no GPU, the GPU tests' too, into this file")
    parser.add_argument("--target", choices=TARGETS, default="sm_90", help="what --pack compiles for")
    parser.add_argument("--unpack", type=Path, help="put such a file's kernels into Triton's cache first")
    parser.add_argument("--rehearse", action="store_true", help="does carrying kernels work? with no GPU")
    parser.add_argument("--jobs", type=int, default=14, help="processes (default 14)")
    options = parser.parse_args()
    if options.pack:
        print(pack(options.pack, options.jobs, TARGETS[options.target]))
    elif options.rehearse:
        print(rehearse())
    else:
        for line in prepare(options.unpack, options.jobs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
