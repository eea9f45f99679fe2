"""What PyTorch's counter of floating-point operations is told of the operator and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.kernels.call import Call, Gradients


def forward(*arguments, out_val=None) -> int:
    """Of `ffn`, for its arguments."""
    return 2 * sum(_gemm_flops(_call_of(arguments)))


def backward(*arguments, out_val=None) -> int:
    """Of `ffn_backward`: the products that the wanted gradients need."""
    call, needs = _call_of(arguments), Gradients(*arguments[-1])
    of_hidden = (needs.x_TD, needs.w1_EFD, needs.b1_EF, needs.shared_w1_CD, needs.shared_b1_C)
    da = any(of_hidden) or (needs.gate_TK and call.ln_w_ED is None)
    own, shared = _gemm_flops(call)
    of_own, of_shared = needs.w1_EFD + needs.w2_EDF, needs.shared_w1_CD + needs.shared_w2_DC
    return own * (da + needs.x_TD + of_own) + shared * (da + needs.x_TD + of_shared)


def _call_of(arguments: Sequence[Any]) -> Call:
    return Call(*arguments[: len(Call._fields)])


def _gemm_flops(call: Call) -> tuple[int, int]:
    """2 per multiply-add of one grouped GEMM, of experts' own neurons and of those they share.

    For tokens that have an expert; for all where none is known.
    """
    has_values = type(call.offsets_E1) is Tensor and not call.offsets_E1.is_meta
    rows = int(call.offsets_E1[-1]) if has_values else call.expert_ids_TK.numel()
    _, F, D = call.w1_EFD.shape
    return 2 * rows * F * D, 2 * rows * call.num_shared * D


def register() -> None:
    """Let `FlopCounterMode` count them, which otherwise takes an operator that it does not know for free."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.moebert_kernels.ffn, get_raw=True)(forward)
    register_flop_formula(torch.ops.moebert_kernels.ffn_backward, get_raw=True)(backward)
