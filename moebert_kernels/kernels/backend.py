"""The operator on CUDA: the experts' kernels and then the norm's, under the signature that backends share."""

from __future__ import annotations

from torch import Tensor

from moebert_kernels.arguments import Call, Gradients, Saved
from moebert_kernels.kernels.ffn import expert_ffn_backward, expert_ffn_forward
from moebert_kernels.kernels.norm import expert_norm_backward, expert_norm_forward


def forward(call: Call, training: bool) -> tuple[Tensor, Saved]:
    """y_TD, and what `backward` needs if `training`; pre-activations in sorted order, z by slot."""
    with_norm = call.ln_w_ED is not None
    preact_SF: Tensor | None
    y, preact_SF = expert_ffn_forward(call.x_TD, *_experts(call), with_norm, training)
    preact_SF = preact_SF if training else None
    if not with_norm:
        return y, Saved(preact_SF, None, None, None)
    y_TD, mean_S, rstd_S = expert_norm_forward(
        y, call.residual, *_norm(call), call.seed, call.norm_eps, call.dropout_p
    )
    return y_TD, Saved(preact_SF, y, mean_S, rstd_S) if training else Saved(None, None, None, None)


def backward(call: Call, saved: Saved, dy_TD: Tensor, needs: Gradients) -> Gradients:
    """The gradients, at least those that `needs` says."""
    dresidual_TD = dln_w_ED = dln_b_ED = dgate_TK = None
    dy, with_norm = dy_TD, call.ln_w_ED is not None
    if with_norm:
        of_forward = (saved.z, call.residual, saved.mean_S, saved.rstd_S, *_norm(call), call.seed)
        dy, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK = expert_norm_backward(
            dy_TD, *of_forward, call.dropout_p, needs.gate_TK
        )
    of_experts = [*needs[:5], needs.gate_TK and not with_norm]
    experts: list[Tensor | None] = [None] * 6
    if any(of_experts):
        experts = [
            grad if need else None
            for grad, need in zip(
                expert_ffn_backward(dy, call.x_TD, saved.preact, *_experts(call), with_norm, of_experts),
                of_experts,
                strict=True,
            )
        ]
    dx_TD, *weights, dgate_of_z = experts
    if dx_TD is not None and dresidual_TD is not None and call.residual_TD is None:
        dx_TD += dresidual_TD
    dresidual_TD = None if call.residual_TD is None else dresidual_TD
    dgate_TK = dgate_TK if with_norm else dgate_of_z
    return Gradients(dx_TD, *weights, dgate_TK, dln_w_ED, dln_b_ED, dresidual_TD)


def _experts(call: Call) -> tuple:
    """Of `expert_ffn_forward`, from the order to `top_k`."""
    gate_TK = None if call.ln_w_ED is not None else call.gate_TK
    weights = (call.w1_EFD, call.b1_EF, call.w2_EDF, call.b2_ED)
    return call.order_S, call.offsets_E1, *weights, gate_TK, call.activation, call.top_k


def _norm(call: Call) -> tuple:
    """Of `expert_norm_forward`, from the ids to the gate."""
    plan = (call.expert_ids_TK, call.order_S, call.offsets_E1)
    return *plan, call.ln_w_ED, call.ln_b_ED, call.gate_TK
