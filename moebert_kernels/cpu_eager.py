"""`moe_ffn` in eager mode on the CPU, in one step: its operators' arithmetic without their seams.

The Python layers of a custom operator cost as much as some dozen tokens. And what lies between the two
operators need not be: the LayerNorm reads the experts' outputs where the GEMM left them, its backward leaves
their gradient where the next GEMM wants it, and the residual's gradient is what x's is added to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebert_kernels import cpu_native, cpu_rows, native
from moebert_kernels.cpu_rows import DTYPES, SortedRows, contiguous, sort_rows
from moebert_kernels.routing.plan import RoutingPlan


class Options(NamedTuple):
    """The arguments of `moe_ffn` that are no tensors to differentiate by."""

    plan: RoutingPlan
    activation: str
    norm_eps: float
    dropout_p: float


class Tensors(NamedTuple):
    """Those that are, and the dropout's seed. `residual_TD` is None where it is x; `ln_w_ED` without norm."""

    x_TD: Tensor
    w1_EFD: Tensor
    b1_EF: Tensor | None
    w2_EDF: Tensor
    b2_ED: Tensor | None
    ln_w_ED: Tensor | None
    ln_b_ED: Tensor | None
    gate_TK: Tensor | None
    residual_TD: Tensor | None
    seed: Tensor | None


def moe_ffn(options: Options, tensors: Tensors) -> Tensor:
    """See `ops.moe_ffn`; for arguments of which `backends.runs_eagerly` says so."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Layer.apply(options, *tensors)
    return _forward(options, tensors, None)


def _forward(options: Options, t: Tensors, ctx: Any) -> Tensor:
    plan, training = options.plan, ctx is not None
    x_TD, b2_ED = t.x_TD.contiguous(), contiguous(t.b2_ED)
    rows = sort_rows(native.row_kernels(), plan.order_S, plan.offsets_E1, t.w1_EFD, in_pieces=not training)
    h_PF = rows.empty(x_TD, t.w1_EFD.shape[1]) if training else None
    weights = (t.w1_EFD, contiguous(t.b1_EF), t.w2_EDF)
    z_PD = cpu_rows.forward(rows, x_TD, *weights, options.activation, plan.top_k, h_PF)
    mean_S: Tensor | None = None
    rstd_S: Tensor | None = None
    if t.ln_w_ED is None:
        y_TD = cpu_native.scatter(rows, z_PD, b2_ED, x_TD.shape[0])
    else:
        if training:
            mean_S, rstd_S = x_TD.new_empty(2, plan.order_S.shape[0], dtype=torch.float32).unbind()
        y_TD = _norm(options, t, rows, z_PD, mean_S, rstd_S).forward(options.norm_eps)
    if training:
        # Of the plan one tensor, so that autograd notices a write: the others share its storage.
        z = None if t.ln_w_ED is None else z_PD
        ctx.save_for_backward(*t, plan.expert_ids_TK, h_PF, z, mean_S, rstd_S)
        ctx.options, ctx.rows = options, rows
        ctx.set_materialize_grads(False)
    return y_TD


def _norm(
    options: Options,
    t: Tensors,
    rows: SortedRows,
    z_PD: Tensor,
    mean_S: Tensor | None,
    rstd_S: Tensor | None,
) -> cpu_native.Norm:
    plan = options.plan
    assert t.ln_w_ED is not None
    assert t.ln_b_ED is not None
    residual_TD = t.x_TD if t.residual_TD is None else t.residual_TD
    return cpu_native.Norm(
        z_PD,
        residual_TD.contiguous(),
        plan.expert_ids_TK,
        t.ln_w_ED,
        t.ln_b_ED,
        t.gate_TK,
        mean_S,
        rstd_S,
        t.seed,
        options.dropout_p,
        rows,
        plan.inverse_S,
        t.b2_ED,
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options: Options, *tensors: Tensor | None) -> Tensor:
        # With setup_context apart, apply() would look up this function's signature in every call.
        return _forward(options, Tensors(*tensors), ctx)  # type: ignore[arg-type]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy_TD is None:
            return (None,) * 11
        return None, *_backward(ctx, dy_TD)


def _backward(ctx, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the fields of `Tensors`."""
    *saved, _expert_ids, h_PF, z_PD, mean_S, rstd_S = ctx.saved_tensors
    t, need = Tensors(*saved), Tensors(*ctx.needs_input_grad[1:])  # the latter of booleans
    options, rows = ctx.options, ctx.rows
    top_k, x_TD = options.plan.top_k, t.x_TD.contiguous()
    db2_ED = torch.empty_like(t.b2_ED) if need.b2_ED and t.b2_ED is not None else None
    dresidual_TD = dln_w_ED = dln_b_ED = dgate_TK = None
    if z_PD is None:
        dz_PD = cpu_native.gather(rows, dy_TD.contiguous(), db2_ED, 1)
    else:
        norm = _norm(options, t, rows, z_PD, mean_S, rstd_S)
        dz_PD, dresidual_TD, dln_w_ED, dln_b_ED, dgate_TK = norm.backward(dy_TD, bool(need.gate_TK))
        _sum_rows(rows, dz_PD, db2_ED)
    needs = (bool(need.x_TD), bool(need.w1_EFD), bool(need.b1_EF), bool(need.w2_EDF))
    dx_TD = dw1_EFD = db1_EF = dw2_EDF = None
    if any(needs):
        weights = (t.w1_EFD, contiguous(t.b1_EF), t.w2_EDF)
        grads = cpu_rows.backward(rows, dz_PD, h_PF, x_TD, *weights, options.activation, top_k, needs)
        dx_PD, dw1_EFD, db1_EF, dw2_EDF = grads
        if dx_PD is not None and t.residual_TD is None and dresidual_TD is not None:
            dx_TD = _add_rows(rows, dx_PD, dresidual_TD, top_k)
        elif dx_PD is not None:
            dx_TD = cpu_native.dx_of(rows, dx_PD, top_k)
    if dgate_TK is not None and t.gate_TK is not None:
        dgate_TK = dgate_TK.to(t.gate_TK.dtype)
    dresidual = dresidual_TD if need.residual_TD else None
    return dx_TD, dw1_EFD, db1_EF, dw2_EDF, db2_ED, dln_w_ED, dln_b_ED, dgate_TK, dresidual, None


def _sum_rows(rows: SortedRows, dz_PD: Tensor, sums_ED: Tensor | None) -> None:
    """Zero the padding of sorted rows and add each expert's up."""
    sizes = (dz_PD.shape[-1], 1, torch.get_num_threads())
    where = (0, dz_PD.data_ptr(), cpu_rows.address(sums_ED))
    rows.kernels.gather_rows(rows.native, DTYPES[dz_PD.dtype], *where, *sizes)


def _add_rows(rows: SortedRows, dx_PD: Tensor, to_TD: Tensor, top_k: int) -> Tensor:
    """Add sorted rows to those of the tokens they came from, in place."""
    if top_k > 1:  # several rows of one token must not meet
        return to_TD.add_(cpu_native.dx_of(rows, dx_PD, top_k))
    sizes = (to_TD.shape[1], 0, 0, True, torch.get_num_threads())
    where = (dx_PD.data_ptr(), 0, to_TD.data_ptr())
    rows.kernels.scatter_rows(rows.native, DTYPES[dx_PD.dtype], *where, *sizes)
    return to_TD
