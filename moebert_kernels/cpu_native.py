"""The operators on the CPU: torch's GEMMs, with the row kernels of csrc/ for everything between them.

The functions serve the calls that `backends` sends here. Argument and result conventions are those of `ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moebert_kernels import cpu, cpu_rows, native
from moebert_kernels.cpu_rows import DTYPES, SortedRows, contiguous, sort_rows
from moebert_kernels.native import address


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
    """See `ops.expert_ffn`. The pre-activations are without b1, and in the order of `SortedRows`."""
    x_TD = x_TD.contiguous()
    num_slots, F = order_S.shape[0], w1_EFD.shape[1]
    rows = sort_rows(native.row_kernels(), order_S, offsets_E1, w1_EFD, in_pieces=not save_preact)
    preact_PF = x_TD.new_empty(cpu.preact_rows(x_TD, num_slots) if save_preact else 0, F)
    kept = rows.view(preact_PF) if save_preact else None
    z_PD = cpu_rows.forward(rows, x_TD, w1_EFD, contiguous(b1_EF), w2_EDF, activation, top_k, kept)
    preact_PF[rows.native.total :].zero_()
    return scatter(rows, z_PD, contiguous(b2_ED), num_slots), preact_PF


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
    need_x, need_w1, need_b1, need_w2, need_b2, _ = needs
    x_TD = x_TD.contiguous()
    rows = sort_rows(native.row_kernels(), order_S, offsets_E1, w1_EFD, in_pieces=False)
    db2_ED = torch.empty_like(b2_ED) if need_b2 and b2_ED is not None else None
    dz_PD = gather(rows, dy.contiguous(), db2_ED, 1 if per_slot else top_k)
    grads = cpu_rows.backward(
        rows,
        dz_PD,
        rows.view(preact_PF),
        x_TD,
        w1_EFD,
        contiguous(b1_EF),
        w2_EDF,
        activation,
        top_k,
        (need_x, need_w1, need_b1, need_w2),
    )
    dx_PD, dw1_EFD, db1_EF, dw2_EDF = grads
    none = x_TD.new_empty(0)
    dx_TD = x_TD.new_empty(0, x_TD.shape[1]) if dx_PD is None else dx_of(rows, dx_PD, top_k)
    weights = (none if grad is None else grad for grad in (dw1_EFD, db1_EF, dw2_EDF, db2_ED))
    return dx_TD, *weights, x_TD.new_empty(0)  # type: ignore[return-value]


def gather(rows: SortedRows, src: Tensor, sums_ED: Tensor | None, divisor: int) -> Tensor:
    """Rows of `src`, [S / divisor, D], in sorted order, and the sums of each expert's."""
    D = src.shape[1]
    to = rows.empty(src, D)
    where = (address(src), address(to), address(sums_ED))
    rows.kernels.gather_rows(rows.native, DTYPES[src.dtype], *where, D, divisor, torch.get_num_threads())
    return to


def scatter(rows: SortedRows, src_PD: Tensor, bias_ED: Tensor | None, num_slots: int) -> Tensor:
    """Sorted rows, plus their expert's bias, back to their slots, [S, D]; 0 where a slot has no expert."""
    D = src_PD.shape[-1]
    to_SD = src_PD.new_empty(num_slots, D)
    where = (address(src_PD), address(bias_ED), address(to_SD))
    sizes = (D, rows.native.routed, num_slots, False, torch.get_num_threads())
    rows.kernels.scatter_rows(rows.native, DTYPES[src_PD.dtype], *where, *sizes)
    return to_SD


def dx_of(rows: SortedRows, dx_PD: Tensor, top_k: int) -> Tensor:
    """The gradient of x from that of its sorted rows."""
    dx_SD = scatter(rows, dx_PD, None, rows.order_S.shape[0])
    return dx_SD if top_k == 1 else dx_SD.view(-1, top_k, dx_SD.shape[1]).sum(1)


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
    residual_TD = residual_TD.contiguous()
    mean_S, rstd_S = (z_SD.new_empty(z_SD.shape[0], dtype=torch.float32) for _ in range(2))
    norm = Norm(
        z_SD.contiguous(),
        residual_TD,
        expert_ids_TK,
        ln_w_ED,
        ln_b_ED,
        gate_TK,
        mean_S,
        rstd_S,
        seed,
        dropout_p,
    )
    return norm.forward(eps), mean_S, rstd_S


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
    norm = Norm(
        z_SD.contiguous(),
        residual_TD.contiguous(),
        expert_ids_TK,
        ln_w_ED,
        ln_b_ED,
        gate_TK,
        mean_S,
        rstd_S,
        seed,
        dropout_p,
    )
    *grads, dgate_TK = norm.backward(dy_TD, need_gate)
    return (*grads, mean_S.new_empty(0) if dgate_TK is None else dgate_TK)  # type: ignore[return-value]


class Norm:
    """What both directions of the norm read, in the form the kernels take; keeps the memory alive.

    z and residual must be contiguous. With `rows`, z lies in sorted rows, `b2_ED` not yet added, and the
    plan's `inverse_S` tells where each slot's is.
    """

    def __init__(
        self,
        z: Tensor,
        residual_TD: Tensor,
        expert_ids_TK: Tensor,
        ln_w_ED: Tensor,
        ln_b_ED: Tensor,
        gate_TK: Tensor | None,
        mean_S: Tensor | None,
        rstd_S: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        rows: SortedRows | None = None,
        inverse_S: Tensor | None = None,
        b2_ED: Tensor | None = None,
    ):
        self.z, self.residual_TD, self.ln_w_ED, self.ids_TK = z, residual_TD, ln_w_ED, expert_ids_TK
        gate_TK = None if gate_TK is None else gate_TK.float()
        others = (expert_ids_TK, ln_w_ED, ln_b_ED, gate_TK, mean_S, rstd_S, b2_ED, inverse_S)
        self._alive = (z, residual_TD, *map(contiguous, others))
        self._kernels: Any = native.row_kernels()
        self._native: Any = None if rows is None else rows.native
        self._dtypes = [DTYPES[z.dtype], DTYPES[residual_TD.dtype], DTYPES[ln_w_ED.dtype]]
        self._sizes = [*expert_ids_TK.shape, residual_TD.shape[1], ln_w_ED.shape[0]]
        self._dropout = (0, 0.0) if seed is None else (int(seed), dropout_p)

    def _arguments(self) -> tuple[Any, ...]:
        return self._native, self._dtypes, [*map(address, self._alive)], self._sizes, self._dropout

    def forward(self, eps: float) -> Tensor:
        """y_TD; mean and rstd are written unless they are None."""
        y_TD = torch.empty_like(self.residual_TD)
        self._kernels.norm_rows(*self._arguments(), address(y_TD), eps, torch.get_num_threads())
        return y_TD

    def backward(
        self, dy_TD: Tensor, need_gate: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """dz, sorted as z is and then with undefined padding; dresidual, dln_w, dln_b and dgate."""
        dy_TD = dy_TD.to(self.residual_TD.dtype).contiguous()
        dz, dresidual_TD = torch.empty_like(self.z), torch.empty_like(self.residual_TD)
        dln_w_ED, dln_b_ED = (self.ln_w_ED.new_empty(self.ln_w_ED.shape) for _ in range(2))
        dgate_TK = dy_TD.new_empty(self.ids_TK.shape, dtype=torch.float32) if need_gate else None
        grads = (dz, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK)
        self._kernels.norm_backward_rows(
            *self._arguments(), address(dy_TD), *map(address, grads), torch.get_num_threads()
        )
        return grads
