"""Where the layer's time goes on the CPU, beside the bound: `python -m bench.profile_cpu [TOKENS...]`.

A table in Markdown, forward and training step of BERT-base's and MiniLM's layer with residual and LayerNorm,
balanced routing, the plan given. Rounds are interleaved, a dense FFN of all neurons in each, so that caches
are as cold as between the layers of a network. Columns:

ours, bound      the layer, and one expert's FFN over all tokens, in microseconds
GEMMs            torch's in ours, and the same number over all tokens with one expert's weights
row kernels      of csrc/
other            what is left of ours: Python, torch's calls, allocation
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from moebert_kernels import RoutingPlan, moe_ffn, native
from moebert_kernels.environment import describe_environment
from moebert_kernels.kernels.cpu import experts

from .baselines.implementation import NORM_EPS
from .cases import SHAPES, cpu_dtypes

_SECONDS = 1.0  # of each line


class _Watch:
    """Adds up the seconds of functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            self.spent[name] += time.perf_counter() - start
            return result

        return timed


class _Watched:
    """The extension with its row kernels timed."""

    def __init__(self, extension: Any, watch: _Watch) -> None:
        for name in dir(extension):
            function = getattr(extension, name)
            setattr(self, name, watch.around("rows", function) if name.endswith("_rows") else function)


def _calls(
    D: int, F: int, E: int, T: int, dtype: torch.dtype, training: bool
) -> dict[str, Callable[[], Any]]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype).requires_grad_()

    x_TD, dy_TD = randn(T, D), randn(T, D).detach()
    experts = [randn(E, F, D, scale=D**-0.5), randn(E, F), randn(E, D, F, scale=F**-0.5), randn(E, D)]
    norm = [randn(E, D), randn(E, D)]
    one = [t[0].detach().requires_grad_() for t in (*experts, *norm)]
    wide = [randn(E * F, D, scale=D**-0.5), randn(E * F), randn(D, E * F, scale=0.02), *one[3:]]
    plan = RoutingPlan.from_expert_ids(torch.randperm(T, generator=g) % E, E)

    def ours() -> torch.Tensor:
        w1, b1, w2, b2 = experts
        return moe_ffn(x_TD, plan, w1, b1, w2, b2, norm=(norm[0], norm[1]), norm_eps=NORM_EPS)

    def dense(leaves: list[torch.Tensor]) -> torch.Tensor:
        w1, b1, w2, b2, ln_w, ln_b = leaves
        z_TD = functional.linear(functional.gelu(functional.linear(x_TD, w1, b1)), w2, b2)
        return functional.layer_norm(z_TD + x_TD, (D,), ln_w, ln_b, NORM_EPS)

    def passed(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            if training:
                return torch.autograd.grad(forward(), [x_TD, *leaves], dy_TD)
            with torch.no_grad():
                return forward()

        return run

    a_TF, w_FD = torch.randn(T, F).to(dtype), torch.randn(F, D).to(dtype)
    out_TD = torch.zeros(T, D, dtype=dtype)

    def gemms() -> None:
        for _ in range(4 if training else 2):
            torch.mm(a_TF, w_FD, out=out_TD)
        for _ in range(2 if training else 0):
            torch.mm(out_TD.t(), a_TF)

    return {
        "ours": passed(ours, [*experts, *norm]),
        "bound": passed(lambda: dense(one), one),
        "dense": passed(lambda: dense(wide), wide),
        "gemms": gemms,
    }


def _line(calls: dict[str, Callable[[], Any]], watch: _Watch) -> dict[str, float]:
    """Medians in microseconds."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for call in calls.values():
        call()
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        for name, call in calls.items():
            watch.spent.clear()
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
            seconds[name].append(whole)
            if name == "ours":
                for part, spent in watch.spent.items():
                    seconds[part].append(spent)
                seconds["other"].append(whole - sum(watch.spent.values()))
    return {name: 1e6 * statistics.median(samples) for name, samples in seconds.items()}


def main(tokens: tuple[int, ...]) -> None:
    """Print the table."""
    found = native.extension()
    if found is None:
        sys.exit("the native extension is absent: there are no row kernels to time")
    watch = _Watch()
    watched = _Watched(found, watch)

    def extension(*, cuda: bool = False) -> Any:
        return watched

    native.extension = extension
    for name in ("_multiply", "_multiply_transposed"):
        setattr(experts, name, watch.around("multiply", getattr(experts, name)))
    print("| layer, T | pass | ours | bound | ratio | GEMMs: 4 experts | GEMMs: one | row kernels | other |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for shape in ("bert-base", "minilm"):
        D, F, E = (SHAPES[shape][name] for name in "DFE")
        for dtype in cpu_dtypes():
            for T in tokens:
                for training in (False, True):
                    us = _line(_calls(D, F, E, T, getattr(torch, dtype), training), watch)
                    print(
                        f"| {shape}, {dtype}, {T} | {'step' if training else 'forward'} | {us['ours']:.0f} "
                        f"| {us['bound']:.0f} | {us['ours'] / us['bound']:.2f} | {us['multiply']:.0f} "
                        f"| {us['gemms']:.0f} | {us['rows']:.0f} | {us['other']:.0f} |",
                        flush=True,
                    )
    found = describe_environment()
    bound = os.environ.get("OMP_PROC_BIND", "false")
    print(
        f"\n*Microseconds, medians of interleaved rounds over {_SECONDS:g} s. {found.cpu}, {found.threads} "
        f"threads, OMP_PROC_BIND={bound}; torch {torch.__version__}, commit {found.commit}.*"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "python -m bench.profile_cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tokens", type=int, nargs="*", default=[512, 1024], help="T; 512 and 1024 by default")
    main(tuple(parser.parse_args().tokens))
