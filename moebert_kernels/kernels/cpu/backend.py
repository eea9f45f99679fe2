"""Which calls the CPU's row kernels serve; the norm, and both ends of the rows' way through the experts.

Rows stay in sorted order from the first GEMM to the last: the LayerNorm reads the experts' outputs where the
GEMM left them, and its backward leaves their gradient where the next GEMM wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import native
from moebert_kernels.addresses import address
from moebert_kernels.kernels.call import Call, Gradients, Saved
from moebert_kernels.kernels.cpu import experts
from moebert_kernels.kernels.cpu.experts import dense_like
from moebert_kernels.kernels.cpu.rows import DTYPES, SortedRows, sort_rows


def serves(call: Call) -> bool:
    """Whether there are row kernels, and for the device, the dtypes and the form of a call."""
    if call.ln_w_ED is None:
        fits = call.gate_TK is None and call.top_k == 1
    else:
        same = call.ln_b_ED is not None and call.ln_b_ED.dtype == call.ln_w_ED.dtype
        fits = same and call.ln_w_ED.dtype in DTYPES and call.residual.dtype in DTYPES
    return fits and call.x_TD.is_cpu and call.x_TD.dtype in DTYPES and native.extension() is not None


def forward(call: Call, training: bool, kept: dict[Any, Any]) -> tuple[Tensor, Saved]:
    """y_TD, and what `backward` needs if `training`: sorted pre-activations and z, both without biases."""
    rows = sort_rows(call, kept, in_pieces=not training)
    z_PD, h_PF, h_PC = experts.forward(rows, call, training)
    if call.ln_w_ED is None:
        return _scatter(rows, z_PD, rows.at.b2_ED), Saved(h_PF, None, None, h_PC)
    stats_2S = z_PD.new_empty(2, rows.sizes.num_slots, dtype=torch.float32) if training else None
    y_TD = dense_like(call.residual)
    rows.kernels.norm_rows(*_norm(rows, call, z_PD, stats_2S), y_TD.data_ptr(), call.norm_eps, rows.threads)
    return y_TD, Saved(h_PF, z_PD if training else None, stats_2S, h_PC)


def backward(call: Call, saved: Saved, dy_TD: Tensor, needs: Gradients, kept: dict[Any, Any]) -> Gradients:
    """The gradients, at least those that `needs` says."""
    assert saved.hidden is not None
    rows = sort_rows(call, kept, in_pieces=False)
    D, top_k = rows.sizes.D, rows.sizes.top_k
    db2_ED = None if call.b2_ED is None or not needs.b2_ED else dense_like(call.b2_ED)
    dresidual_TD = dln_w_ED = dln_b_ED = dgate_TK = None
    dz_PD = rows.empty(D)
    source: Tensor | None = dy_TD.contiguous()
    if call.ln_w_ED is not None:
        assert saved.z is not None
        source, dy_TD = None, dy_TD.to(call.residual.dtype).contiguous()  # dz is put where the rows belong
        dresidual_TD = torch.empty_like(dy_TD)
        dln_w_ED, dln_b_ED = (dense_like(call.ln_w_ED) for _ in range(2))
        if needs.gate_TK:
            dgate_TK = dy_TD.new_empty(call.expert_ids_TK.shape, dtype=torch.float32)
        grads = (dy_TD, dz_PD, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK)
        arguments = _norm(rows, call, rows.view(saved.z), saved.stats_2S)
        rows.kernels.norm_backward_rows(*arguments, *map(address, grads), rows.threads)
    where = (address(source), dz_PD.data_ptr(), address(db2_ED))
    rows.kernels.gather_rows(rows.native, rows.sizes.dtype, *where, D, 1, rows.threads)
    dx_TD = dw1_EFD = db1_EF = dw2_EDF = None
    of_shared: Sequence[Tensor | None] = (None, None, None)
    if any(needs[:4]) or any(needs[-3:]):
        h_PF, h_PC = rows.view(saved.hidden), None if call.shared_w1_CD is None else saved.shared
        if h_PC is not None:
            h_PC = h_PC[: rows.total]
        found = experts.backward(rows, call, dz_PD, h_PF, h_PC, needs)
        dx_PD, dw1_EFD, db1_EF, dw2_EDF, *of_shared = found
        if dx_PD is not None:
            to_TD = dresidual_TD if call.residual_TD is None and top_k == 1 else None
            dx_TD = _scatter(rows, dx_PD, 0, to_TD)
            if top_k > 1:  # several rows of one token must not meet
                dx_TD = dx_TD.view(-1, top_k, D).sum(1)
                if call.residual_TD is None and dresidual_TD is not None:
                    dx_TD += dresidual_TD
    dresidual_TD = None if call.residual_TD is None else dresidual_TD
    of_norm = (dgate_TK, dln_w_ED, dln_b_ED, dresidual_TD)
    return Gradients(dx_TD, dw1_EFD, db1_EF, dw2_EDF, db2_ED, *of_norm, *of_shared)


def _norm(rows: SortedRows, call: Call, z_PD: Tensor, stats_2S: Tensor | None) -> tuple[Any, ...]:
    """What both directions of the norm take first."""
    at, (dtypes, sizes) = rows.at, rows.sizes.norm
    mean = address(stats_2S)
    rstd = mean and mean + 4 * rows.sizes.num_slots
    residual, parameters = at.residual_TD or at.x_TD, (at.ln_w_ED, at.ln_b_ED, at.gate_TK)
    places = [z_PD.data_ptr(), residual, at.expert_ids_TK, *parameters, mean, rstd, at.b2_ED, at.inverse_S]
    dropout = (0, 0.0) if call.seed is None else (int(call.seed), call.dropout_p)
    return rows.native, dtypes, places, sizes, dropout


def _scatter(rows: SortedRows, src_PD: Tensor, bias: int, add_to: Tensor | None = None) -> Tensor:
    """Sorted rows, plus their expert's bias, back to their slots [S, D], 0 where a slot has no expert.

    With `add_to` they are added to it instead, in place. `bias` is its address.
    """
    D, S = rows.sizes.D, rows.sizes.num_slots
    to_SD = src_PD.new_empty(S, D) if add_to is None else add_to
    where = (src_PD.data_ptr(), bias, to_SD.data_ptr())
    sizes = (D, rows.native.routed, S, add_to is not None, rows.threads)
    rows.kernels.scatter_rows(rows.native, rows.sizes.dtype, *where, *sizes)
    return to_SD
