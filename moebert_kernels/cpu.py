"""The operators in plain PyTorch: the path of everything that has no kernels of its own.

One expert at a time over its rows in sorted order, so that the GEMMs are torch's own. Reading the row counts
synchronises an accelerator; on the CPU they are at hand. Argument and result conventions are those of `ops`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_kernels.activations import activate, activate_backward

PREACT_SLACK = 128


def preact_rows(x_TD: Tensor, num_slots: int) -> int:
    """Rows of the saved pre-activations: on the CPU `cpu_native` fills the experts' rows up."""
    return num_slots + num_slots // 32 + PREACT_SLACK if x_TD.device.type == "cpu" else num_slots


def expert_ffn_forward(
    x_TD: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    gate_TK: Tensor | None,
    activation: str,
    top_k: int,
    per_slot: bool,
    save_preact: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.expert_ffn`."""
    num_slots = order_S.shape[0]
    y_SD = x_TD.new_zeros(num_slots, x_TD.shape[1])
    preact_SF = x_TD.new_zeros(preact_rows(x_TD, num_slots) if save_preact else 0, w1_EFD.shape[1])
    gate_S = None if per_slot else _gate_of_slots(gate_TK, num_slots, top_k, x_TD)
    for expert, begin, end in _experts_with_rows(offsets_E1):
        slots_R = order_S[begin:end]
        h_RF = F.linear(x_TD.index_select(0, slots_R // top_k), w1_EFD[expert], _row(b1_EF, expert))
        if save_preact:
            preact_SF[begin:end] = h_RF
        z_RD = F.linear(activate(activation, h_RF), w2_EDF[expert], _row(b2_ED, expert))
        if gate_S is not None:
            z_RD = z_RD * gate_S.index_select(0, slots_R).unsqueeze(1)
        y_SD.index_copy_(0, slots_R.long(), z_RD)
    if per_slot or top_k == 1:
        return y_SD, preact_SF
    return y_SD.view(-1, top_k, y_SD.shape[1]).sum(1), preact_SF


def expert_ffn_backward(
    dy: Tensor,
    x_TD: Tensor,
    preact_SF: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    gate_TK: Tensor | None,
    activation: str,
    top_k: int,
    per_slot: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.expert_ffn_backward`."""
    need_x, need_w1, need_b1, need_w2, need_b2, need_gate = needs
    num_slots = order_S.shape[0]
    dx_SD = x_TD.new_zeros(num_slots if need_x else 0, x_TD.shape[1])
    dw1_EFD = torch.zeros_like(w1_EFD) if need_w1 else w1_EFD.new_empty(0)
    db1_EF = torch.zeros_like(b1_EF) if need_b1 and b1_EF is not None else w1_EFD.new_empty(0)
    dw2_EDF = torch.zeros_like(w2_EDF) if need_w2 else w2_EDF.new_empty(0)
    db2_ED = torch.zeros_like(b2_ED) if need_b2 and b2_ED is not None else w2_EDF.new_empty(0)
    dgate_S = dy.new_zeros(num_slots if need_gate else 0)
    gate_S = None if per_slot else _gate_of_slots(gate_TK, num_slots, top_k, x_TD)

    for expert, begin, end in _experts_with_rows(offsets_E1):
        slots_R = order_S[begin:end]
        tokens_R = slots_R // top_k
        h_RF = preact_SF[begin:end]
        a_RF = activate(activation, h_RF)
        dz_RD = dy.index_select(0, slots_R if per_slot else tokens_R)
        if need_gate:
            # d/dg of g * (W2 a + b2), without keeping the product itself: <W2^T dy, a> + <dy, b2>.
            dgate_R = (dz_RD @ w2_EDF[expert]).mul_(a_RF).sum(1)
            if b2_ED is not None:
                dgate_R += dz_RD @ b2_ED[expert]
            dgate_S.index_copy_(0, slots_R.long(), dgate_R)
        if gate_S is not None:
            dz_RD = dz_RD * gate_S.index_select(0, slots_R).unsqueeze(1)
        if need_w2:
            torch.mm(dz_RD.T, a_RF, out=dw2_EDF[expert])
        if db2_ED.numel():
            torch.sum(dz_RD, 0, out=db2_ED[expert])
        if not (need_x or need_w1 or need_b1):
            continue
        dh_RF = activate_backward(activation, dz_RD @ w2_EDF[expert], h_RF)
        if need_w1:
            torch.mm(dh_RF.T, x_TD.index_select(0, tokens_R), out=dw1_EFD[expert])
        if db1_EF.numel():
            torch.sum(dh_RF, 0, out=db1_EF[expert])
        if need_x:
            dx_SD.index_copy_(0, slots_R.long(), dh_RF @ w1_EFD[expert])

    dx_TD = dx_SD.view(-1, top_k, dx_SD.shape[1]).sum(1) if need_x and top_k > 1 else dx_SD
    dgate_TK = dgate_S.view(-1, top_k) if need_gate else dgate_S
    return dx_TD, dw1_EFD, db1_EF, dw2_EDF, db2_ED, dgate_TK


def expert_norm_forward(
    z_SD: Tensor,
    residual_TD: Tensor,
    expert_ids_TK: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    ln_w_ED: Tensor,
    ln_b_ED: Tensor,
    gate_TK: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.expert_norm`."""
    top_k = expert_ids_TK.shape[1]
    xhat_TKD, mean_S, rstd_S = _normalised(z_SD, residual_TD, top_k, seed, eps, dropout_p)
    expert_TK = expert_ids_TK.clamp(min=0)
    out_TKD = xhat_TKD * ln_w_ED[expert_TK] + ln_b_ED[expert_TK]
    y_TD = (out_TKD * _gate_of_routed(gate_TK, expert_ids_TK, xhat_TKD.dtype).unsqueeze(2)).sum(1)
    routed_T1 = (expert_ids_TK >= 0).any(1, keepdim=True)
    return torch.where(routed_T1, y_TD.to(residual_TD.dtype), residual_TD), mean_S, rstd_S


def expert_norm_backward(
    dy_TD: Tensor,
    z_SD: Tensor,
    residual_TD: Tensor,
    mean_S: Tensor,
    rstd_S: Tensor,
    expert_ids_TK: Tensor,
    order_S: Tensor,
    offsets_E1: Tensor,
    ln_w_ED: Tensor,
    ln_b_ED: Tensor,
    gate_TK: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    need_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.expert_norm_backward`."""
    top_k = expert_ids_TK.shape[1]
    u_TKD, keep_TKD = _residual_sum(z_SD, residual_TD, top_k, seed, dropout_p)
    xhat_TKD = (u_TKD - mean_S.view(-1, top_k, 1)) * rstd_S.view(-1, top_k, 1)
    expert_TK = expert_ids_TK.clamp(min=0)
    w_TKD = ln_w_ED[expert_TK].to(xhat_TKD.dtype)
    dy_T1D = dy_TD.to(xhat_TKD.dtype).unsqueeze(1)

    dgate_TK = xhat_TKD.new_empty(0)
    if need_gate:
        dgate_TK = ((xhat_TKD * w_TKD + ln_b_ED[expert_TK]) * dy_T1D).sum(2) * (expert_ids_TK >= 0)

    do_TKD = dy_T1D * _gate_of_routed(gate_TK, expert_ids_TK, xhat_TKD.dtype).unsqueeze(2)
    dln_w_ED, dln_b_ED = torch.zeros_like(ln_w_ED), torch.zeros_like(ln_b_ED)
    do_SD, do_xhat_SD = do_TKD.flatten(0, 1), (do_TKD * xhat_TKD).flatten(0, 1)
    for expert, begin, end in _experts_with_rows(offsets_E1):
        slots_R = order_S[begin:end]
        dln_w_ED[expert] = do_xhat_SD.index_select(0, slots_R).sum(0)
        dln_b_ED[expert] = do_SD.index_select(0, slots_R).sum(0)

    dxhat_TKD = do_TKD * w_TKD
    du_TKD = rstd_S.view(-1, top_k, 1) * (
        dxhat_TKD - dxhat_TKD.mean(2, keepdim=True) - xhat_TKD * (dxhat_TKD * xhat_TKD).mean(2, keepdim=True)
    )
    routed_T1 = (expert_ids_TK >= 0).any(1, keepdim=True)
    dresidual_TD = torch.where(routed_T1, du_TKD.sum(1).to(residual_TD.dtype), dy_TD.to(residual_TD.dtype))
    dz_TKD = du_TKD if keep_TKD is None else du_TKD * keep_TKD
    return dz_TKD.flatten(0, 1).to(z_SD.dtype), dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK


def _experts_with_rows(offsets_E1: Tensor) -> Iterator[tuple[int, int, int]]:
    offsets = offsets_E1.tolist()
    for expert in range(len(offsets) - 1):
        if offsets[expert + 1] > offsets[expert]:
            yield expert, offsets[expert], offsets[expert + 1]


def _row(bias_EN: Tensor | None, expert: int) -> Tensor | None:
    return None if bias_EN is None else bias_EN[expert]


def _gate_of_slots(gate_TK: Tensor | None, num_slots: int, top_k: int, like: Tensor) -> Tensor | None:
    """The factor of each slot; None where it is 1 throughout."""
    if gate_TK is not None:
        return gate_TK.reshape(-1).to(like.dtype)
    return None if top_k == 1 else like.new_full((num_slots,), 1 / top_k)


def _gate_of_routed(gate_TK: Tensor | None, expert_ids_TK: Tensor, dtype: torch.dtype) -> Tensor:
    routed_TK = (expert_ids_TK >= 0).to(dtype)
    return routed_TK / expert_ids_TK.shape[1] if gate_TK is None else routed_TK * gate_TK


def _residual_sum(
    z_SD: Tensor, residual_TD: Tensor, top_k: int, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor | None]:
    """dropout(z) + residual in float32 or wider, and the dropout's factors."""
    dtype = torch.promote_types(residual_TD.dtype, torch.float32)
    z_TKD = z_SD.to(dtype).view(-1, top_k, z_SD.shape[1])
    if seed is None:
        return z_TKD + residual_TD.unsqueeze(1), None
    generator = torch.Generator(z_SD.device).manual_seed(int(seed))
    keep_TKD = torch.rand(z_TKD.shape, generator=generator, device=z_SD.device) >= dropout_p
    keep_TKD = keep_TKD.to(dtype) / (1 - dropout_p)
    return z_TKD * keep_TKD + residual_TD.unsqueeze(1), keep_TKD


def _normalised(
    z_SD: Tensor, residual_TD: Tensor, top_k: int, seed: Tensor | None, eps: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    u_TKD, _ = _residual_sum(z_SD, residual_TD, top_k, seed, dropout_p)
    xhat_TKD, mean, rstd = torch.native_layer_norm(u_TKD, u_TKD.shape[2:], None, None, eps)
    return xhat_TKD, mean.reshape(-1), rstd.reshape(-1)
