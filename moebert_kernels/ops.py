"""`moe_ffn`: the expert feed-forward network as two custom operators of PyTorch.

`expert_ffn` is the two grouped GEMMs, `expert_norm` the residual sum with each expert's own LayerNorm. Both
have a schema, a fake implementation and an autograd formula; `backends` picks what computes them.

Notation: T tokens, K experts per token, S = T*K slots (slot s = t*K + k), D hidden size, F neurons of one
expert, E experts. A 0-element tensor stands for a result that was not asked for: operators return no None.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from moebert_kernels import backends, cpu, cpu_eager
from moebert_kernels.arguments import check_arguments, check_kinds
from moebert_kernels.autocast import cast_parameter
from moebert_kernels.routing.plan import RoutingPlan


def moe_ffn(
    x_TD: Tensor,
    plan: RoutingPlan,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    *,
    gate_TK: Tensor | None = None,
    activation: str = "gelu",
    norm: tuple[Tensor, Tensor] | None = None,
    norm_eps: float = 1e-12,
    residual_TD: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Run every token through the experts its plan names (Eq. 1 and 2 of arXiv 2204.07675).

    With z_e(x) = W2_e act(W1_e x + b1_e) + b2_e and g = `gate_TK`, or 1/K where there is no gate,

        y_t = sum_k g_tk * z_e(x_t)                                     without `norm`
        y_t = sum_k g_tk * LayerNorm_e(dropout(z_e(x_t)) + residual_t)  with it, as in the authors' code

    summed over the slots that have an expert. A token without any is skipped: its output is 0 without
    `norm` and its residual with it.

    Args:
        x_TD: float32, float16, bfloat16 (float64 off the GPU); any strides.
        plan: the routing of these T tokens.
        w1_EFD, w2_EDF: the experts' weights, rows as in `nn.Linear`, of x's dtype.
        b1_EF, b2_ED: their biases, or None.
        gate_TK: probability of each choice, any floating dtype.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        norm: per-expert LayerNorm weight and bias, each [E, D], any floating dtype.
        norm_eps: added to the variance.
        residual_TD: what `norm` adds to the expert's output; x itself by default.
        dropout_p: probability of zeroing an element of the expert's output before the residual is added.
            Needs `norm`; pass 0 outside training.

    Returns:
        [T, D] in x's dtype, or in the residual's dtype with `norm`. Under autocast x, weights and biases are
        cast to the autocast dtype, as `nn.Linear` casts them; a parameter's cast is kept until it changes
        (see `autocast`).

    Raises:
        TypeError: an argument is of another kind.
        ValueError: shapes, dtypes, devices or options do not fit; the message names the argument.
    """
    check_kinds(x_TD, plan, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK, norm, residual_TD, dropout_p)
    if torch.is_autocast_enabled(x_TD.device.type):
        residual_TD = x_TD if norm and residual_TD is None else residual_TD
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD = x_TD.to(dtype)
        w1_EFD, w2_EDF = cast_parameter(w1_EFD, dtype), cast_parameter(w2_EDF, dtype)
        b1_EF = None if b1_EF is None else cast_parameter(b1_EF, dtype)
        b2_ED = None if b2_ED is None else cast_parameter(b2_ED, dtype)
    check_arguments(
        x_TD, plan, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK, activation, norm, residual_TD, dropout_p
    )
    # Drawn from torch's generator, so that manual_seed and checkpointing's state juggling govern it.
    seed = torch.randint(2**62, (1,), device=x_TD.device) if dropout_p > 0 else None
    if backends.runs_eagerly(x_TD, gate_TK, norm, residual_TD, plan.top_k):
        ln_w_ED, ln_b_ED = norm or (None, None)
        return cpu_eager.moe_ffn(
            cpu_eager.Options(plan, activation, norm_eps, dropout_p),
            cpu_eager.Tensors(
                x_TD, w1_EFD, b1_EF, w2_EDF, b2_ED, ln_w_ED, ln_b_ED, gate_TK, residual_TD, seed
            ),
        )
    differentiable = (x_TD, w1_EFD, b1_EF, w2_EDF, b2_ED, None if norm else gate_TK)
    save_preact = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    order_S, offsets_E1, ids_TK = plan.order_S, plan.offsets_E1, plan.expert_ids_TK
    weights, per_slot = (w1_EFD, b1_EF, w2_EDF, b2_ED), norm is not None
    gate = None if per_slot else gate_TK
    z, _ = expert_ffn(
        x_TD, order_S, offsets_E1, *weights, gate, activation, plan.top_k, per_slot, save_preact
    )
    if norm is None:
        return z
    residual_TD = x_TD if residual_TD is None else residual_TD
    y_TD, _, _ = expert_norm(
        z, residual_TD, ids_TK, order_S, offsets_E1, *norm, gate_TK, seed, norm_eps, dropout_p
    )
    return y_TD


@library.custom_op("moebert_kernels::expert_ffn", mutates_args=())
def expert_ffn(
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
    """gather -> W1 -> +b1 -> act -> W2 -> +b2 -> gate -> scatter.

    Args:
        order_S, offsets_E1: of the `RoutingPlan`.
        gate_TK: None for 1/K. Must be None with `per_slot`.
        per_slot: return z of every slot, [S, D], for `expert_norm` to weigh and sum; otherwise the weighted
            sum over k, [T, D].
        save_preact: whether backward will want the pre-activations.

    Returns:
        y, whose rows of slots without an expert are 0, and what the same backend's backward wants of the
        pre-activations, in sorted order: [S, F], or more rows on the CPU (`cpu.preact_rows`).
    """
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


@expert_ffn.register_kernel(("cpu", "cuda"))
def _(x_TD, *args):
    gate_TK, _activation, top_k, per_slot, _save_preact = args[-5:]
    return backends.for_ffn(x_TD, gate_TK, top_k, per_slot).expert_ffn_forward(x_TD, *args)


@expert_ffn.register_fake
def _(
    x_TD, order_S, offsets_E1, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK, activation, top_k, per_slot, save_preact
):
    rows = order_S.shape[0] if per_slot else x_TD.shape[0]
    saved = 2 * order_S.shape[0] if x_TD.is_cuda else cpu.preact_rows(x_TD, order_S.shape[0])
    preact_rows = saved if save_preact else 0
    return x_TD.new_empty(rows, x_TD.shape[1]), x_TD.new_empty(preact_rows, w1_EFD.shape[1])


@library.custom_op("moebert_kernels::expert_ffn_backward", mutates_args=())
def expert_ffn_backward(
    dy: Tensor,
    x_TD: Tensor,
    preact_SF: Tensor,
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
    """The gradients of `expert_ffn`, of x, w1, b1, w2, b2 and gate, each where `needs` says so."""
    return cpu.expert_ffn_backward(
        dy,
        x_TD,
        preact_SF,
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


@expert_ffn_backward.register_kernel(("cpu", "cuda"))
def _(dy, x_TD, *args):
    gate_TK, _activation, top_k, per_slot, _needs = args[-5:]
    return backends.for_ffn(x_TD, gate_TK, top_k, per_slot).expert_ffn_backward(dy, x_TD, *args)


@expert_ffn_backward.register_fake
def _(
    dy,
    x_TD,
    preact_SF,
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
):
    inputs = (x_TD, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK)
    shapes = [t.shape if need and t is not None else (0,) for t, need in zip(inputs, needs, strict=True)]
    if not needs[0]:
        shapes[0] = (0, x_TD.shape[1])
    *weights, dgate = (dy.new_empty(shape) for shape in shapes)
    return (*weights, dgate)


def _expert_ffn_setup(ctx, inputs, output):
    x_TD, order_S, offsets_E1, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK, *options, _save_preact = inputs
    ctx.save_for_backward(x_TD, output[1], order_S, offsets_E1, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK)
    ctx.options = options
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _expert_ffn_autograd(ctx, dy, _dpreact):
    if dy is None:
        return (None,) * 12
    need = ctx.needs_input_grad
    needs = [need[0], need[3], need[4], need[5], need[6], need[7]]
    saved = ctx.saved_tensors  # once: checkpointing refuses to unpack a tensor a second time
    grads = expert_ffn_backward(dy, *saved, *ctx.options, needs)
    dx, dw1, db1, dw2, db2, dgate = (g if n else None for g, n in zip(grads, needs, strict=True))
    if dgate is not None:
        dgate = dgate.to(saved[-1].dtype)
    return dx, None, None, dw1, db1, dw2, db2, dgate, None, None, None, None


expert_ffn.register_autograd(_expert_ffn_autograd, setup_context=_expert_ffn_setup)


@library.custom_op("moebert_kernels::expert_norm", mutates_args=())
def expert_norm(
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
    """y_t = sum_k g_tk * LayerNorm_e(dropout(z_tk) + residual_t), statistics in float32 or wider.

    Args:
        seed: int64 [1] that fixes the dropout mask, which is regenerated in backward and not stored; None
            without dropout.

    Returns:
        y_TD in the residual's dtype, and mean and reciprocal standard deviation of each slot [S].
    """
    return cpu.expert_norm_forward(
        z_SD, residual_TD, expert_ids_TK, order_S, offsets_E1, ln_w_ED, ln_b_ED, gate_TK, seed, eps, dropout_p
    )


@expert_norm.register_kernel(("cpu", "cuda"))
def _(z_SD, residual_TD, *args):
    ln_w_ED, ln_b_ED = args[3:5]
    backend = backends.for_norm(z_SD, residual_TD, ln_w_ED, ln_b_ED)
    return backend.expert_norm_forward(z_SD, residual_TD, *args)


@expert_norm.register_fake
def _(z_SD, residual_TD, expert_ids_TK, order_S, offsets_E1, ln_w_ED, ln_b_ED, gate_TK, seed, eps, dropout_p):
    dtype = torch.promote_types(residual_TD.dtype, torch.float32)
    stats = [z_SD.new_empty(z_SD.shape[0], dtype=dtype) for _ in range(2)]
    return residual_TD.new_empty(residual_TD.shape), *stats


@library.custom_op("moebert_kernels::expert_norm_backward", mutates_args=())
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
    """The gradients of `expert_norm`: of z, residual, ln_w, ln_b and, where asked for, of the gate."""
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


@expert_norm_backward.register_kernel(("cpu", "cuda"))
def _(dy_TD, z_SD, residual_TD, *args):
    ln_w_ED, ln_b_ED = args[5:7]
    backend = backends.for_norm(z_SD, residual_TD, ln_w_ED, ln_b_ED)
    return backend.expert_norm_backward(dy_TD, z_SD, residual_TD, *args)


@expert_norm_backward.register_fake
def _(
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
):
    dgate_shape = expert_ids_TK.shape if need_gate else (0,)
    return (
        z_SD.new_empty(z_SD.shape),
        residual_TD.new_empty(residual_TD.shape),
        ln_w_ED.new_empty(ln_w_ED.shape),
        ln_b_ED.new_empty(ln_b_ED.shape),
        mean_S.new_empty(dgate_shape),
    )


def _expert_norm_setup(ctx, inputs, output):
    (
        z_SD,
        residual_TD,
        expert_ids_TK,
        order_S,
        offsets_E1,
        ln_w_ED,
        ln_b_ED,
        gate_TK,
        seed,
        _eps,
        dropout_p,
    ) = inputs
    _, mean_S, rstd_S = output
    ctx.save_for_backward(
        z_SD, residual_TD, mean_S, rstd_S, expert_ids_TK, order_S, offsets_E1, ln_w_ED, ln_b_ED, gate_TK, seed
    )
    ctx.dropout_p = dropout_p
    ctx.mark_non_differentiable(mean_S, rstd_S)
    ctx.set_materialize_grads(False)


def _expert_norm_autograd(ctx, dy_TD, _dmean, _drstd):
    if dy_TD is None:
        return (None,) * 11
    need = ctx.needs_input_grad
    saved = ctx.saved_tensors  # once: checkpointing refuses to unpack a tensor a second time
    grads = expert_norm_backward(dy_TD, *saved, ctx.dropout_p, need[7])
    dz, dresidual, dln_w, dln_b, dgate = grads
    dgate = dgate.to(saved[9].dtype) if need[7] else None
    return dz, dresidual, None, None, None, dln_w, dln_b, dgate, None, None, None


expert_norm.register_autograd(_expert_norm_autograd, setup_context=_expert_norm_setup)
