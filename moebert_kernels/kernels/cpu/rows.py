"""How the experts' rows are laid out on the CPU: sorted into buffers, each expert's rows filled up.

Two things are bounded: the number of calls, since with few rows one batched GEMM over all experts costs
little more than a single expert's, and the number of different row counts, since oneDNN, torch's 16-bit GEMM,
builds code for each it meets, which costs as much as hundreds of rows.

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
from moebert_kernels.addresses import addresses_of
from moebert_kernels.kernels.call import NUM_TENSORS, Call

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
        max_fill_apart: the same where shared neurons' rows are the tokens as they come, see `is_apart`.
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
    max_fill_apart: int
    norm: tuple[list[int], list[int]]

    @classmethod
    def of(cls, call: Call) -> Sizes:
        """Those of a call that is served."""
        (E, F, D), (T, K), C = call.w1_EFD.shape, call.expert_ids_TK.shape, call.num_shared
        ln_dtype = call.x_TD.dtype if call.ln_w_ED is None else call.ln_w_ED.dtype
        dtypes = [DTYPES[dtype] for dtype in (call.x_TD.dtype, call.residual.dtype, ln_dtype)]
        bounded = call.x_TD.dtype != torch.float32
        # Where rows stay together, a row added costs shared neurons' products too; calls of MKL's for what is
        # left are short, those of oneDNN's are not.
        max_fill = -1 if C and not bounded else min(_MOST_FILL, _MAX_BATCH_FILL // ((C + F) * D))
        max_fill_apart = max_fill if bounded else min(_MOST_FILL, _MAX_BATCH_FILL // (F * D))
        code = _ACTIVATIONS[call.activation]
        fills, norm = (max_fill, max_fill_apart), (dtypes, [T, K, D, E])
        return cls(dtypes[0], code, K, T * K, E, F, D, C, bounded, *fills, norm)


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

    @property
    def tokens(self) -> Tensor:
        """x_TD of the call, contiguous."""
        x_TD = self.alive[0]
        assert x_TD is not None
        return x_TD

    @property
    def is_apart(self) -> bool:
        """Whether shared neurons' rows are the tokens, and not the experts' rows: these have others added."""
        return bool(self.batch and self.sizes.C) and not self.sizes.bounded

    def empty(self, columns: int) -> Tensor:
        """A buffer: [E, R, columns] where R is the same for all, or [total, columns]."""
        if self.batch:
            return self.tokens.new_empty(self.sizes.E, self.batch, columns)
        return self.tokens.new_empty(self.total, columns)

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
        """Shared neurons' rows for the row kernels: all are one expert's."""
        rows = (len(self.tokens),) * 2 if self.is_apart else (self.native.total, self.total)
        return self.kernels.SortedRows.piece(0, 0, *rows, self.at.order_S)

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
    kernels: Any = native.extension()
    sizes = kept.get(Sizes)
    if sizes is None:
        sizes = kept[Sizes] = Sizes.of(call)
    gate_TK = None if call.gate_TK is None else call.gate_TK.float()
    plan, of_norm = call[1:5], (gate_TK, call.ln_w_ED, call.ln_b_ED, call.residual_TD, call.seed)
    of_experts, of_shared = (None, call.b1_EF, None, call.b2_ED), (None, call.shared_b1_C, None)
    alive, addresses = addresses_of((call.x_TD, *plan, *of_experts, *of_norm, *of_shared))
    at: Any = Call._make((*addresses, *call[NUM_TENSORS:]))
    max_fill = sizes.max_fill_apart if in_pieces else sizes.max_fill
    laid_out = kernels.SortedRows(at.offsets_E1, sizes.E, at.order_S, sizes.bounded, max_fill)
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
