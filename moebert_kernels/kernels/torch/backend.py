"""One expert at a time over its rows in sorted order, so that the GEMMs are torch's own.

Neurons that all experts share are the first of each expert's. Reading the row counts synchronises an
accelerator; on the CPU they are at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_kernels.activations import activate, activate_backward
from moebert_kernels.kernels.call import Call, Gradients, Saved


def forward(call: Call, training: bool, kept: dict[Any, Any]) -> tuple[Tensor, Saved]:
    """y_TD, and what `backward` needs if `training`, in sorted order."""
    x_TD, (T, K), D, C = call.x_TD, call.expert_ids_TK.shape, call.x_TD.shape[1], call.num_shared
    with_norm, num_kept = call.ln_w_ED is not None, T * K if training else 0
    y_SD = x_TD.new_zeros(T * K, D, dtype=call.norm_dtype if with_norm else x_TD.dtype)
    h_SN = x_TD.new_zeros(num_kept, C + call.w1_EFD.shape[1])
    z_SD, stats_2S = x_TD.new_zeros(num_kept, D), x_TD.new_zeros(2, num_kept, dtype=call.norm_dtype)
    keep_SD = _dropout_factors(call)
    for expert, slots_R, rows in _experts(call):
        w1_ND, b1_N, w2_DN, b2_D = _weights(call, expert)
        h_RN = F.linear(x_TD[slots_R // K], w1_ND, b1_N)
        out_RD = z_RD = _linear(activate(call.activation, h_RN), C, w2_DN, b2_D)
        if training:
            h_SN[rows], z_SD[rows] = h_RN, z_RD
        if with_norm:
            u_RD = _residual_sum(call, z_RD, keep_SD, slots_R)
            out_RD, *stats = torch.native_layer_norm(u_RD, (D,), *_norm(call, expert), call.norm_eps)
            if training:
                stats_2S[:, rows] = torch.cat(stats, 1).T
        y_SD[slots_R] = (out_RD * _gate(call, slots_R)).to(y_SD.dtype)
    y_TD = y_SD.view(T, K, D).sum(1)
    if with_norm:
        y_TD = torch.where(_routed_T1(call), y_TD.to(call.residual.dtype), call.residual)
    if not training:
        return y_TD, Saved(None, None, None)
    saved = Saved(h_SN, z_SD, stats_2S) if with_norm else Saved(h_SN, None, None)
    if C and not _together(call):
        saved = saved._replace(hidden=h_SN[:, C:], shared=h_SN[:, :C])
    return y_TD, saved


def backward(call: Call, saved: Saved, dy_TD: Tensor, needs: Gradients, kept: dict[Any, Any]) -> Gradients:
    """The gradients of all there are, but the gate's only where it is wanted."""
    x_TD, (T, K), D, C = call.x_TD, call.expert_ids_TK.shape, call.x_TD.shape[1], call.num_shared
    tensors = (getattr(call, name) for name in Gradients._fields)
    grads = Gradients(*(None if t is None else t.new_zeros(t.shape) for t in tensors))
    dx_SD, num_routed = x_TD.new_zeros(T * K, D), int(call.offsets_E1[-1])
    dz_SD, dh_SC, a_SC = (x_TD.new_empty(num_routed, columns) for columns in (D, C, C))
    du_SD, dgate_S = (x_TD.new_zeros(T * K, *more, dtype=call.norm_dtype) for more in ((D,), ()))
    keep_SD = _dropout_factors(call)
    for expert, slots_R, rows in _experts(call):
        w1_ND, _, w2_DN, b2_D = _weights(call, expert)
        x_RD, dy_RD = x_TD[slots_R // K], dy_TD[slots_R // K].to(call.norm_dtype)
        h_RN = _preactivations(call, saved, rows)
        a_RN = activate(call.activation, h_RN)
        dz_RD = dy_RD * _gate(call, slots_R)
        if call.ln_w_ED is not None:
            assert saved.z is not None
            assert saved.stats_2S is not None
            u_RD, norm = _residual_sum(call, saved.z[rows], keep_SD, slots_R), _norm(call, expert)
            stats = saved.stats_2S[:, rows, None]
            du_RD, grads.ln_w_ED[expert], grads.ln_b_ED[expert] = torch.ops.aten.native_layer_norm_backward(
                dz_RD, u_RD, (D,), *stats, *norm, [True] * 3
            )
            du_SD[slots_R] = du_RD
            dz_RD = du_RD if keep_SD is None else du_RD * keep_SD[slots_R]
        if needs.gate_TK:
            if call.ln_w_ED is None:
                out_RD = _linear(a_RN, C, w2_DN, b2_D)
            else:
                out_RD = F.layer_norm(u_RD, (D,), *norm, call.norm_eps)
            dgate_S[slots_R] = (out_RD * dy_RD).sum(1)
        dz_RD = dz_RD.to(x_TD.dtype)
        dh_RN = activate_backward(call.activation, dz_RD @ w2_DN, h_RN)
        dx_SD[slots_R] = _linear(dh_RN, C, w1_ND.T)
        grads.w1_EFD[expert] = dh_RN[:, C:].T @ x_RD
        grads.w2_EDF[expert] = dz_RD.T @ a_RN[:, C:]
        if call.b1_EF is not None:
            grads.b1_EF[expert] = dh_RN[:, C:].sum(0)
        if call.b2_ED is not None:
            grads.b2_ED[expert] = dz_RD.sum(0)
        dz_SD[rows], dh_SC[rows], a_SC[rows] = dz_RD, dh_RN[:, :C], a_RN[:, :C]
    if C:
        x_SD = x_TD[call.order_S[:num_routed] // K]
        shared = {"shared_w1_CD": dh_SC.T @ x_SD, "shared_w2_DC": dz_SD.T @ a_SC, "shared_b1_C": dh_SC.sum(0)}
        grads = grads._replace(**shared)
    dx_TD, dresidual_TD = dx_SD.view(T, K, D).sum(1), None
    if call.ln_w_ED is not None:
        du_TD, dy_TD = (t.to(call.residual.dtype) for t in (du_SD.view(T, K, D).sum(1), dy_TD))
        dresidual_TD = torch.where(_routed_T1(call), du_TD, dy_TD)
        if call.residual_TD is None:
            dx_TD, dresidual_TD = dx_TD + dresidual_TD, None
    return grads._replace(x_TD=dx_TD, residual_TD=dresidual_TD, gate_TK=dgate_S.view(T, K))


def _experts(call: Call) -> Iterator[tuple[int, Tensor, slice]]:
    """Every expert that has rows: its number, their slots, where they lie in sorted order."""
    offsets, order_S = call.offsets_E1.tolist(), call.order_S.long()
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            yield expert, order_S[begin:end], slice(begin, end)


def _weights(call: Call, expert: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1, b1, w2 and b2 of one expert in full."""
    w1_FD, w2_DF = call.w1_EFD[expert], call.w2_EDF[expert]
    b1_F, b2_D = (None if b is None else b[expert] for b in (call.b1_EF, call.b2_ED))
    if call.shared_w1_CD is None or call.shared_w2_DC is None:
        return w1_FD, b1_F, w2_DF, b2_D
    b1_N = None if b1_F is None or call.shared_b1_C is None else torch.cat((call.shared_b1_C, b1_F))
    return torch.cat((call.shared_w1_CD, w1_FD)), b1_N, torch.cat((call.shared_w2_DC, w2_DF), 1), b2_D


def _linear(rows_RN: Tensor, num_shared: int, w_DN: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """rows w^T + bias, rounded as two networks are that are added: the shared neurons and the expert's."""
    own_RD = F.linear(rows_RN[:, num_shared:], w_DN[:, num_shared:], bias_D)
    return own_RD + rows_RN[:, :num_shared] @ w_DN[:, :num_shared].T if num_shared else own_RD


def _norm(call: Call, expert: int) -> tuple[Tensor, Tensor]:
    assert call.ln_w_ED is not None
    assert call.ln_b_ED is not None
    return call.ln_w_ED[expert].to(call.norm_dtype), call.ln_b_ED[expert].to(call.norm_dtype)


def _together(call: Call) -> bool:
    """Whether pre-activations of shared and own neurons are kept in one tensor, as kernels keep theirs."""
    return call.x_TD.is_cuda


def _preactivations(call: Call, saved: Saved, rows: slice) -> Tensor:
    assert saved.hidden is not None
    h_RN = saved.hidden[rows]
    if not call.num_shared or _together(call):
        return h_RN
    assert saved.shared is not None
    return torch.cat((saved.shared[rows], h_RN), 1)


def _gate(call: Call, slots_R: Tensor) -> Tensor | float:
    """The factor of each row's output."""
    if call.gate_TK is None:
        return 1 / call.top_k
    return call.gate_TK.reshape(-1, 1)[slots_R].to(call.norm_dtype)


def _routed_T1(call: Call) -> Tensor:
    return (call.expert_ids_TK >= 0).any(1, keepdim=True)


def _dropout_factors(call: Call) -> Tensor | None:
    """Those of each slot's z, the same in both directions; None without dropout."""
    if call.seed is None:
        return None
    shape, device = (call.order_S.shape[0], call.x_TD.shape[1]), call.x_TD.device
    generator = torch.Generator(device).manual_seed(int(call.seed))
    keep_SD = torch.rand(shape, generator=generator, device=device) >= call.dropout_p
    return keep_SD.to(call.norm_dtype) / (1 - call.dropout_p)


def _residual_sum(call: Call, z_RD: Tensor, keep_SD: Tensor | None, slots_R: Tensor) -> Tensor:
    """dropout(z) + residual, as wide as the norm is computed."""
    z_RD = z_RD.to(call.norm_dtype)
    return (z_RD if keep_SD is None else z_RD * keep_SD[slots_R]) + call.residual[slots_R // call.top_k]
