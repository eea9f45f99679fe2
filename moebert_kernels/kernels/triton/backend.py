"""The operator on CUDA: the experts' kernels and the norm's together, under the signature of all backends.

A pass goes by shapes, dtypes and options alone: see `replay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moebert_kernels.kernels.call import NUM_TENSORS, Call, Gradients, Saved
from moebert_kernels.kernels.triton import configs
from moebert_kernels.kernels.triton.configs import Config
from moebert_kernels.kernels.triton.ffn import Shared, expert_ffn_backward, expert_ffn_forward
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


def _config(call: Call) -> Config:
    return configs.select(call.x_TD.device, call.x_TD.dtype, call.order_S.shape[0], call.w1_EFD.shape[0])


def _forward(tensors: Sequence[Any], options: tuple[Any, ...]) -> Results:
    training, *rest = options
    call = Call(*tensors, *rest)
    with_norm = call.ln_w_ED is not None
    arguments = [call.x_TD, *_experts(call), with_norm, training, _config(call), _shared(call)]
    y, hidden = expert_ffn_forward(*arguments)
    kept = hidden if training else None
    if not with_norm:
        return y, kept, None, None, None
    of_norm = [*_norm(call), call.seed, call.norm_eps, call.dropout_p]
    y_TD, stats_2S = expert_norm_forward(*[y, call.residual, *of_norm])
    return (y_TD, kept, y, stats_2S, None) if training else (y_TD, None, None, None, None)


def _backward(tensors: Sequence[Any], options: tuple[Any, ...]) -> Results:
    needs, *rest = options
    call, saved, dy = Call(*tensors[:NUM_TENSORS], *rest), Saved(*tensors[NUM_TENSORS:-1]), tensors[-1]
    with_norm = call.ln_w_ED is not None
    dresidual_TD = dln_w_ED = dln_b_ED = dgate_TK = None
    if with_norm:
        of_norm = [saved.z, call.residual, saved.stats_2S, *_norm(call), call.seed]
        grads = expert_norm_backward(*[dy, *of_norm, call.dropout_p, needs.gate_TK])
        dy, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK = grads
    wanted = [*needs[:5], needs.gate_TK and not with_norm]
    # Gradients of shared neurons come with those of the experts' own.
    for place, shared in enumerate(needs[-3:]):
        wanted[1 + place] |= shared
    experts: Sequence[Tensor | None] = [None] * 9
    if any(wanted):
        of_forward = [call.x_TD, saved.hidden, *_experts(call)]
        plus_TD = dresidual_TD if call.residual_TD is None else None
        how = [with_norm, wanted, _config(call), plus_TD, _shared(call)]
        experts = expert_ffn_backward(*[dy, *of_forward, *how])
    found = zip(experts, [*wanted, *needs[-3:]], strict=True)
    *of_experts, dgate_of_z, dw1_CD, db1_C, dw2_DC = (grad if need else None for grad, need in found)
    dgate_TK = dgate_TK if with_norm and needs.gate_TK else dgate_of_z
    dresidual_TD = None if call.residual_TD is None else dresidual_TD
    return *of_experts, dgate_TK, dln_w_ED, dln_b_ED, dresidual_TD, dw1_CD, db1_C, dw2_DC


def _shared(call: Call) -> Shared:
    return Shared(call.shared_w1_CD, call.shared_b1_C, call.shared_w2_DC)


def _experts(call: Call) -> tuple[Any, ...]:
    """Of `expert_ffn_forward`, from the order to `top_k`."""
    gate_TK = None if call.ln_w_ED is not None else call.gate_TK
    weights = (call.w1_EFD, call.b1_EF, call.w2_EDF, call.b2_ED)
    return call.order_S, call.offsets_E1, *weights, gate_TK, call.activation, call.top_k


def _norm(call: Call) -> tuple[Any, ...]:
    """Of `expert_norm_forward`, from the ids to the gate."""
    plan = (call.expert_ids_TK, call.order_S, call.offsets_E1)
    return *plan, call.ln_w_ED, call.ln_b_ED, call.gate_TK
