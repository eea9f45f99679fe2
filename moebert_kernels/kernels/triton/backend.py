"""The operator on CUDA: the experts' kernels and the norm's together, under the signature of all backends.

A pass goes by shapes, dtypes and options alone: see `replay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moebert_kernels.kernels.call import NUM_TENSORS, Call, Gradients, Saved
from moebert_kernels.kernels.triton.ffn import expert_ffn_backward, expert_ffn_forward
from moebert_kernels.kernels.triton.norm import expert_norm_backward, expert_norm_forward
from moebert_kernels.kernels.triton.replay import Results, repeated


def forward(call: Call, training: bool, kept: dict[Any, Any]) -> tuple[Tensor, Saved]:
    """y_TD, and what `backward` needs if `training`; activations and slopes in sorted order, z by slot."""
    y_TD, *saved = repeated(_forward, call.tensors, (training, *call[NUM_TENSORS:]), kept)
    return y_TD, Saved(*saved)  # type: ignore[return-value]


def backward(call: Call, saved: Saved, dy_TD: Tensor, needs: Gradients, kept: dict[Any, Any]) -> Gradients:
    """The gradients, at least those that `needs` says."""
    tensors = (*call.tensors, *saved, dy_TD)
    return Gradients(*repeated(_backward, tensors, (needs, *call[NUM_TENSORS:]), kept))


def _forward(tensors: Sequence[Any], options: tuple[Any, ...]) -> Results:
    training, *rest = options
    call = Call(*tensors, *rest)
    y, hidden = expert_ffn_forward(call, training)
    kept = hidden if training else None
    if call.ln_w_ED is None:
        return y, kept, None, None, None
    y_TD, stats_2S = expert_norm_forward(call, y)
    return (y_TD, kept, y, stats_2S, None) if training else (y_TD, None, None, None, None)


def _backward(tensors: Sequence[Any], options: tuple[Any, ...]) -> Results:
    needs, *rest = options
    call, saved, dy = Call(*tensors[:NUM_TENSORS], *rest), Saved(*tensors[NUM_TENSORS:-1]), tensors[-1]
    with_norm = call.ln_w_ED is not None
    dresidual_TD = dln_w_ED = dln_b_ED = dgate_TK = None
    if with_norm:
        grads = expert_norm_backward(call, saved.z, saved.stats_2S, dy, needs.gate_TK)  # type: ignore[arg-type]
        dy, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK = grads
    wanted = [*needs[:5], needs.gate_TK and not with_norm]
    # Gradients of shared neurons come with those of the experts' own.
    for place, shared in enumerate(needs[-3:]):
        wanted[1 + place] |= shared
    experts: Sequence[Tensor | None] = [None] * 9
    if any(wanted):
        plus_TD = dresidual_TD if call.residual_TD is None else None
        experts = expert_ffn_backward(call, saved.hidden, dy, wanted, plus_TD)  # type: ignore[arg-type]
    found = zip(experts, [*wanted, *needs[-3:]], strict=True)
    *of_experts, dgate_of_z, dw1_CD, db1_C, dw2_DC = (grad if need else None for grad, need in found)
    dgate_TK = dgate_TK if with_norm and needs.gate_TK else dgate_of_z
    dresidual_TD = None if call.residual_TD is None else dresidual_TD
    return *of_experts, dgate_TK, dln_w_ED, dln_b_ED, dresidual_TD, dw1_CD, db1_C, dw2_DC
