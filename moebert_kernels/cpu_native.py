"""The operators on the CPU: torch's GEMMs, with the row kernels of csrc/ for everything between them.

Rows are gathered into expert order once, go through both GEMMs there, and are scattered back once. Two things
are bounded besides: the number of calls, since with few rows one batched GEMM over all experts costs little
more than a single expert's, and the number of different row counts, since oneDNN, torch's 16-bit GEMM, builds
code for each it meets, which costs as much as hundreds of rows.

What the row kernels do not serve (float64, float16, a gate or several experts without `per_slot`, an install
without csrc/) goes the plain way of `cpu`. Argument and result conventions are those of `ops`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import cpu, native
from moebert_kernels.activations import ACTIVATIONS

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # Dtype in csrc/rows_cpu.h
_ACTIVATIONS = {name: code for code, name in enumerate(ACTIVATIONS)}  # Activation there

# Filling every expert up to the same number of rows, for one batched GEMM instead of E, pays as long as the
# rows added take no more multiply-adds than this in one GEMM.
_MAX_BATCH_FILL = 16e6
# Rows that go through the layer together where nothing is kept for backward: their temporaries stay in the
# last cache, and the GEMMs are still long enough to forget that each packs its weights anew.
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class _Rows:
    """Experts' rows in a buffer sorted by expert.

    Attributes:
        native: the same for the row kernels.
        spans: expert, first and last row of each segment, padding included; those without rows are left out.
        total: rows of the buffer.
        batch: rows of every expert where all have the same; 0 where they do not.
    """

    native: Any
    spans: list[tuple[int, int, int]]
    total: int
    batch: int


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
    """See `ops.expert_ffn`. The pre-activations are without b1, and in the order of `_Rows`."""
    kernels = _row_kernels(x_TD, gate_TK, top_k, per_slot)
    if kernels is None:
        return cpu.expert_ffn_forward(
            x_TD,
            order_S,
            offsets_E1,
            w1_EFD,
            b1_EF,
            w2_EDF,
            b2_ED,
            gate_TK,
            activation,
            top_k,
            per_slot,
            save_preact,
        )
    x_TD, order_S = x_TD.contiguous(), order_S.contiguous()
    b1_EF, b2_ED = _contiguous(b1_EF), _contiguous(b2_ED)
    dtype, threads, code = _DTYPES[x_TD.dtype], torch.get_num_threads(), _ACTIVATIONS[activation]
    num_slots, D, F = order_S.shape[0], x_TD.shape[1], w1_EFD.shape[1]
    offsets = offsets_E1.tolist()
    w1_EDF, w2_EFD = w1_EFD.transpose(1, 2), w2_EDF.transpose(1, 2)

    y_SD = x_TD.new_empty(num_slots, D)
    preact_PF = x_TD.new_empty(cpu.preact_rows(x_TD, num_slots) if save_preact else 0, F)
    parts = list(_cut(kernels, offsets, order_S, w1_EFD, None if save_preact else _ROWS_AT_ONCE))
    most_rows = max((part.total for part in parts), default=0)
    rows_PD = x_TD.new_empty(most_rows, D)  # of x, then of z
    hidden_PF = x_TD.new_empty(most_rows, F)
    unrouted = offsets[-1]
    for part in parts:
        kernels.gather_rows(part.native, dtype, x_TD.data_ptr(), rows_PD.data_ptr(), 0, D, top_k, threads)
        h_PF = preact_PF if save_preact else hidden_PF
        _multiply(part, rows_PD, w1_EDF, h_PF)
        kernels.activate_rows(
            part.native, dtype, code, h_PF.data_ptr(), _address(b1_EF), hidden_PF.data_ptr(), F, threads
        )
        _multiply(part, hidden_PF, w2_EFD, rows_PD)
        kernels.scatter_rows(
            part.native,
            dtype,
            rows_PD.data_ptr(),
            _address(b2_ED),
            y_SD.data_ptr(),
            D,
            unrouted,
            num_slots,
            threads,
        )
        unrouted = num_slots  # written by the first part
    if not parts:
        y_SD.zero_()
    if save_preact:
        preact_PF[most_rows:].zero_()
    return y_SD, preact_PF


def expert_ffn_backward(
    dy: Tensor,
    x_TD: Tensor,
    preact_PF: Tensor,
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
    kernels = _row_kernels(x_TD, gate_TK, top_k, per_slot)
    if kernels is None:
        return cpu.expert_ffn_backward(
            dy,
            x_TD,
            preact_PF,
            order_S,
            offsets_E1,
            w1_EFD,
            b1_EF,
            w2_EDF,
            b2_ED,
            gate_TK,
            activation,
            top_k,
            per_slot,
            needs,
        )
    need_x, need_w1, need_b1, need_w2, need_b2, _ = needs
    dy, x_TD, order_S = dy.contiguous(), x_TD.contiguous(), order_S.contiguous()
    b1_EF = _contiguous(b1_EF)
    dtype, threads, code = _DTYPES[x_TD.dtype], torch.get_num_threads(), _ACTIVATIONS[activation]
    num_slots, D, F = order_S.shape[0], x_TD.shape[1], w1_EFD.shape[1]
    offsets = offsets_E1.tolist()
    none = x_TD.new_empty(0)
    dw1_EFD = torch.empty_like(w1_EFD) if need_w1 else none
    dw2_EDF = torch.empty_like(w2_EDF) if need_w2 else none
    db1_EF = torch.empty_like(b1_EF) if need_b1 and b1_EF is not None else none
    db2_ED = torch.empty_like(b2_ED) if need_b2 and b2_ED is not None else none
    dx_SD = x_TD.new_empty(num_slots if need_x else 0, D)
    if offsets[-1] == 0:
        for tensor in (dw1_EFD, dw2_EDF, db1_EF, db2_ED, dx_SD):
            tensor.zero_()
        return dx_SD[: x_TD.shape[0]], dw1_EFD, db1_EF, dw2_EDF, db2_ED, none

    (rows,) = _cut(kernels, offsets, order_S, w1_EFD, None)
    rows_PD = x_TD.new_empty(rows.total, D)  # of dz, then of x, then of dx
    kernels.gather_rows(
        rows.native,
        dtype,
        dy.data_ptr(),
        rows_PD.data_ptr(),
        _address(db2_ED),
        D,
        1 if per_slot else top_k,
        threads,
    )
    a_PF, dh_PF = x_TD.new_empty(2, rows.total, F).unbind()
    if need_x or need_w1 or need_b1:
        _multiply(rows, rows_PD, w2_EDF, dh_PF)
    kernels.activate_backward_rows(
        rows.native,
        dtype,
        code,
        preact_PF.data_ptr(),
        _address(b1_EF),
        a_PF.data_ptr(),
        dh_PF.data_ptr(),
        _address(db1_EF),
        F,
        threads,
    )
    if need_w2:
        _multiply_transposed(rows, rows_PD, a_PF, dw2_EDF)
    if need_w1:
        kernels.gather_rows(rows.native, dtype, x_TD.data_ptr(), rows_PD.data_ptr(), 0, D, top_k, threads)
        _multiply_transposed(rows, dh_PF, rows_PD, dw1_EFD)
    if need_x:
        _multiply(rows, dh_PF, w1_EFD, rows_PD)
        kernels.scatter_rows(
            rows.native, dtype, rows_PD.data_ptr(), 0, dx_SD.data_ptr(), D, offsets[-1], num_slots, threads
        )
        if top_k > 1:
            dx_SD = dx_SD.view(-1, top_k, D).sum(1)
    return dx_SD, dw1_EFD, db1_EF, dw2_EDF, db2_ED, none


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
    kernels = _norm_kernels(z_SD, residual_TD, ln_w_ED, ln_b_ED)
    if kernels is None:
        return cpu.expert_norm_forward(
            z_SD,
            residual_TD,
            expert_ids_TK,
            order_S,
            offsets_E1,
            ln_w_ED,
            ln_b_ED,
            gate_TK,
            seed,
            eps,
            dropout_p,
        )
    residual_TD = residual_TD.contiguous()
    y_TD = torch.empty_like(residual_TD)
    mean_S, rstd_S = (z_SD.new_empty(z_SD.shape[0], dtype=torch.float32) for _ in range(2))
    norm = _NormArguments(z_SD, residual_TD, expert_ids_TK, ln_w_ED, ln_b_ED, gate_TK, mean_S, rstd_S)
    dropout = _dropout(seed, dropout_p)
    kernels.norm_rows(*norm.addresses(), dropout, y_TD.data_ptr(), eps, torch.get_num_threads())
    return y_TD, mean_S, rstd_S


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
    kernels = _norm_kernels(z_SD, residual_TD, ln_w_ED, ln_b_ED)
    if kernels is None:
        return cpu.expert_norm_backward(
            dy_TD,
            z_SD,
            residual_TD,
            mean_S,
            rstd_S,
            expert_ids_TK,
            order_S,
            offsets_E1,
            ln_w_ED,
            ln_b_ED,
            gate_TK,
            seed,
            dropout_p,
            need_gate,
        )
    dy_TD = dy_TD.to(residual_TD.dtype).contiguous()
    residual_TD = residual_TD.contiguous()
    norm = _NormArguments(z_SD, residual_TD, expert_ids_TK, ln_w_ED, ln_b_ED, gate_TK, mean_S, rstd_S)
    dz_SD, dresidual_TD = torch.empty_like(norm.z_SD), torch.empty_like(residual_TD)
    dln_w_ED, dln_b_ED = (ln_w_ED.new_empty(ln_w_ED.shape) for _ in range(2))
    dgate_TK = mean_S.new_empty(expert_ids_TK.shape if need_gate else 0)
    kernels.norm_backward_rows(
        *norm.addresses(),
        _dropout(seed, dropout_p),
        dy_TD.data_ptr(),
        dz_SD.data_ptr(),
        dresidual_TD.data_ptr(),
        dln_w_ED.data_ptr(),
        dln_b_ED.data_ptr(),
        dgate_TK.data_ptr() if need_gate else 0,
        torch.get_num_threads(),
    )
    return dz_SD, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK


class _NormArguments:
    """What both directions of the norm read, in the form the kernels take; keeps the memory alive."""

    def __init__(
        self,
        z_SD: Tensor,
        residual_TD: Tensor,
        expert_ids_TK: Tensor,
        ln_w_ED: Tensor,
        ln_b_ED: Tensor,
        gate_TK: Tensor | None,
        mean_S: Tensor,
        rstd_S: Tensor,
    ):
        self.z_SD = z_SD.contiguous()
        self.dtypes = [_DTYPES[tensor.dtype] for tensor in (z_SD, residual_TD, ln_w_ED)]
        self.sizes = [*expert_ids_TK.shape, residual_TD.shape[1], ln_w_ED.shape[0]]
        self.tensors = [
            self.z_SD,
            residual_TD,
            expert_ids_TK.contiguous(),
            ln_w_ED.contiguous(),
            ln_b_ED.contiguous(),
            None if gate_TK is None else gate_TK.float().contiguous(),
            mean_S,
            rstd_S,
        ]

    def addresses(self) -> tuple[list[int], list[int], list[int]]:
        return self.dtypes, [_address(tensor) for tensor in self.tensors], self.sizes


def _row_kernels(x: Tensor, gate_TK: Tensor | None, top_k: int, per_slot: bool) -> Any | None:
    """The extension where it serves such a call."""
    if x.dtype not in _DTYPES or gate_TK is not None or (top_k > 1 and not per_slot):
        return None
    return native.row_kernels()


def _norm_kernels(z_SD: Tensor, residual_TD: Tensor, ln_w_ED: Tensor, ln_b_ED: Tensor) -> Any | None:
    served = all(tensor.dtype in _DTYPES for tensor in (z_SD, residual_TD, ln_w_ED))
    return native.row_kernels() if served and ln_b_ED.dtype == ln_w_ED.dtype else None


def _cut(
    kernels: Any, offsets: list[int], order_S: Tensor, w1_EFD: Tensor, rows_at_once: int | None
) -> Iterator[_Rows]:
    """The experts' rows as one buffer, or as several with at most so many rows of one expert each."""
    order, dtype = order_S.data_ptr(), w1_EFD.dtype
    counts = [end - begin for begin, end in itertools.pairwise(offsets)]
    routed, most = offsets[-1], max(counts)
    flat: list[int] = []
    spans: list[tuple[int, int, int]] = []
    if routed == 0:
        return
    batch = _bounded(most, dtype)
    fill = batch * len(counts) - routed
    if fill <= cpu.PREACT_SLACK and fill * w1_EFD[0].numel() <= _MAX_BATCH_FILL:
        for expert, count in enumerate(counts):
            flat += [expert, offsets[expert], count, expert * batch, batch]
        yield _Rows(kernels.SortedRows(flat, order), spans, batch * len(counts), batch)
    elif rows_at_once is None or routed <= rows_at_once:
        start = 0
        for expert, count in enumerate(counts):
            padded = _bounded(count, dtype)
            flat += [expert, offsets[expert], count, start, padded]
            spans.append((expert, start, start + padded))
            start += padded
        yield _Rows(kernels.SortedRows(flat, order), spans, start, 0)
    else:
        for expert, count in enumerate(counts):
            for begin in range(0, count, rows_at_once):
                rows = min(rows_at_once, count - begin)
                padded = _bounded(rows, dtype)
                flat = [expert, offsets[expert] + begin, rows, 0, padded]
                yield _Rows(kernels.SortedRows(flat, order), [(expert, 0, padded)], padded, 0)


def _bounded(rows: int, dtype: torch.dtype) -> int:
    """Rows filled up to one of 32 counts in each octave: at most 1 / 32 more. float32 GEMMs are MKL's, which
    does not mind."""
    if dtype == torch.float32 or rows <= 32:
        return rows
    step = 1 << ((rows - 1).bit_length() - 6)
    return -(-rows // step) * step


def _multiply(rows: _Rows, a_PN: Tensor, w_ENM: Tensor, out_PM: Tensor) -> None:
    """out[rows of e] = a[rows of e] @ w[e]."""
    if rows.batch:
        E = w_ENM.shape[0]
        torch.bmm(_per_expert(rows, a_PN, E), w_ENM, out=_per_expert(rows, out_PM, E))
        return
    for expert, begin, end in rows.spans:
        if end > begin:
            torch.mm(a_PN[begin:end], w_ENM[expert], out=out_PM[begin:end])


def _per_expert(rows: _Rows, t_PN: Tensor, num_experts: int) -> Tensor:
    """Batched rows with an axis for the experts; `t_PN` may have more rows than those."""
    N = t_PN.shape[1]
    return t_PN.as_strided((num_experts, rows.batch, N), (rows.batch * N, N, 1))


def _multiply_transposed(rows: _Rows, a_PM: Tensor, b_PN: Tensor, out_EMN: Tensor) -> None:
    """out[e] = a[rows of e]^T @ b[rows of e]."""
    if rows.batch:
        E = out_EMN.shape[0]
        torch.bmm(_per_expert(rows, a_PM, E).transpose(1, 2), _per_expert(rows, b_PN, E), out=out_EMN)
        return
    for expert, begin, end in rows.spans:
        if end > begin:
            torch.mm(a_PM[begin:end].t(), b_PN[begin:end], out=out_EMN[expert])
        else:
            out_EMN[expert].zero_()


def _dropout(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    return (0, 0.0) if seed is None else (int(seed), dropout_p)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
