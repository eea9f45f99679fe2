"""The experts' rows on the CPU: sorted into buffers, through torch's GEMMs and the row kernels of csrc/.

Rows are gathered into expert order once, go through both GEMMs there, and leave it once. Two things are
bounded besides: the number of calls, since with few rows one batched GEMM over all experts costs little more
than a single expert's, and the number of different row counts, since oneDNN, torch's 16-bit GEMM, builds code
for each it meets, which costs as much as hundreds of rows.

Neurons that all experts share are one more expert, to which all rows go: one GEMM over the whole buffer.

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
        top_k, num_slots, E, F, D, C: K, S and the weights' sides; C is 0 where experts share no neurons.
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
    C: int
    bounded: bool
    max_fill: int
    norm: tuple[list[int], list[int]]

    @classmethod
    def of(cls, call: Call) -> Sizes:
        """Those of a call that `cpu_native` serves."""
        (E, F, D), (T, K), C = call.w1_EFD.shape, call.expert_ids_TK.shape, call.num_shared
        ln_dtype = call.x_TD.dtype if call.ln_w_ED is None else call.ln_w_ED.dtype
        dtypes = [DTYPES[dtype] for dtype in (call.x_TD.dtype, call.residual.dtype, ln_dtype)]
        bounded = call.x_TD.dtype != torch.float32
        # With shared neurons a row added costs their products too; calls of MKL's for what is left are short,
        # those of oneDNN's are not.
        max_fill = -1 if C and not bounded else min(_MOST_FILL, _MAX_BATCH_FILL // ((C + F) * D))
        code = _ACTIVATIONS[call.activation]
        return cls(dtypes[0], code, K, T * K, E, F, D, C, bounded, max_fill, (dtypes, [T, K, D, E]))


class Piece(NamedTuple):
    """Some rows of one expert: for the row kernels, as if they began at row 0."""

    native: Any
    expert: int
    rows: int


class Group(NamedTuple):
    """Pieces that go through the layer together.

    Attributes:
        begin: its first row in the buffer.
        rows: of all pieces.
        filled: rows of the GEMMs with shared neurons; those beyond `rows` hold anything.
        pieces: in the order of their rows.
    """

    begin: int
    rows: int
    filled: int
    pieces: list[Piece]


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
        total: P, and rows beyond it that fill up the GEMMs with shared neurons.
        groups: parts of these that go through the layer one after another; empty where all rows go together.
    """

    kernels: Any
    native: Any
    sizes: Sizes
    alive: Sequence[Tensor | None]
    at: Any
    threads: int
    batch: int
    counts: list[int]
    total: int
    groups: list[Group]

    def empty(self, columns: int) -> Tensor:
        """A buffer: [E, R, columns] where R is the same for all, or [total, columns]."""
        x_TD: Any = self.alive[0]
        if self.batch:
            return x_TD.new_empty(self.sizes.E, self.batch, columns)
        return x_TD.new_empty(self.total, columns)

    def view(self, buffer: Tensor) -> Tensor:
        """The first rows of a [more, columns] buffer, in the shape of `empty`; such a buffer as it is."""
        if buffer.dim() == 3:
            return buffer
        columns = buffer.shape[1]
        rows_PN = buffer[: self.total]
        return rows_PN.view(self.sizes.E, self.batch, columns) if self.batch else rows_PN

    def of_experts(self, buffer: Tensor) -> Sequence[Tensor]:
        """Each expert's rows of a [total, columns] buffer."""
        return buffer[: self.native.total].split(self.counts)

    def as_one(self) -> Any:
        """The same for the row kernels, where all are one expert's."""
        return self.kernels.SortedRows.piece(0, 0, self.native.total, self.total, self.at.order_S)

    def fill_with_zeros(self, buffer: Tensor) -> None:
        """Those rows that fill up the GEMMs with shared neurons, of a buffer in the shape of `empty`."""
        if self.total > self.native.total:
            buffer[self.native.total :] = 0


def most_rows(num_slots: int, num_shared: int) -> int:
    """A bound on `SortedRows.total` that depends on S and C alone."""
    filled = num_slots + num_slots // 32 + _MOST_FILL
    return filled + filled // 32 if num_shared else filled


def sort_rows(call: Call, kept: dict[Any, Any], *, in_pieces: bool) -> SortedRows:
    """Lay out the rows of a plan; `in_pieces` allows pieces, where many rows need not stay together."""
    kernels: Any = native.row_kernels()
    sizes = kept.get(Sizes)
    if sizes is None:
        sizes = kept[Sizes] = Sizes.of(call)
    gate_TK = None if call.gate_TK is None else call.gate_TK.float()
    plan, of_norm = call[1:5], (gate_TK, call.ln_w_ED, call.ln_b_ED, call.residual_TD, call.seed)
    of_experts, of_shared = (None, call.b1_EF, None, call.b2_ED), (None, call.shared_b1_C, None)
    alive, addresses = addresses_of((call.x_TD, *plan, *of_experts, *of_norm, *of_shared))
    at: Any = Call._make((*addresses, *call[NUM_TENSORS:]))
    laid_out = kernels.SortedRows(at.offsets_E1, sizes.E, at.order_S, sizes.bounded, sizes.max_fill)
    if laid_out.routed > sizes.num_slots:
        raise ValueError(
            f"the plan's offsets_E1 end at {laid_out.routed}, but order_S has {sizes.num_slots} slots"
        )
    counts: list[int] = []
    groups: list[Group] = []
    batch, total = laid_out.batch, laid_out.total
    if not batch:
        segments = laid_out.segments()
        counts = [padded for _, _, _, padded in segments]
        if in_pieces and not (sizes.C and total <= _ROWS_AT_ONCE):  # one group: its pieces go together, too
            groups = _grouped(kernels, sizes, segments, at.order_S)
            total = max((group.begin + group.filled for group in groups), default=0)
        elif sizes.C and sizes.bounded:
            total = kernels.bounded_rows(total)
    threads = torch.get_num_threads()
    return SortedRows(kernels, laid_out, sizes, alive, at, threads, batch, counts, total, groups)


def _grouped(
    kernels: Any, sizes: Sizes, segments: Sequence[tuple[int, int, int, int]], order_S: int
) -> list[Group]:
    """Pieces of one expert's rows each, in groups of at most `_ROWS_AT_ONCE`."""
    groups: list[Group] = []
    for expert, (begin, count, start, padded) in enumerate(segments):
        for row in range(0, padded, _ROWS_AT_ONCE):
            fill = min(_ROWS_AT_ONCE, padded - row)
            native = kernels.SortedRows.piece(expert, begin + row, min(fill, count - row), fill, order_S)
            if not groups or groups[-1].rows + fill > _ROWS_AT_ONCE:
                groups.append(Group(start + row, 0, 0, []))
            first, rows, _, pieces = groups[-1]
            rows += fill
            filled = kernels.bounded_rows(rows) if sizes.C and sizes.bounded else rows
            groups[-1] = Group(first, rows, filled, [*pieces, Piece(native, expert, fill)])
    return groups


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
        flat_PD = z_PD.view(-1, D)
        h_PC = flat_PD @ call.shared_w1_CD.t()
        a_PC = torch.empty_like(h_PC) if training else h_PC
        where = (h_PC.data_ptr(), at.shared_b1_C, a_PC.data_ptr())
        kernels.activate_rows(rows.as_one(), dtype, code, *where, C, threads)
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
