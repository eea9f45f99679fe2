"""Measure candidate configs on the GPU at hand and print the winners as entries of the config table.

    python -m bench.tune [--arithmetic half tf32 ieee]

For each size class, each GEMM's tile is chosen while the others stay as they are, from a forward and a
backward pass at the BERT-base sizes, in a CUDA graph, with cold caches. Afterwards the number of tokens up to
which inference is faster with all experts masked. Paste what is printed into
`moebert_kernels/kernels/configs.py` and read it with `python -m moebert_kernels.kernels.inspect`: an entry
that spills is a bug, however fast.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from moebert_kernels import RoutingPlan
from moebert_kernels.kernels import configs, expert_ffn_backward, expert_ffn_forward
from moebert_kernels.kernels.configs import Config, Tile

D, F, E = 768, 768, 4
TOKENS = {"small": 256, "medium": 4096, "large": 32768}
GEMMS = ("up", "down", "down_backward", "up_backward", "weight_grad")


def candidates(gemm: str, arithmetic: str) -> Iterator[Tile]:
    """Tiles worth trying: more than some 250 accumulators per thread cannot help but spill."""
    depths = (32, 64, 128) if arithmetic == "half" else (16, 32)
    stages = (5, 7) if gemm == "weight_grad" else (3, 4, 5)
    for m, n, k, warps, stage in itertools.product((64, 128), (64, 128, 256), depths, (4, 8), stages):
        if m * n <= warps * 32 * 128:
            parts = (1,) if gemm == "weight_grad" else (2, 4)
            yield from (Tile(m, n, k, warps, stage, parts=p) for p in parts)


def step(T: int, dtype: torch.dtype, *, train: bool = True) -> Callable[[Config], None]:
    """A call of the operators on T tokens as a function of the config."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x_TD, dy_TD = randn(T, D), randn(T, D)
    w1, b1, w2, b2 = randn(E, F, D) * D**-0.5, randn(E, F), randn(E, D, F) * F**-0.5, randn(E, D)
    plan = RoutingPlan.from_expert_ids(torch.randint(0, E, (T,), device="cuda"), E)
    needs = [True] * 5 + [False]

    def run(config: Config) -> None:
        _, h = expert_ffn_forward(
            x_TD, plan.order_S, plan.offsets_E1, w1, b1, w2, b2, None, "gelu", 1, False, train, config
        )
        if train:
            expert_ffn_backward(
                dy_TD,
                x_TD,
                h,
                plan.order_S,
                plan.offsets_E1,
                w1,
                b1,
                w2,
                b2,
                None,
                "gelu",
                1,
                False,
                needs,
                config,
            )

    return run


def milliseconds(run: Callable[[Config], None], config: Config) -> float:
    """The median of graph replays that each find the caches cold; inf if the config does not fit."""
    try:
        run(config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(config)
    except (triton.runtime.errors.OutOfResources, triton.CompilationError):
        return float("inf")
    return triton.testing.do_bench(graph.replay, warmup=10, rep=50, return_mode="median")


def best(run: Callable[[Config], None], start: Config, arithmetic: str) -> Config:
    """One GEMM after the other, the best tile; then whether the weight gradients are better streamed."""
    chosen, time = start, milliseconds(run, start)
    for gemm in GEMMS:
        for tile in candidates(gemm, arithmetic):
            change: dict[str, Any] = {gemm: tile}
            trial = replace(chosen, **change)
            if (now := milliseconds(run, trial)) < time:
                chosen, time = trial, now
    other = replace(chosen, stream_k=not chosen.stream_k)
    return other if milliseconds(run, other) < time else chosen


def masked_up_to(config: Config, dtype: torch.dtype) -> int:
    """The most tokens, in powers of two, at which the masked path wins; 0 if it never does."""
    most = 0
    for T in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        run = step(T, dtype, train=False)
        with torch.no_grad():
            masked = milliseconds(run, replace(config, dense_slots=T))
            if masked >= milliseconds(run, replace(config, dense_slots=0)):
                break
        most = T
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arithmetic", nargs="+", choices=configs.ARITHMETICS, default=["half"])
    arguments = parser.parse_args()
    family = configs.family(torch.device("cuda", torch.cuda.current_device()))
    for arithmetic, size in itertools.product(arguments.arithmetic, TOKENS):
        torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
        dtype = torch.bfloat16 if arithmetic == "half" else torch.float32
        start = replace(configs.TABLE.get((family, arithmetic, size), configs.SAFE), dense_slots=0)
        chosen = best(step(TOKENS[size], dtype), start, arithmetic)
        if size == "small":
            chosen = replace(chosen, dense_slots=masked_up_to(chosen, dtype))
        print(f"    ({family!r}, {arithmetic!r}, {size!r}): {chosen!r},", flush=True)


if __name__ == "__main__":
    main()
