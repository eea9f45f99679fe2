"""The one table of cases: what the tests check and, at larger sizes, what the benchmarks time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUTINGS = (
    "uniform",  # every expert has tokens
    "dropped",  # a quarter of the slots has no expert
    "skewed",  # one expert has 70 % of the tokens
    "one",  # every token to the middle expert
    "first empty",
    "middle empty",
    "last empty",
    "nobody",  # no slot has an expert
)


@dataclass(frozen=True)
class Case:
    """One call of `moe_ffn`: sizes in the package's notation, how tokens are routed, which parts are used."""

    T: int
    D: int = 16
    F: int = 24
    E: int = 4
    K: int = 1
    routing: str = "uniform"
    activation: str = "gelu"
    bias: bool = True
    gate: bool = False
    norm: bool = False

    def __str__(self) -> str:
        parts = [f"T{self.T}-D{self.D}-F{self.F}-E{self.E}-K{self.K}", self.routing, self.activation]
        parts += [name for name in ("gate", "norm") if getattr(self, name)]
        return "-".join(parts + ([] if self.bias else ["nobias"])).replace(" ", "_")


# Tile sides under test are 16 or 32: 15, 16, 17 and 33 lie around a boundary, 13 and 37 are primes.
CASES = (
    *(Case(T, routing=r) for T, r in ((0, "uniform"), (1, "uniform"), (7, "uniform"), (37, "uniform"))),
    *(Case(T, E=1) for T in (15, 16, 17)),
    *(Case(33, routing=r) for r in ROUTINGS if r != "uniform"),
    *(Case(19, activation=a, gate=True) for a in ("gelu_tanh", "relu", "silu")),
    Case(21, D=8, F=8, E=2),
    Case(21, D=13, F=29, gate=True),
    Case(18, D=48, F=16, bias=False),
    Case(18, D=40, F=40, bias=False, gate=True),
    *(Case(11, K=k, gate=k % 2 == 0, routing="dropped") for k in (2, 3, 4)),
    Case(9, E=256, D=8, F=8),
    Case(23, norm=True),
    Case(23, norm=True, gate=True, routing="dropped"),
    Case(11, K=2, norm=True, gate=True, routing="dropped", bias=False),
    Case(11, K=3, norm=True, routing="first empty"),
    Case(9, norm=True, routing="nobody"),
    Case(0, norm=True, gate=True, K=2),
)

# What the paper's encoder runs: BERT-base with four experts of 768 neurons.
BENCH_TOKENS = (64, 512, 4096, 16384, 65536)


def bert_base(T: int, routing: str = "uniform", **options) -> Case:
    return Case(T, D=768, F=768, E=4, routing=routing, **options)


def expert_ids(case: Case, *, seed: int = 0) -> Tensor:
    """int64 [T, K] on the CPU; a token's experts differ, as a router's do."""
    T, E, K = case.T, case.E, case.K
    g = torch.Generator().manual_seed(seed)
    middle = E // 2
    absent = {"first empty": 0, "middle empty": middle, "last empty": E - 1}.get(case.routing)
    present = torch.tensor([e for e in range(E) if e != absent])
    ids_TK = present[torch.rand(T, len(present), generator=g).argsort(1)[:, :K]].reshape(T, K)
    if case.routing == "one":
        ids_TK[:, 0] = middle
    elif case.routing == "skewed":
        ids_TK[torch.rand(T, generator=g) < 0.7, 0] = middle
    elif case.routing == "dropped":
        ids_TK[torch.rand(T, K, generator=g) < 0.25] = -1
        ids_TK[: T // 8] = -1
    elif case.routing == "nobody":
        ids_TK[:] = -1
    return ids_TK


def tensors(case: Case, *, seed: int = 0) -> dict[str, Tensor]:
    """float64 inputs of unit scale on the CPU, and the gradient that comes back, "dy".

    x has entries of magnitude up to 6, where erf and tanh GELU part; pre-activations and outputs are of
    unit scale, so that no error can hide behind a small output.
    """
    T, D, F, E, K = case.T, case.D, case.F, case.E, case.K
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    made = {"x": randn(T, D), "w1": randn(E, F, D, scale=1.5 * D**-0.5), "w2": randn(E, D, F, scale=F**-0.5)}
    made["x"][: (T + 3) // 4] *= 2
    made["x"].clamp_(-6, 6)
    if case.bias:
        made |= {"b1": randn(E, F, scale=0.5), "b2": randn(E, D)}
    if case.gate:
        made["gate"] = torch.rand(T, K, generator=g, dtype=torch.float64) + 0.25
    if case.norm:
        made |= {"residual": randn(T, D), "ln_w": randn(E, D), "ln_b": randn(E, D)}
    made["dy"] = randn(T, D)
    return made
