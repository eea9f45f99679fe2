"""The operator in plain PyTorch: the path of everything that has no kernels of its own.

One expert at a time over its rows in sorted order, so that the GEMMs are torch's own. Reading the row counts
synchronises an accelerator; on the CPU they are at hand.
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
    """y_TD, and what `backward` needs if `training`; pre-activations in sorted order, z by slot."""
    x_TD, top_k, S = call.x_TD, call.top_k, call.order_S.shape[0]
    z_SD = x_TD.new_zeros(S, x_TD.shape[1])
    preact_SF = x_TD.new_zeros(S, call.w1_EFD.shape[1]) if training else None
    gate_S = _gate_of_slots(call)
    preact_SC, shared_SD = _shared(call)
    for expert, slots_R, rows in _experts(call):
        x_RD = x_TD.index_select(0, slots_R // top_k)
        h_RF = F.linear(x_RD, call.w1_EFD[expert], _row(call.b1_EF, expert))
        if preact_SF is not None:
            preact_SF[rows] = h_RF
        z_RD = F.linear(activate(call.activation, h_RF), call.w2_EDF[expert], _row(call.b2_ED, expert))
        if shared_SD is not None:
            z_RD += shared_SD[rows]
        if gate_S is not None:
            z_RD = z_RD * gate_S.index_select(0, slots_R).unsqueeze(1)
        z_SD.index_copy_(0, slots_R, z_RD)
    if call.ln_w_ED is None:
        y_TD = z_SD if top_k == 1 else z_SD.view(-1, top_k, z_SD.shape[1]).sum(1)
        return y_TD, _saved(call, preact_SF, preact_SC, None, None) if training else Saved(None, None, None)
    y_TD, stats_2S = _norm(call, z_SD)
    of_norm = (z_SD, stats_2S)
    return y_TD, _saved(call, preact_SF, preact_SC, *of_norm) if training else Saved(None, None, None)


def backward(call: Call, saved: Saved, dy_TD: Tensor, needs: Gradients, kept: dict[Any, Any]) -> Gradients:
    """The gradients that `needs` says."""
    dresidual_TD = dln_w_ED = dln_b_ED = dgate_TK = None
    x_TD, top_k, S = call.x_TD, call.top_k, call.order_S.shape[0]
    dz, slots_per_row = dy_TD, top_k
    if call.ln_w_ED is not None:
        slots_per_row = 1
        dz, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK = _norm_backward(call, saved, dy_TD, needs.gate_TK)
    need_gate = needs.gate_TK and call.ln_w_ED is None
    need_dh = needs.x_TD or needs.w1_EFD or needs.b1_EF
    dx_SD = _zeros((S, x_TD.shape[1]), x_TD, needs.x_TD)
    dw1_EFD, db1_EF, dw2_EDF, db2_ED = (
        None if weight is None else _zeros(weight.shape, weight, need)
        for weight, need in zip(call[5:9], needs[1:5], strict=True)
    )
    dgate_S = _zeros((S,), dy_TD, need_gate)
    gate_S = _gate_of_slots(call)
    preact_SF, preact_SC = _preactivations(call, saved)
    for expert, slots_R, rows in _experts(call):
        h_RF, w2_DF = preact_SF[rows], call.w2_EDF[expert]
        dz_RD = dz.index_select(0, slots_R // slots_per_row)
        a_RF = activate(call.activation, h_RF)
        if dgate_S is not None:
            # d/dg of g * (W2 a + b2), without keeping the product itself: <W2^T dy, a> + <dy, b2>.
            dgate_R = (dz_RD @ w2_DF).mul_(a_RF).sum(1)
            if call.b2_ED is not None:
                dgate_R += dz_RD @ call.b2_ED[expert]
            dgate_S.index_copy_(0, slots_R, dgate_R)
        if gate_S is not None:
            dz_RD = dz_RD * gate_S.index_select(0, slots_R).unsqueeze(1)
        if dw2_EDF is not None:
            torch.mm(dz_RD.T, a_RF, out=dw2_EDF[expert])
        if db2_ED is not None:
            torch.sum(dz_RD, 0, out=db2_ED[expert])
        if not need_dh:
            continue
        dh_RF = activate_backward(call.activation, dz_RD @ w2_DF, h_RF)
        if dw1_EFD is not None:
            torch.mm(dh_RF.T, x_TD.index_select(0, slots_R // top_k), out=dw1_EFD[expert])
        if db1_EF is not None:
            torch.sum(dh_RF, 0, out=db1_EF[expert])
        if dx_SD is not None:
            dx_SD.index_copy_(0, slots_R, dh_RF @ call.w1_EFD[expert])
    of_shared = _shared_backward(call, preact_SC, dz, slots_per_row, needs, dx_SD, dgate_S)
    dx_TD = None
    if dx_SD is not None:
        dx_TD = dx_SD if top_k == 1 else dx_SD.view(-1, top_k, dx_SD.shape[1]).sum(1)
        if call.residual_TD is None and dresidual_TD is not None:
            dx_TD += dresidual_TD
    if dgate_S is not None:
        dgate_TK = dgate_S.view(-1, top_k)
    grads = (dw1_EFD, db1_EF, dw2_EDF, db2_ED, dgate_TK, dln_w_ED, dln_b_ED)
    return Gradients(dx_TD, *grads, None if call.residual_TD is None else dresidual_TD, *of_shared)


def _shared(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Of the neurons that all experts have: pre-activations and share of z, in sorted order."""
    if call.shared_w1_CD is None or call.shared_w2_DC is None:
        return None, None
    x_SD = call.x_TD.index_select(0, call.order_S // call.top_k)
    h_SC = F.linear(x_SD, call.shared_w1_CD, call.shared_b1_C)
    return h_SC, F.linear(activate(call.activation, h_SC), call.shared_w2_DC)


def _together(call: Call) -> bool:
    """Whether pre-activations of shared and own neurons are kept in one tensor, as kernels keep theirs."""
    return call.x_TD.is_cuda


def _saved(
    call: Call,
    preact_SF: Tensor | None,
    preact_SC: Tensor | None,
    z_SD: Tensor | None,
    stats_2S: Tensor | None,
) -> Saved:
    if preact_SF is None or preact_SC is None or not _together(call):
        return Saved(preact_SF, z_SD, stats_2S, preact_SC)
    return Saved(torch.cat([preact_SC, preact_SF], 1), z_SD, stats_2S)


def _preactivations(call: Call, saved: Saved) -> tuple[Tensor, Tensor | None]:
    """Of own and of shared neurons."""
    assert saved.hidden is not None
    if call.num_shared and _together(call):
        return saved.hidden[:, call.num_shared :], saved.hidden[:, : call.num_shared]
    return saved.hidden, saved.shared


def _shared_backward(
    call: Call,
    preact_SC: Tensor | None,
    dz: Tensor,
    slots_per_row: int,
    needs: Gradients,
    dx_SD: Tensor | None,
    dgate_S: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `shared`; those of x and the gate are added to theirs."""
    if call.shared_w1_CD is None or call.shared_w2_DC is None:
        return None, None, None
    assert preact_SC is not None
    slots_R = call.order_S[: int(call.offsets_E1[-1])]
    h_RC, dz_RD = preact_SC[: slots_R.shape[0]], dz.index_select(0, slots_R // slots_per_row)
    a_RC = activate(call.activation, h_RC)
    if dgate_S is not None:
        dgate_S.index_add_(0, slots_R, (dz_RD @ call.shared_w2_DC).mul_(a_RC).sum(1))
    gate_S = _gate_of_slots(call)
    if gate_S is not None:
        dz_RD = dz_RD * gate_S.index_select(0, slots_R).unsqueeze(1)
    dw2_DC = dz_RD.T @ a_RC if needs.shared_w2_DC else None
    dw1_CD = db1_C = None
    if needs.x_TD or needs.shared_w1_CD or needs.shared_b1_C:
        dh_RC = activate_backward(call.activation, dz_RD @ call.shared_w2_DC, h_RC)
        if needs.shared_w1_CD:
            dw1_CD = dh_RC.T @ call.x_TD.index_select(0, slots_R // call.top_k)
        if needs.shared_b1_C:
            db1_C = dh_RC.sum(0)
        if dx_SD is not None:
            dx_SD.index_add_(0, slots_R, dh_RC @ call.shared_w1_CD)
    return dw1_CD, db1_C, dw2_DC


def _norm(call: Call, z_SD: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = sum_k g_tk * LayerNorm_e(dropout(z_tk) + residual_t), mean and 1/std of each slot."""
    assert call.ln_w_ED is not None
    assert call.ln_b_ED is not None
    u_TKD, _ = _residual_sum(call, z_SD)
    xhat_TKD, mean, rstd = torch.native_layer_norm(u_TKD, u_TKD.shape[2:], None, None, call.norm_eps)
    expert_TK = call.expert_ids_TK.clamp(min=0)
    out_TKD = xhat_TKD * call.ln_w_ED[expert_TK] + call.ln_b_ED[expert_TK]
    y_TD = (out_TKD * _gate_of_routed(call, xhat_TKD.dtype)).sum(1).to(call.residual.dtype)
    stats_2S = torch.stack((mean.reshape(-1), rstd.reshape(-1)))
    return torch.where(_routed_T1(call), y_TD, call.residual), stats_2S


def _norm_backward(
    call: Call, saved: Saved, dy_TD: Tensor, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `_norm`: of z, residual, ln_w, ln_b and, where asked for, of the gate."""
    assert saved.z is not None
    assert saved.stats_2S is not None
    assert call.ln_w_ED is not None
    assert call.ln_b_ED is not None
    top_k, residual_TD = call.top_k, call.residual
    u_TKD, keep_TKD = _residual_sum(call, saved.z[: call.order_S.shape[0]])
    mean_TK1, rstd_TK1 = saved.stats_2S.view(2, -1, top_k, 1)
    xhat_TKD = (u_TKD - mean_TK1) * rstd_TK1
    expert_TK = call.expert_ids_TK.clamp(min=0)
    w_TKD = call.ln_w_ED[expert_TK].to(xhat_TKD.dtype)
    dy_T1D = dy_TD.to(xhat_TKD.dtype).unsqueeze(1)
    dgate_TK = None
    if need_gate:
        dgate_TK = ((xhat_TKD * w_TKD + call.ln_b_ED[expert_TK]) * dy_T1D).sum(2) * (call.expert_ids_TK >= 0)
    do_TKD = dy_T1D * _gate_of_routed(call, xhat_TKD.dtype)
    dln_w_ED, dln_b_ED = (ln.new_zeros(ln.shape) for ln in (call.ln_w_ED, call.ln_b_ED))
    do_SD, do_xhat_SD = do_TKD.flatten(0, 1), (do_TKD * xhat_TKD).flatten(0, 1)
    for expert, slots_R, _ in _experts(call):
        dln_w_ED[expert] = do_xhat_SD.index_select(0, slots_R).sum(0)
        dln_b_ED[expert] = do_SD.index_select(0, slots_R).sum(0)
    dxhat_TKD = do_TKD * w_TKD
    slope_TK1 = (dxhat_TKD * xhat_TKD).mean(2, keepdim=True)
    du_TKD = rstd_TK1 * (dxhat_TKD - dxhat_TKD.mean(2, keepdim=True) - xhat_TKD * slope_TK1)
    dresidual_TD = du_TKD.sum(1).to(residual_TD.dtype)
    dresidual_TD = torch.where(_routed_T1(call), dresidual_TD, dy_TD.to(residual_TD.dtype))
    dz_TKD = du_TKD if keep_TKD is None else du_TKD * keep_TKD
    return dz_TKD.flatten(0, 1).to(call.x_TD.dtype), dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK


def _experts(call: Call) -> Iterator[tuple[int, Tensor, slice]]:
    """Every expert that has rows: its number, their slots, where they lie in sorted order."""
    offsets, order_S = call.offsets_E1.tolist(), call.order_S.long()
    for expert, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            yield expert, order_S[begin:end], slice(begin, end)


def _row(bias_EN: Tensor | None, expert: int) -> Tensor | None:
    return None if bias_EN is None else bias_EN[expert]


def _zeros(shape: tuple[int, ...], like: Tensor, need: bool) -> Tensor | None:
    return like.new_zeros(shape) if need else None


def _gate_of_slots(call: Call) -> Tensor | None:
    """The factor of each slot's z; None where it is 1 throughout: with norm it comes after that."""
    if call.ln_w_ED is not None or (call.gate_TK is None and call.top_k == 1):
        return None
    if call.gate_TK is not None:
        return call.gate_TK.reshape(-1).to(call.x_TD.dtype)
    return call.x_TD.new_full(call.order_S.shape, 1 / call.top_k)


def _gate_of_routed(call: Call, dtype: torch.dtype) -> Tensor:
    routed_TK = (call.expert_ids_TK >= 0).to(dtype)
    gate_TK = routed_TK / call.top_k if call.gate_TK is None else routed_TK * call.gate_TK
    return gate_TK.unsqueeze(2)


def _routed_T1(call: Call) -> Tensor:
    return (call.expert_ids_TK >= 0).any(1, keepdim=True)


def _residual_sum(call: Call, z_SD: Tensor) -> tuple[Tensor, Tensor | None]:
    """dropout(z) + residual in float32 or wider, and the dropout's factors."""
    dtype = torch.promote_types(call.residual.dtype, torch.float32)
    z_TKD = z_SD.to(dtype).view(-1, call.top_k, z_SD.shape[1])
    residual_T1D = call.residual.unsqueeze(1)
    if call.seed is None:
        return z_TKD + residual_T1D, None
    generator = torch.Generator(z_SD.device).manual_seed(int(call.seed))
    keep_TKD = torch.rand(z_TKD.shape, generator=generator, device=z_SD.device) >= call.dropout_p
    keep_TKD = keep_TKD.to(dtype) / (1 - call.dropout_p)
    return z_TKD * keep_TKD + residual_T1D, keep_TKD
