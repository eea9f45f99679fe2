"""What PyTorch's counter of floating-point operations is told of the operator and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.kernels.call import Call, Gradients


def forward(*arguments, out_val=None) -> int:
    """Of `ffn`, for its arguments."""
    return 2 * sum(_gemm_flops(arguments))


def backward(*arguments, out_val=None) -> int:
    """Of `ffn_backward`: the products that the wanted gradients need."""
    needs = Gradients(*arguments[-1])
    da = (
        needs.x_TD
        or needs.w1_EFD
        or needs.b1_EF
        or needs.shared_w1_CD
        or needs.shared_b1_C
        or (needs.gate_TK and arguments[Call._fields.index("ln_w_ED")] is None)
    )
    own, shared = _gemm_flops(arguments)
    of_own, of_shared = needs.w1_EFD + needs.w2_EDF, needs.shared_w1_CD + needs.shared_w2_DC
    return own * (da + needs.x_TD + of_own) + shared * (da + needs.x_TD + of_shared)


def _gemm_flops(arguments: Sequence[Any]) -> tuple[int, int]:
    """2 per multiply-add of one grouped GEMM, of experts' own neurons and of those they share.

    For tokens that have an expert; for all where none is known.
    """
    ids_TK, offsets_E1, w1_EFD, shared_w1_CD = (
        arguments[Call._fields.index(name)]
        for name in ("expert_ids_TK", "offsets_E1", "w1_EFD", "shared_w1_CD")
    )
    has_values = type(offsets_E1) is Tensor and not offsets_E1.is_meta
    rows = int(offsets_E1[-1]) if has_values else ids_TK.numel()
    return 2 * rows * w1_EFD[0].numel(), 0 if shared_w1_CD is None else 2 * rows * shared_w1_CD.numel()


def register() -> None:
    """Let `FlopCounterMode` count them, which otherwise takes an operator that it does not know for free."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.moebert_kernels.ffn, get_raw=True)(forward)
    register_flop_formula(torch.ops.moebert_kernels.ffn_backward, get_raw=True)(backward)
