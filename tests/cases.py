"""The table of cases that the tests check; the benchmarks time the same notion of a case at larger sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import ROUTINGS, Case, expert_ids, tensors

__all__ = ["CASES", "ROUTINGS", "SHARING", "Case", "any_experts", "bert_base", "expert_ids", "tensors"]

# Tile sides under test are 16 or 32: 15, 16, 17 and 33 lie around a boundary, 13 and 37 are primes.
CASES = (
    *(Case(T, routing=r) for T, r in ((0, "uniform"), (1, "uniform"), (7, "uniform"), (37, "uniform"))),
    *(Case(T, E=1) for T in (15, 16, 17)),
    *(Case(33, routing=r) for r in ROUTINGS if r not in ("uniform", "balanced", "zipf")),
    *(Case(19, activation=a, gate=True) for a in ("gelu_tanh", "relu", "silu")),
    Case(21, D=8, F=8, E=2),
    Case(21, D=13, F=29, gate=True),
    Case(18, D=40, F=16, E=2, bias=False),
    Case(18, D=24, F=40, E=2, bias=False, gate=True),
    *(Case(11, K=k, gate=k % 2 == 0, routing="dropped") for k in (2, 3, 4)),
    Case(5, E=70, D=8, F=8),
    Case(23, norm=True),
    Case(23, norm=True, gate=True, routing="dropped"),
    Case(11, K=2, norm=True, gate=True, routing="dropped", bias=False),
    Case(11, K=3, norm=True, routing="first empty"),
    Case(9, norm=True, routing="nobody"),
    Case(0, norm=True, gate=True, K=2),
)

# Experts that share C neurons, in widths that tiles of 16 and 32 columns divide and in such that none does:
# no tile has neurons of both kinds.
SHARING = (
    Case(0, C=16),
    Case(1, C=16),
    Case(37, C=48),
    Case(33, C=32, F=16, routing="dropped", norm=True),
    Case(33, C=13, F=29, D=13, routing="middle empty", activation="silu", gate=True),
    Case(19, C=40, F=8, activation="relu", bias=False),
    Case(11, C=20, K=2, gate=True, routing="dropped"),
    Case(11, C=20, K=3, norm=True, routing="first empty"),
    Case(11, C=12, K=3, norm=True, gate=True, bias=False),
    Case(9, C=16, norm=True, routing="nobody"),
    Case(5, C=8, E=19, D=8, F=8),
)


def bert_base(T: int, routing: str = "uniform", **options) -> Case:
    """What the paper's encoder runs: BERT-base with four experts of 768 neurons."""
    return Case(T, D=768, F=768, E=4, routing=routing, **options)


def any_experts(case: Case, *, seed: int = 0) -> Tensor:
    """Experts [T, K] that no router would choose: a token may have one twice, or none."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, case.E, (case.T, case.K), generator=g)
