"""The experts' rows on the CPU: sorted into buffers, through torch's GEMMs and the row kernels of csrc/.

Rows are gathered into expert order once, go through both GEMMs there, and leave it once. Two things are
bounded besides: the number of calls, since with few rows one batched GEMM over all experts costs little more
than a single expert's, and the number of different row counts, since oneDNN, torch's 16-bit GEMM, builds code
for each it meets, which costs as much as hundreds of rows.

Notation: P rows of a sorted buffer, the padding of each expert included; S slots, E experts, R rows of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebert_kernels import native
from moebert_kernels.activations import ACTIVATIONS
from moebert_kernels.arguments import Call, Gradients
from moebert_kernels.native import address

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # Dtype in csrc/rows_cpu.h
_ACTIVATIONS = {name: code for code, name in enumerate(ACTIVATIONS)}  # Activation there

# Filling every expert up to the same number of rows, for one batched GEMM instead of E, pays as long as the
# rows added are no more than this, and take no more multiply-adds than this in one GEMM.
_MOST_FILL = 128
_MAX_BATCH_FILL = 16_000_000
# Where nothing is kept for backward, one expert's rows after the other's go through the layer, at most so
# many together: their temporaries stay in cache, and the GEMMs are still long enough to forget that each
# packs its weights anew. One of the counts of `bounded_rows`, so that only an expert's last rows are filled.
_ROWS_AT_ONCE = 2048


class SortedRows(NamedTuple):
    """Where the experts' rows lie in a sorted buffer.

    Attributes:
        kernels: the extension.
        native: the same for the row kernels.
        order_S: of the plan, which `native` points to.
        num_experts: E.
        batch: R where all experts have the same; 0 where they do not.
        sizes: each expert's rows, padding included; empty where `batch` says all.
        pieces: parts of these that go through the layer one after another, in order: for the row kernels, as
            if they began at row 0; expert; rows. Empty where all rows go together.
    """

    kernels: Any
    native: Any
    order_S: Tensor
    num_experts: int
    batch: int
    sizes: list[int]
    pieces: list[tuple[Any, int, int]]

    def empty(self, like: Tensor, columns: int) -> Tensor:
        """A buffer of P rows: [E, R, columns] where R is the same for all, or [P, columns]."""
        if self.batch:
            return like.new_empty(self.num_experts, self.batch, columns)
        return like.new_empty(self.native.total, columns)

    def view(self, buffer: Tensor) -> Tensor:
        """The first P rows of a [more, columns] buffer, in the shape of `empty`; such a buffer as it is."""
        if buffer.dim() == 3:
            return buffer
        columns = buffer.shape[1]
        rows_PN = buffer[: self.native.total]
        return rows_PN.view(self.num_experts, self.batch, columns) if self.batch else rows_PN


def most_rows(num_slots: int) -> int:
    """A bound on P that depends on S alone."""
    return num_slots + num_slots // 32 + _MOST_FILL


def sort_rows(call: Call, *, in_pieces: bool) -> SortedRows:
    """Lay out the rows of a plan; `in_pieces` allows pieces, where many rows need not stay together."""
    kernels: Any = native.row_kernels()
    order_S, offsets_E1 = call.order_S.contiguous(), call.offsets_E1.contiguous()
    E, F, D = call.w1_EFD.shape
    order = address(order_S)
    # float32 GEMMs are MKL's, which does not mind new row counts.
    bounded = call.w1_EFD.dtype != torch.float32
    max_fill = min(_MOST_FILL, _MAX_BATCH_FILL // (F * D))
    laid_out = kernels.SortedRows(address(offsets_E1), E, order, bounded, max_fill)
    if laid_out.routed > order_S.shape[0]:
        raise ValueError(
            f"the plan's offsets_E1 end at {laid_out.routed}, but order_S has {order_S.shape[0]} slots"
        )
    sizes: list[int] = []
    pieces: list[tuple[Any, int, int]] = []
    batch = laid_out.batch
    if not batch:
        segments = laid_out.segments()
        sizes = [padded for _, _, _, padded in segments]
        if in_pieces:
            for expert, (begin, count, _, padded) in enumerate(segments):
                for row in range(0, padded, _ROWS_AT_ONCE):
                    fill = min(_ROWS_AT_ONCE, padded - row)
                    place = (begin + row, min(fill, count - row), fill)
                    pieces.append((kernels.SortedRows.piece(expert, *place, order), expert, fill))
    return SortedRows(kernels, laid_out, order_S, E, batch, sizes, pieces)


def forward(rows: SortedRows, call: Call, x_TD: Tensor, preact_PF: Tensor | None) -> Tensor:
    """gather -> W1 -> +b1 -> act -> W2.

    Args:
        x_TD: the call's, contiguous.
        preact_PF: a buffer that gets the pre-activations, without b1; None where nobody wants them.

    Returns:
        z of the sorted rows, without b2.
    """
    kernels, dtype, threads, top_k = rows.kernels, DTYPES[x_TD.dtype], torch.get_num_threads(), call.top_k
    code, (_, F, D) = _ACTIVATIONS[call.activation], call.w1_EFD.shape
    b1_EF, w1_EDF, w2_EFD = contiguous(call.b1_EF), call.w1_EFD.mT, call.w2_EDF.mT
    z_PD = rows.empty(x_TD, D)  # of x first
    x, b1 = address(x_TD), address(b1_EF)
    if not rows.pieces:
        a_PF = rows.empty(x_TD, F)
        h_PF = a_PF if preact_PF is None else preact_PF
        kernels.gather_rows(rows.native, dtype, x, address(z_PD), 0, D, top_k, threads)
        _multiply(rows, z_PD, w1_EDF, h_PF)
        kernels.activate_rows(rows.native, dtype, code, address(h_PF), b1, address(a_PF), F, threads)
        _multiply(rows, a_PF, w2_EFD, z_PD)
        return z_PD
    sizes = [size for _, _, size in rows.pieces]
    a_RF = x_TD.new_empty(max(sizes), F)
    a, w1_DF, w2_FD = address(a_RF), w1_EDF.unbind(), w2_EFD.unbind()
    for (piece, expert, size), x_RD in zip(rows.pieces, z_PD.split(sizes), strict=True):
        h_RF = a_RF[:size]
        kernels.gather_rows(piece, dtype, x, address(x_RD), 0, D, top_k, threads)
        torch.mm(x_RD, w1_DF[expert], out=h_RF)
        kernels.activate_rows(piece, dtype, code, a, b1, a, F, threads)
        torch.mm(h_RF, w2_FD[expert], out=x_RD)
    return z_PD


def backward(
    rows: SortedRows, call: Call, dz_PD: Tensor, preact_PF: Tensor, needs: Gradients
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `forward`, each where `needs` says so: of the sorted rows of x, of w1, b1 and w2.

    `dz_PD`, whose padding must be 0, is overwritten.
    """
    x_TD, w1_EFD, b1_EF, w2_EDF = call.x_TD.contiguous(), call.w1_EFD, contiguous(call.b1_EF), call.w2_EDF
    kernels, dtype, threads = rows.kernels, DTYPES[x_TD.dtype], torch.get_num_threads()
    need_x, need_w1, need_b1, need_w2, *_ = needs
    code, (_, F, D) = _ACTIVATIONS[call.activation], w1_EFD.shape
    native, dz = rows.native, address(dz_PD)
    a_PF, dh_PF = rows.empty(x_TD, F), rows.empty(x_TD, F)
    dw1_EFD = w1_EFD.new_empty(w1_EFD.shape) if need_w1 else None
    dw2_EDF = w2_EDF.new_empty(w2_EDF.shape) if need_w2 else None
    db1_EF = b1_EF.new_empty(b1_EF.shape) if need_b1 and b1_EF is not None else None
    if need_x or need_w1 or need_b1:
        _multiply(rows, dz_PD, w2_EDF, dh_PF)
    h, a, dh = address(preact_PF), address(a_PF), address(dh_PF)
    kernels.activate_backward_rows(native, dtype, code, h, address(b1_EF), a, dh, address(db1_EF), F, threads)
    if dw2_EDF is not None:
        _multiply_transposed(rows, dz_PD, a_PF, dw2_EDF)
    if dw1_EFD is not None:
        kernels.gather_rows(native, dtype, address(x_TD), dz, 0, D, call.top_k, threads)
        _multiply_transposed(rows, dh_PF, dz_PD, dw1_EFD)
    if need_x:
        _multiply(rows, dh_PF, w1_EFD, dz_PD)
    return dz_PD if need_x else None, dw1_EFD, db1_EF, dw2_EDF


def _multiply(rows: SortedRows, a: Tensor, w_ENM: Tensor, out: Tensor) -> None:
    """out[rows of e] = a[rows of e] @ w[e], buffers in the shape of `SortedRows.empty`."""
    if rows.batch:
        torch.bmm(a, w_ENM, out=out)
        return
    parts = zip(a.split(rows.sizes), w_ENM.unbind(), out.split(rows.sizes), strict=True)
    for a_RN, w_NM, out_RM in parts:
        if a_RN.shape[0]:
            torch.mm(a_RN, w_NM, out=out_RM)


def _multiply_transposed(rows: SortedRows, a: Tensor, b: Tensor, out_EMN: Tensor) -> None:
    """out[e] = a[rows of e]^T @ b[rows of e], buffers in the shape of `SortedRows.empty`."""
    if rows.batch:
        torch.bmm(a.transpose(1, 2), b, out=out_EMN)
        return
    parts = zip(a.t().split(rows.sizes, 1), b.split(rows.sizes), out_EMN.unbind(), strict=True)
    for a_MR, b_RN, out_MN in parts:
        if b_RN.shape[0]:
            torch.mm(a_MR, b_RN, out=out_MN)
        else:
            out_MN.zero_()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its elements in order; None for None."""
    return None if tensor is None else tensor.contiguous()
