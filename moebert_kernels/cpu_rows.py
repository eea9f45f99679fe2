"""The experts' rows on the CPU: sorted into buffers, through torch's GEMMs and the row kernels of csrc/.

Rows are gathered into expert order once, go through both GEMMs there, and leave it once. Two things are
bounded besides: the number of calls, since with few rows one batched GEMM over all experts costs little more
than a single expert's, and the number of different row counts, since oneDNN, torch's 16-bit GEMM, builds code
for each it meets, which costs as much as hundreds of rows.

Notation: P rows of a sorted buffer, the padding of each expert included; S slots, E experts, R rows of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebert_kernels import native
from moebert_kernels.activations import ACTIVATIONS
from moebert_kernels.arguments import NUM_TENSORS, Call, Gradients
from moebert_kernels.native import address, addresses_of

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


class Sizes(NamedTuple):
    """What the row kernels are told of all calls of the same form.

    Attributes:
        dtype, activation: numbers that csrc/ knows.
        top_k, num_slots, E, F, D: K, S and the weights' sides.
        bounded: whether the number of different row counts is; float32 GEMMs are MKL's, which does not mind.
        max_fill: see `_MOST_FILL`.
        norm: dtypes and sizes that the norm takes.
    """

    dtype: int
    activation: int
    top_k: int
    num_slots: int
    E: int
    F: int
    D: int
    bounded: bool
    max_fill: int
    norm: tuple[list[int], list[int]]

    @classmethod
    def of(cls, call: Call) -> Sizes:
        """Those of a call that `cpu_native` serves."""
        (E, F, D), (T, K) = call.w1_EFD.shape, call.expert_ids_TK.shape
        ln_dtype = call.x_TD.dtype if call.ln_w_ED is None else call.ln_w_ED.dtype
        dtypes = [DTYPES[dtype] for dtype in (call.x_TD.dtype, call.residual.dtype, ln_dtype)]
        bounded = call.x_TD.dtype != torch.float32
        max_fill = min(_MOST_FILL, _MAX_BATCH_FILL // (F * D))
        code = _ACTIVATIONS[call.activation]
        return cls(dtypes[0], code, K, T * K, E, F, D, bounded, max_fill, (dtypes, [T, K, D, E]))


class SortedRows(NamedTuple):
    """Where the experts' rows lie in a sorted buffer.

    Attributes:
        kernels: the extension.
        native: the same for the row kernels.
        sizes: of the call.
        alive: tensors that the row kernels point to.
        at: a `Call` of addresses; 0 for None and for the weights, which row kernels do not read.
        threads: how many may work.
        batch: R where all experts have the same; 0 where they do not.
        counts: each expert's rows, padding included; empty where `batch` says all.
        pieces: parts of these that go through the layer one after another, in order: for the row kernels, as
            if they began at row 0; expert; rows. Empty where all rows go together.
    """

    kernels: Any
    native: Any
    sizes: Sizes
    alive: Sequence[Tensor | None]
    at: Any
    threads: int
    batch: int
    counts: list[int]
    pieces: list[tuple[Any, int, int]]

    def empty(self, columns: int) -> Tensor:
        """A buffer of P rows: [E, R, columns] where R is the same for all, or [P, columns]."""
        x_TD: Any = self.alive[0]
        if self.batch:
            return x_TD.new_empty(self.sizes.E, self.batch, columns)
        return x_TD.new_empty(self.native.total, columns)

    def view(self, buffer: Tensor) -> Tensor:
        """The first P rows of a [more, columns] buffer, in the shape of `empty`; such a buffer as it is."""
        if buffer.dim() == 3:
            return buffer
        columns = buffer.shape[1]
        rows_PN = buffer[: self.native.total]
        return rows_PN.view(self.sizes.E, self.batch, columns) if self.batch else rows_PN


def most_rows(num_slots: int) -> int:
    """A bound on P that depends on S alone."""
    return num_slots + num_slots // 32 + _MOST_FILL


def sort_rows(call: Call, kept: dict[Any, Any], *, in_pieces: bool) -> SortedRows:
    """Lay out the rows of a plan; `in_pieces` allows pieces, where many rows need not stay together."""
    kernels: Any = native.row_kernels()
    sizes = kept.get(Sizes)
    if sizes is None:
        sizes = kept[Sizes] = Sizes.of(call)
    gate_TK = None if call.gate_TK is None else call.gate_TK.float()
    plan, of_norm = call[1:5], (gate_TK, call.ln_w_ED, call.ln_b_ED, call.residual_TD, call.seed)
    alive, addresses = addresses_of((call.x_TD, *plan, None, call.b1_EF, None, call.b2_ED, *of_norm))
    at: Any = Call._make((*addresses, *call[NUM_TENSORS:]))
    laid_out = kernels.SortedRows(at.offsets_E1, sizes.E, at.order_S, sizes.bounded, sizes.max_fill)
    if laid_out.routed > sizes.num_slots:
        raise ValueError(
            f"the plan's offsets_E1 end at {laid_out.routed}, but order_S has {sizes.num_slots} slots"
        )
    counts: list[int] = []
    pieces: list[tuple[Any, int, int]] = []
    batch = laid_out.batch
    if not batch:
        segments = laid_out.segments()
        counts = [padded for _, _, _, padded in segments]
        if in_pieces:
            for expert, (begin, count, _, padded) in enumerate(segments):
                for row in range(0, padded, _ROWS_AT_ONCE):
                    fill = min(_ROWS_AT_ONCE, padded - row)
                    place = (begin + row, min(fill, count - row), fill)
                    pieces.append((kernels.SortedRows.piece(expert, *place, at.order_S), expert, fill))
    return SortedRows(kernels, laid_out, sizes, alive, at, torch.get_num_threads(), batch, counts, pieces)


def forward(rows: SortedRows, call: Call, training: bool) -> tuple[Tensor, Tensor | None]:
    """gather -> W1 -> +b1 -> act -> W2.

    Returns:
        z of the sorted rows, without b2, and in training the pre-activations, without b1.
    """
    kernels, at, threads = rows.kernels, rows.at, rows.threads
    dtype, code, top_k, _, _, F, D, *_ = rows.sizes
    w1_EDF, w2_EFD = call.w1_EFD.mT, call.w2_EDF.mT
    z_PD = rows.empty(D)  # of x first
    if not rows.pieces:
        kernels.gather_rows(rows.native, dtype, at.x_TD, z_PD.data_ptr(), 0, D, top_k, threads)
        h_PF = _multiply(rows, z_PD, w1_EDF)
        a_PF = torch.empty_like(h_PF) if training else h_PF
        h, a = h_PF.data_ptr(), a_PF.data_ptr()
        kernels.activate_rows(rows.native, dtype, code, h, at.b1_EF, a, F, threads)
        return _multiply(rows, a_PF, w2_EFD, z_PD), h_PF if training else None
    fills = [fill for _, _, fill in rows.pieces]
    a_RF = z_PD.new_empty(max(fills), F)
    a, w1_DF, w2_FD = a_RF.data_ptr(), w1_EDF.unbind(), w2_EFD.unbind()
    for (piece, expert, fill), x_RD in zip(rows.pieces, z_PD.split(fills), strict=True):
        h_RF = a_RF[:fill]
        kernels.gather_rows(piece, dtype, at.x_TD, x_RD.data_ptr(), 0, D, top_k, threads)
        torch.mm(x_RD, w1_DF[expert], out=h_RF)
        kernels.activate_rows(piece, dtype, code, a, at.b1_EF, a, F, threads)
        torch.mm(h_RF, w2_FD[expert], out=x_RD)
    return z_PD, None


def backward(
    rows: SortedRows, call: Call, dz_PD: Tensor, preact_PF: Tensor, needs: Gradients
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `forward`, each where `needs` says so: of the sorted rows of x, of w1, b1 and w2.

    `dz_PD`, whose padding must be 0, is overwritten.
    """
    kernels, at, threads, w1_EFD, w2_EDF = rows.kernels, rows.at, rows.threads, call.w1_EFD, call.w2_EDF
    dtype, code, top_k, _, _, F, D, *_ = rows.sizes
    need_x, need_w1, need_b1, need_w2, *_ = needs
    native, dz, b1_EF = rows.native, dz_PD.data_ptr(), call.b1_EF
    a_PF = rows.empty(F)
    dw1_EFD = dense_like(w1_EFD) if need_w1 else None
    dw2_EDF = dense_like(w2_EDF) if need_w2 else None
    db1_EF = dense_like(b1_EF) if need_b1 and b1_EF is not None else None
    dh_PF = _multiply(rows, dz_PD, w2_EDF) if need_x or need_w1 or need_b1 else torch.empty_like(a_PF)
    where = (preact_PF.data_ptr(), at.b1_EF, a_PF.data_ptr(), dh_PF.data_ptr(), address(db1_EF))
    kernels.activate_backward_rows(native, dtype, code, *where, F, threads)
    if dw2_EDF is not None:
        _multiply_transposed(rows, dz_PD, a_PF, dw2_EDF)
    if dw1_EFD is not None:
        kernels.gather_rows(native, dtype, at.x_TD, dz, 0, D, top_k, threads)
        _multiply_transposed(rows, dh_PF, dz_PD, dw1_EFD)
    if need_x:
        _multiply(rows, dh_PF, w1_EFD, dz_PD)
    return dz_PD if need_x else None, dw1_EFD, db1_EF, dw2_EDF


def _multiply(rows: SortedRows, a: Tensor, w_ENM: Tensor, out: Tensor | None = None) -> Tensor:
    """out[rows of e] = a[rows of e] @ w[e], buffers in the shape of `SortedRows.empty`."""
    if rows.batch:
        return torch.bmm(a, w_ENM) if out is None else torch.bmm(a, w_ENM, out=out)
    out = rows.empty(w_ENM.shape[2]) if out is None else out
    parts = zip(a.split(rows.counts), w_ENM.unbind(), out.split(rows.counts), strict=True)
    for a_RN, w_NM, out_RM in parts:
        if a_RN.shape[0]:
            torch.mm(a_RN, w_NM, out=out_RM)
    return out


def _multiply_transposed(rows: SortedRows, a: Tensor, b: Tensor, out_EMN: Tensor) -> None:
    """out[e] = a[rows of e]^T @ b[rows of e], buffers in the shape of `SortedRows.empty`."""
    if rows.batch:
        torch.bmm(a.transpose(1, 2), b, out=out_EMN)
        return
    parts = zip(a.t().split(rows.counts, 1), b.split(rows.counts), out_EMN.unbind(), strict=True)
    for a_MR, b_RN, out_MN in parts:
        if b_RN.shape[0]:
            torch.mm(a_MR, b_RN, out=out_MN)
        else:
            out_MN.zero_()


def dense_like(tensor: Tensor) -> Tensor:
    """A tensor of its shape and dtype, not filled, with its elements in order."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)
