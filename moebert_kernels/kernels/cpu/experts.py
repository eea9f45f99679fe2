"""The experts on the CPU: sorted rows through torch's GEMMs and the row kernels of csrc/.

Rows are gathered into expert order once, go through both GEMMs there, and leave it once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moebert_kernels.addresses import address
from moebert_kernels.kernels.call import Call, Gradients
from moebert_kernels.kernels.cpu.rows import SortedRows


def forward(rows: SortedRows, call: Call, training: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """gather -> W1 -> +b1 -> act -> W2.

    Returns:
        z of the sorted rows, without b2, and in training the pre-activations, without b1: of experts' own
        neurons and of those that they share.
    """
    kernels, at, threads = rows.kernels, rows.at, rows.threads
    dtype, code, top_k, _, _, F, D, C, *_ = rows.sizes
    z_PD = rows.empty(D)  # of x first
    if rows.groups:
        return _forward_in_groups(rows, call, z_PD), None, None
    kernels.gather_rows(rows.native, dtype, at.x_TD, z_PD.data_ptr(), 0, D, top_k, threads)
    h_PF = _multiply(rows, z_PD, call.w1_EFD.mT)
    a_PF = torch.empty_like(h_PF) if training else h_PF
    h, a = h_PF.data_ptr(), a_PF.data_ptr()
    kernels.activate_rows(rows.native, dtype, code, h, at.b1_EF, a, F, threads)
    h_PC = None
    if call.shared_w1_CD is not None and call.shared_w2_DC is not None:
        rows.fill_with_zeros(z_PD)
        flat_PD = rows.tokens if rows.is_apart else z_PD.view(-1, D)
        h_PC = flat_PD @ call.shared_w1_CD.t()
        a_PC = torch.empty_like(h_PC) if training else h_PC
        where = (h_PC.data_ptr(), at.shared_b1_C, a_PC.data_ptr())
        kernels.activate_rows(rows.as_one(), dtype, code, *where, C, threads)
        if rows.is_apart:
            y_TD = a_PC @ call.shared_w2_DC.t()
            kernels.gather_rows(rows.native, dtype, y_TD.data_ptr(), z_PD.data_ptr(), 0, D, top_k, threads)
        else:
            torch.mm(a_PC, call.shared_w2_DC.t(), out=flat_PD)
    _multiply(rows, a_PF, call.w2_EDF.mT, z_PD, add=h_PC is not None)
    return z_PD, h_PF if training else None, h_PC if training else None


def _forward_in_groups(rows: SortedRows, call: Call, z_PD: Tensor) -> Tensor:
    """The same into z_PD, with nothing kept."""
    kernels, at, threads = rows.kernels, rows.at, rows.threads
    dtype, code, top_k, _, _, F, D, C, *_ = rows.sizes
    w1_DF, w2_FD = call.w1_EFD.mT.unbind(), call.w2_EDF.mT.unbind()
    a_RF = z_PD.new_empty(max(group.rows for group in rows.groups), F)
    a_RC = z_PD.new_empty(max(group.filled for group in rows.groups), C)
    for begin, num_rows, filled, pieces in rows.groups:
        sizes = [piece.rows for piece in pieces]
        xs_RD, hs_RF = z_PD[begin : begin + num_rows].split(sizes), a_RF[:num_rows].split(sizes)
        for (piece, expert, _), x_RD, h_RF in zip(pieces, xs_RD, hs_RF, strict=True):
            a = h_RF.data_ptr()
            kernels.gather_rows(piece, dtype, at.x_TD, x_RD.data_ptr(), 0, D, top_k, threads)
            torch.mm(x_RD, w1_DF[expert], out=h_RF)
            kernels.activate_rows(piece, dtype, code, a, at.b1_EF, a, F, threads)
        if call.shared_w1_CD is not None and call.shared_w2_DC is not None:
            x_RD, h_RC = z_PD[begin : begin + filled], a_RC[:filled]
            torch.mm(x_RD, call.shared_w1_CD.t(), out=h_RC)
            as_one, a = kernels.SortedRows.piece(0, 0, num_rows, filled, at.order_S), h_RC.data_ptr()
            kernels.activate_rows(as_one, dtype, code, a, at.shared_b1_C, a, C, threads)
            torch.mm(h_RC, call.shared_w2_DC.t(), out=x_RD)
            for (_, expert, _), x_RD, h_RF in zip(pieces, xs_RD, hs_RF, strict=True):
                x_RD.addmm_(h_RF, w2_FD[expert])
        else:
            for (_, expert, _), x_RD, h_RF in zip(pieces, xs_RD, hs_RF, strict=True):
                torch.mm(h_RF, w2_FD[expert], out=x_RD)
    return z_PD


def backward(
    rows: SortedRows,
    call: Call,
    dz_PD: Tensor,
    preact_PF: Tensor,
    preact_PC: Tensor | None,
    needs: Gradients,
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`, each where `needs` says so: of the sorted rows of x, w1, b1, w2; shared.

    `dz_PD`, whose padding must be 0, is overwritten.
    """
    kernels, at, threads, w1_EFD, w2_EDF = rows.kernels, rows.at, rows.threads, call.w1_EFD, call.w2_EDF
    dtype, code, top_k, _, _, F, D, *_ = rows.sizes
    need_x, need_w1, need_b1, need_w2, *_ = needs
    native, dz, b1_EF = rows.native, dz_PD.data_ptr(), call.b1_EF
    of_shared = None if preact_PC is None else _shared_backward(rows, call, dz_PD, preact_PC, needs)
    a_PF = rows.empty(F)
    dw1_EFD = dense_like(w1_EFD) if need_w1 else None
    dw2_EDF = dense_like(w2_EDF) if need_w2 else None
    db1_EF = dense_like(b1_EF) if need_b1 and b1_EF is not None else None
    dh_PF = _multiply(rows, dz_PD, w2_EDF) if need_x or need_w1 or need_b1 else torch.empty_like(a_PF)
    where = (preact_PF.data_ptr(), at.b1_EF, a_PF.data_ptr(), dh_PF.data_ptr(), address(db1_EF))
    kernels.activate_backward_rows(native, dtype, code, *where, F, threads)
    if dw2_EDF is not None:
        _multiply_transposed(rows, dz_PD, a_PF, dw2_EDF)
    if dw1_EFD is not None or (of_shared is not None and of_shared.dw1_CD is not None):
        kernels.gather_rows(native, dtype, at.x_TD, dz, 0, D, top_k, threads)
        if dw1_EFD is not None:
            _multiply_transposed(rows, dh_PF, dz_PD, dw1_EFD)
        if of_shared is not None and of_shared.dw1_CD is not None:
            torch.mm(of_shared.dh_PC.t(), dz_PD.view(-1, D), out=of_shared.dw1_CD)
    if need_x:
        if of_shared is not None:
            torch.mm(of_shared.dh_PC, call.shared_w1_CD, out=dz_PD.view(-1, D))  # type: ignore[arg-type]
        _multiply(rows, dh_PF, w1_EFD, dz_PD, add=of_shared is not None)
    shared = (None, None, None) if of_shared is None else of_shared[1:]
    return dz_PD if need_x else None, dw1_EFD, db1_EF, dw2_EDF, *shared


class _SharedGradients(NamedTuple):
    """Of shared neurons; of dw1_CD the memory, for when x is at hand."""

    dh_PC: Tensor
    dw1_CD: Tensor | None
    db1_C: Tensor | None
    dw2_DC: Tensor | None


def _shared_backward(
    rows: SortedRows, call: Call, dz_PD: Tensor, preact_PC: Tensor, needs: Gradients
) -> _SharedGradients:
    w1_CD, b1_C, w2_DC = call.shared_w1_CD, call.shared_b1_C, call.shared_w2_DC
    assert w1_CD is not None
    assert w2_DC is not None
    rows.fill_with_zeros(dz_PD)
    dz_PD = dz_PD.view(-1, dz_PD.shape[-1])
    dh_PC, a_PC = dz_PD @ w2_DC, torch.empty_like(preact_PC)
    db1_C = dense_like(b1_C) if needs.shared_b1_C and b1_C is not None else None
    places = (preact_PC.data_ptr(), rows.at.shared_b1_C, a_PC.data_ptr(), dh_PC.data_ptr(), address(db1_C))
    dtype, code, *_ = rows.sizes
    rows.kernels.activate_backward_rows(rows.as_one(), dtype, code, *places, a_PC.shape[1], rows.threads)
    return _SharedGradients(
        dh_PC,
        dense_like(w1_CD) if needs.shared_w1_CD else None,
        db1_C,
        dz_PD.t() @ a_PC if needs.shared_w2_DC else None,
    )


def _multiply(
    rows: SortedRows, a: Tensor, w_ENM: Tensor, out: Tensor | None = None, *, add: bool = False
) -> Tensor:
    """out[rows of e] = a[rows of e] @ w[e], or += with `add`; buffers in the shape of `SortedRows.empty`."""
    if rows.batch:
        if out is None:
            return torch.bmm(a, w_ENM)
        return out.baddbmm_(a, w_ENM) if add else torch.bmm(a, w_ENM, out=out)
    out = rows.empty(w_ENM.shape[2]) if out is None else out
    parts = zip(rows.of_experts(a), w_ENM.unbind(), rows.of_experts(out), strict=True)
    for a_RN, w_NM, out_RM in parts:
        if a_RN.shape[0]:
            if add:
                out_RM.addmm_(a_RN, w_NM)
            else:
                torch.mm(a_RN, w_NM, out=out_RM)
    return out


def _multiply_transposed(rows: SortedRows, a: Tensor, b: Tensor, out_EMN: Tensor) -> None:
    """out[e] = a[rows of e]^T @ b[rows of e], buffers in the shape of `SortedRows.empty`."""
    if rows.batch:
        torch.bmm(a.transpose(1, 2), b, out=out_EMN)
        return
    parts = zip(rows.of_experts(a), rows.of_experts(b), out_EMN.unbind(), strict=True)
    for a_RM, b_RN, out_MN in parts:
        if b_RN.shape[0]:
            torch.mm(a_RM.t(), b_RN, out=out_MN)
        else:
            out_MN.zero_()


def dense_like(tensor: Tensor) -> Tensor:
    """A tensor of its shape and dtype, not filled, with its elements in order."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
