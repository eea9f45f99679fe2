"""scattermoe: grouped GEMMs that gather and scatter, with biases; the activation is torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .from_source import load
from .implementation import FFNInputs, Implementation, weights_of


def scattermoe(inputs: FFNInputs, peer_path: str | None) -> Implementation:
    """Its `MLP` taken apart at the dispatch, called as its own modules call it."""
    package = load("scattermoe", "scattermoe", peer_path, inputs.x_TD.device)
    # Its default multiplies float32 in TF32; torch's switch decides here, as for everyone in the table.
    package.kernels.ops.ALLOW_TF32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    E, K = inputs.case.E, inputs.case.K
    leaves = weights_of(inputs)
    gates_TK = None if K == 1 else inputs.gate_TK

    def dispatch() -> Any:
        return package.flatten_sort_count(inputs.expert_ids_TK, num_experts=E)

    def compute(x_TD: Tensor, routing: Any) -> Tensor:
        h_SF = package.parallel_linear(
            x_TD, leaves["w1"].mT, K, *routing, expert_biases=leaves["b1"], grouped_out=True
        )
        return package.parallel_linear(
            functional.gelu(h_SF),
            leaves["w2"].mT,
            1,
            *routing,
            expert_biases=leaves["b2"],
            grouped_in=True,
            gates=gates_TK,
        )

    return Implementation(dict(leaves), dispatch, compute)
