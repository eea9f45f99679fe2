"""The operator on the CPU: torch's GEMMs, with the row kernels of csrc/ for everything between them.

Rows stay in sorted order from the first GEMM to the last: the LayerNorm reads the experts' outputs where the
GEMM left them, and its backward leaves their gradient where the next GEMM wants it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moebert_kernels import cpu_rows
from moebert_kernels.arguments import Call, Gradients, Saved
from moebert_kernels.cpu_rows import DTYPES, SortedRows, contiguous, sort_rows
from moebert_kernels.native import address


def serves(call: Call) -> bool:
    """Whether there are row kernels for the dtypes and the form of a call."""
    if call.x_TD.dtype not in DTYPES:
        return False
    if call.ln_w_ED is None:
        return call.gate_TK is None and call.top_k == 1
    same = call.ln_b_ED is not None and call.ln_b_ED.dtype == call.ln_w_ED.dtype
    return same and call.ln_w_ED.dtype in DTYPES and call.residual.dtype in DTYPES


def forward(call: Call, training: bool) -> tuple[Tensor, Saved]:
    """y_TD, and what `backward` needs if `training`: sorted pre-activations and z, both without biases."""
    x_TD, S = call.x_TD.contiguous(), call.order_S.shape[0]
    rows = sort_rows(call, in_pieces=not training)
    h_PF = rows.empty(x_TD, call.w1_EFD.shape[1]) if training else None
    z_PD = cpu_rows.forward(rows, call, x_TD, h_PF)
    if call.ln_w_ED is None:
        return _scatter(rows, z_PD, contiguous(call.b2_ED), S), Saved(h_PF, None, None, None)
    stats = [x_TD.new_empty(S, dtype=torch.float32) if training else None for _ in range(2)]
    saved = Saved(h_PF, z_PD if training else None, *stats)
    _alive, arguments = _norm(rows, call, z_PD, *stats)
    y_TD = call.residual.new_empty(x_TD.shape)
    rows.kernels.norm_rows(*arguments, address(y_TD), call.norm_eps, torch.get_num_threads())
    return y_TD, saved


def backward(call: Call, saved: Saved, dy_TD: Tensor, needs: Gradients) -> Gradients:
    """The gradients, at least those that `needs` says."""
    assert saved.hidden is not None
    rows, threads = sort_rows(call, in_pieces=False), torch.get_num_threads()
    D, top_k = call.x_TD.shape[1], call.top_k
    db2_ED = None if call.b2_ED is None or not needs.b2_ED else call.b2_ED.new_empty(call.b2_ED.shape)
    dresidual_TD = dln_w_ED = dln_b_ED = dgate_TK = None
    dz_PD = rows.empty(call.x_TD, D)
    source: Tensor | None = dy_TD.contiguous()
    if call.ln_w_ED is not None:
        assert saved.z is not None
        source, dy_TD = None, dy_TD.to(call.residual.dtype).contiguous()  # dz is put where the rows belong
        _alive, arguments = _norm(rows, call, rows.view(saved.z), saved.mean_S, saved.rstd_S)
        dresidual_TD = dy_TD.new_empty(dy_TD.shape)
        dln_w_ED, dln_b_ED = (call.ln_w_ED.new_empty(call.ln_w_ED.shape) for _ in range(2))
        if needs.gate_TK:
            dgate_TK = dy_TD.new_empty(call.expert_ids_TK.shape, dtype=torch.float32)
        grads = (dy_TD, dz_PD, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK)
        rows.kernels.norm_backward_rows(*arguments, *map(address, grads), threads)
    where = (address(source), address(dz_PD), address(db2_ED))
    rows.kernels.gather_rows(rows.native, DTYPES[dz_PD.dtype], *where, D, 1, threads)
    dx_TD = dw1_EFD = db1_EF = dw2_EDF = None
    if any(needs[:4]):
        dx_PD, dw1_EFD, db1_EF, dw2_EDF = cpu_rows.backward(rows, call, dz_PD, rows.view(saved.hidden), needs)
        if dx_PD is not None:
            to_TD = dresidual_TD if call.residual_TD is None and top_k == 1 else None
            dx_TD = _scatter(rows, dx_PD, None, call.order_S.shape[0], to_TD)
            if top_k > 1:  # several rows of one token must not meet
                dx_TD = dx_TD.view(-1, top_k, D).sum(1)
                if call.residual_TD is None and dresidual_TD is not None:
                    dx_TD += dresidual_TD
    dresidual_TD = None if call.residual_TD is None else dresidual_TD
    return Gradients(dx_TD, dw1_EFD, db1_EF, dw2_EDF, db2_ED, dgate_TK, dln_w_ED, dln_b_ED, dresidual_TD)


def _norm(
    rows: SortedRows, call: Call, z_PD: Tensor, mean_S: Tensor | None, rstd_S: Tensor | None
) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """What both directions of the norm take first, and the tensors that must stay alive meanwhile."""
    assert call.ln_w_ED is not None
    residual_TD, ids_TK = call.residual, call.expert_ids_TK
    gate_TK = None if call.gate_TK is None else call.gate_TK.float()
    parameters = (ids_TK, call.ln_w_ED, call.ln_b_ED, gate_TK, mean_S, rstd_S, call.b2_ED, call.inverse_S)
    alive = [None if t is None else t.contiguous() for t in (z_PD, residual_TD, *parameters)]
    dtypes = [DTYPES[z_PD.dtype], DTYPES[residual_TD.dtype], DTYPES[call.ln_w_ED.dtype]]
    sizes = [*ids_TK.shape, residual_TD.shape[1], call.ln_w_ED.shape[0]]
    dropout = (0, 0.0) if call.seed is None else (int(call.seed), call.dropout_p)
    return alive, (rows.native, dtypes, [*map(address, alive)], sizes, dropout)


def _scatter(
    rows: SortedRows, src_PD: Tensor, bias_ED: Tensor | None, num_slots: int, add_to: Tensor | None = None
) -> Tensor:
    """Sorted rows, plus their expert's bias, back to their slots [S, D], 0 where a slot has no expert.

    With `add_to` they are added to it instead, in place.
    """
    D = src_PD.shape[-1]
    to_SD = src_PD.new_empty(num_slots, D) if add_to is None else add_to
    where = (address(src_PD), address(bias_ED), address(to_SD))
    sizes = (D, rows.native.routed, num_slots, add_to is not None, torch.get_num_threads())
    rows.kernels.scatter_rows(rows.native, DTYPES[src_PD.dtype], *where, *sizes)
    return to_SD
