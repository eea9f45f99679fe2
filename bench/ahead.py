"""Compile what a session on a GPU launches, all at once, before it launches anything.

    python -m bench.ahead [--jobs 14]

Triton compiles a kernel when it is first launched, one after the other, half a second each. Here the launches
of the layer are recorded on meta tensors and compiled by a pool of processes into Triton's cache, where the
launches on the device find them: a test compares the two.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Call:
    """One call of the layer, in bfloat16 and with one expert per token."""

    tokens: int
    gate: bool = False
    training: bool = True
    D: int = 768
    F: int = 768
    E: int = 4


# What `smoke`, `ffn` and `kernel_times` launch: one T for each size class of the table, and one below.
CALLS = tuple(
    Call(tokens, gate, training)
    for training in (True, False)
    for tokens in (16384, 4096, 64, 16)
    for gate in (False, True)
)


@contextmanager
def as_on(family: str, multiprocessors: int) -> Iterator[None]:
    """Let meta tensors get the config of such a device."""
    from moebert_kernels.kernels import configs

    with (
        mock.patch.object(configs, "family", return_value=family),
        mock.patch.object(configs, "multiprocessors", return_value=multiprocessors),
    ):
        yield


def launches(call: Call, device: str = "meta") -> list[Any]:
    """What a call launches, forward and, in training, backward, recorded and not run."""
    from moebert_kernels import kernels
    from moebert_kernels.kernels.launch import recorded

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    T, D, F, E = call.tokens, call.D, call.F, call.E
    x_TD = empty(T, D)
    gate_TK = empty(T, 1, dtype=torch.float32) if call.gate else None
    arguments: list[Any] = [empty(T, dtype=torch.int32), empty(E + 1, dtype=torch.int32)]
    arguments += [empty(E, F, D), empty(E, F), empty(E, D, F), empty(E, D), gate_TK, "gelu", 1, False]
    with recorded() as record:
        _, preact_SF = kernels.expert_ffn_forward(*[x_TD, *arguments, call.training])
        if call.training:
            needs = [True] * 5 + [call.gate]
            kernels.expert_ffn_backward(*[empty(T, D), x_TD, preact_SF, *arguments, needs])
    return record


def distinct(calls: tuple[Call, ...]) -> list[tuple[Call, int]]:
    """The launches of calls that differ, each as its call and its place there."""
    found: dict[str, tuple[Call, int]] = {}
    for call in calls:
        for index, launch in enumerate(launches(call)):
            arguments = {name: _compiled_in(value) for name, value in launch.arguments.items()}
            found.setdefault(f"{launch.kernel.__name__} {arguments}", (call, index))
    return list(found.values())


def _compiled_in(value: Any) -> Any:
    """What of an argument decides on the binary."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return (value.base.dtype, value.block_shape) if hasattr(value, "block_shape") else value


def compile_launch(launch: Any) -> bool:
    """Compile for the current device what a launch would; whether Triton's cache had it."""
    from triton import knobs

    hits = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
        launch.kernel.warmup(grid=launch.grid, **launch.arguments)
    return all(hits)


def _compile(family: str, multiprocessors: int, call: Call, index: int) -> bool:
    with as_on(family, multiprocessors):
        return compile_launch(launches(call)[index])


def compile_all(calls: tuple[Call, ...], jobs: int) -> tuple[int, int]:
    """Compile for the current device with so many processes.

    Returns:
        How many kernels there are, and how many of them the cache had.
    """
    from moebert_kernels.kernels import configs

    here = torch.device("cuda", torch.cuda.current_device())
    device = (configs.family(here), configs.multiprocessors(here))
    with as_on(*device):
        wanted = distinct(calls)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        hits = [task.result() for task in [pool.submit(_compile, *device, *which) for which in wanted]]
    return len(hits), sum(hits)


def main() -> None:
    """Compile, and say how many were compiled already."""
    parser = argparse.ArgumentParser(description="Compile the layer's kernels for this GPU.")
    parser.add_argument("--jobs", type=int, default=14, help="processes (default 14)")
    jobs = parser.parse_args().jobs
    begin = time.monotonic()
    count, hits = compile_all(CALLS, jobs)
    took = time.monotonic() - begin
    print(f"{count} kernels, {hits} of them in the cache; compiled by {jobs} processes in {took:.1f} s")


if __name__ == "__main__":
    main()
