"""`moe_ffn`: the expert feed-forward network as one operator of PyTorch and its backward.

The two grouped GEMMs and, with `norm`, the residual sum and each expert's own LayerNorm. `backends` picks
what computes them. An eager call goes straight to that backend, under an `autograd.Function`; where a
compiler, tracer, mode or transform watches, the same two steps go through `torch.library`.

Notation as in `kernels.call`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from moebert_kernels.awaited import when_imported
from moebert_kernels.kernels import cpu
from moebert_kernels.kernels.call import NUM_TENSORS, Call, Gradients, Saved
from moebert_kernels.ops import flops
from moebert_kernels.ops.arguments import check_call, check_kinds
from moebert_kernels.ops.backends import Form, form_of
from moebert_kernels.routing.plan import RoutingPlan
from moebert_kernels.watchers import differentiated_by_transform, unwatched


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
    shared: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> Tensor:
    """Run every token through the experts its plan names (Eq. 1 and 2 of arXiv 2204.07675).

    With z_e(x) = W2_e act(W1_e x + b1_e) + b2_e and g = `gate_TK`, or 1/K where there is no gate,

        y_t = sum_k g_tk * z_e(x_t)                                     without `norm`
        y_t = sum_k g_tk * LayerNorm_e(dropout(z_e(x_t)) + residual_t)  with it, as in the authors' code

    summed over the slots that have an expert. A token without any is skipped: its output is 0 without
    `norm` and its residual with it. With `shared`, W2 act(W1 x + b1) of its three is part of every z_e(x).

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
        shared: w1 [C, D], b1 [C] (None where b1_EF is) and w2 [D, C] of C neurons that all experts have
            beside the F of their own, of x's dtype.

    Returns:
        [T, D] in x's dtype, or in the residual's dtype with `norm`. Under autocast x, weights and biases are
        cast to the autocast dtype in every call, and float64 is left alone, as for `nn.Linear`;
        `MoEFFN.keep_casts` keeps the casts of weights that no longer change.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: shapes, dtypes, devices or options do not fit; the message names the argument.
        NotImplementedError: an argument has a forward-mode tangent, or is differentiated by `torch.func`.
    """
    check_kinds(x_TD, plan, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK, norm, residual_TD, dropout_p, shared)
    shared_w1_CD, shared_b1_C, shared_w2_DC = shared or (None, None, None)
    device = x_TD.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        residual_TD = x_TD if norm and residual_TD is None else residual_TD
        dtype = torch.get_autocast_dtype(device)
        cast: list[Any] = [x_TD, w1_EFD, b1_EF, w2_EDF, b2_ED, shared_w1_CD, shared_b1_C, shared_w2_DC]
        x_TD, w1_EFD, b1_EF, w2_EDF, b2_ED, shared_w1_CD, shared_b1_C, shared_w2_DC = (
            t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in cast
        )
    ln_w_ED, ln_b_ED = norm or (None, None)
    call = Call(
        x_TD,
        plan.expert_ids_TK,
        plan.order_S,
        plan.inverse_S,
        plan.offsets_E1,
        w1_EFD,
        b1_EF,
        w2_EDF,
        b2_ED,
        gate_TK,
        ln_w_ED,
        ln_b_ED,
        residual_TD,
        # Drawn from torch's generator, so that manual_seed and checkpointing's state juggling govern it.
        torch.randint(2**62, (1,), device=x_TD.device) if 0 < dropout_p < 1 else None,
        shared_w1_CD,
        shared_b1_C,
        shared_w2_DC,
        activation,
        float(norm_eps),
        float(dropout_p),
    )
    tensors = call.tensors
    training = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    if not ((x_TD.is_cpu or x_TD.is_cuda) and unwatched(tensors)):
        check_call(call)
        _refuse_tangents(tensors)
        if differentiated_by_transform(tensors):
            raise NotImplementedError(
                "moe_ffn cannot be differentiated by transforms (torch.func.grad, vjp, jacrev): "
                "use torch.autograd.grad or backward()"
            )
        # A trace holds for both, and is compared with one made without gradients.
        return ffn(*call, training and not torch.jit.is_tracing())[0]
    form = form_of(call)
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    if training:
        return _apply(call, form, *[call[i] for i in _GRADIENT_OF])
    return form.forward(call, False)[0]


def _refuse_tangents(tensors: Sequence[Tensor | None]) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "moe_ffn has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad): "
            "use reverse mode"
        )


_TENSORS = (
    "Tensor x_TD, Tensor expert_ids_TK, Tensor order_S, Tensor inverse_S, Tensor offsets_E1, "
    "Tensor w1_EFD, Tensor? b1_EF, Tensor w2_EDF, Tensor? b2_ED, Tensor? gate_TK, "
    "Tensor? ln_w_ED, Tensor? ln_b_ED, Tensor? residual_TD, Tensor? seed, "
    "Tensor? shared_w1_CD, Tensor? shared_b1_C, Tensor? shared_w2_DC"
)
_CALL = f"{_TENSORS}, str activation, float norm_eps, float dropout_p"
_GRADIENT_OF = [Call._fields.index(name) for name in Gradients._fields]


@library.custom_op(
    "moebert_kernels::ffn",
    mutates_args=(),
    schema=f"({_CALL}, bool training) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def ffn(*arguments: Any) -> tuple[Tensor, ...]:
    """y_TD and the fields of `Saved`, for the arguments of a `Call` and whether to keep them for backward.

    An operator returns no None, and its shapes follow from those of its arguments: a 0-element tensor stands
    for what is not wanted, and zeros follow what a backend saves up to the most that one of this device may.
    """
    call, training = Call(*arguments[:-1]), arguments[-1]
    y_TD, saved = form_of(call).forward(call, training)
    shapes = _saved_shapes(call, training)
    return y_TD, *(_filled_up(t, *like, call.x_TD) for t, like in zip(saved, shapes, strict=True))


@ffn.register_fake
def _(*arguments):
    call, training = Call(*arguments[:-1]), arguments[-1]
    saved = (call.x_TD.new_empty(shape, dtype=dtype) for shape, dtype in _saved_shapes(call, training))
    return call.residual.new_empty(call.x_TD.shape), *saved


def _saved_shapes(call: Call, training: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the fields of `Saved` as the operator returns them."""
    S, F, C, D = call.order_S.shape[0], call.w1_EFD.shape[1], call.num_shared, call.x_TD.shape[1]
    on_cpu = call.x_TD.device.type == "cpu"
    # On the CPU experts' rows are filled up; on CUDA the kernels keep activations and slopes, shared and own.
    rows = cpu.most_rows(S, C) if on_cpu else 2 * S
    rows_of_z = rows if on_cpu else S
    with_norm = training and call.ln_w_ED is not None
    return [
        ((rows if training else 0, F if on_cpu else C + F), call.x_TD.dtype),
        ((rows_of_z if with_norm else 0, D), call.x_TD.dtype),
        ((2, S if with_norm else 0), call.norm_dtype),
        ((rows if training and on_cpu and C else 0, C), call.x_TD.dtype),
    ]


def _filled_up(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    if tensor is None:
        return like.new_empty(shape, dtype=dtype)
    if tensor.shape == shape:
        return tensor
    filled = tensor.new_zeros(shape)
    rows = tensor.view(-1, *shape[1:])
    filled[: rows.shape[0]] = rows
    return filled


@library.custom_op(
    "moebert_kernels::ffn_backward",
    mutates_args=(),
    schema=(
        f"({_CALL}, Tensor hidden, Tensor z, Tensor stats_2S, Tensor shared, Tensor dy_TD, bool[] needs) "
        f"-> ({', '.join(['Tensor'] * len(_GRADIENT_OF))})"
    ),
)
def ffn_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The fields of `Gradients` for a call of `ffn`; a 0-element tensor for each that `needs` omits."""
    of_call, (*saved, dy_TD, needs) = arguments[: len(Call._fields)], arguments[len(Call._fields) :]
    call = Call(*of_call)
    grads = form_of(call).backward(call, Saved(*saved), dy_TD, Gradients(*needs))
    return tuple(
        grad.to(of_call[i].dtype) if need and grad is not None else call.x_TD.new_empty(0)
        for i, grad, need in zip(_GRADIENT_OF, grads, needs, strict=True)
    )


@ffn_backward.register_fake
def _(*arguments):
    of_call, needs = arguments[: len(Call._fields)], arguments[-1]
    return tuple(
        of_call[i].new_empty(of_call[i].shape) if need else of_call[0].new_empty(0)
        for i, need in zip(_GRADIENT_OF, needs, strict=True)
    )


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise NotImplementedError("moe_ffn has no second derivative")


ffn_backward.register_autograd(_refuse_second_derivative)


def _save(ctx: Any, call: Sequence[Any], saved: Sequence[Tensor | None]) -> None:
    ctx.save_for_backward(*call[:NUM_TENSORS], *saved)
    ctx.options = call[NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *call, ctx.training = inputs
    _save(ctx, call, output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, dy_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of all arguments of `ffn`."""
    found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if dy_TD is not None:
        # Once: checkpointing refuses to unpack a tensor a second time.
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        needs = [wanted[i] for i in _GRADIENT_OF]
        call, of_forward = (*saved[:NUM_TENSORS], *ctx.options), saved[NUM_TENSORS:]
        if not ctx.training:
            _, *of_forward = ffn(*call, True)
        for i, grad, need in zip(
            _GRADIENT_OF, ffn_backward(*call, *of_forward, dy_TD, needs), needs, strict=True
        ):
            found[i] = grad if need else None
    return tuple(found)


ffn.register_autograd(_gradients, setup_context=_setup)


class _DirectFFN(torch.autograd.Function):
    """`ffn` and its backward past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, call: Call, form: Form, *_differentiable: Tensor | None) -> Tensor:
        # With setup_context apart, apply() would look up this function's signature in every call.
        y_TD, saved = form.forward(call, True)
        _save(ctx, call, saved)
        ctx.form = form
        return y_TD

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = Gradients(*ctx.needs_input_grad[2:])
        if dy_TD is None:
            return None, None, *[None] * len(needs)
        saved = ctx.saved_tensors
        call = Call(*saved[:NUM_TENSORS], *ctx.options)
        # With create_graph someone may ask for a second derivative: the operator says that it has none.
        if torch.is_grad_enabled() or not unwatched((dy_TD,)):
            grads: Any = ffn_backward(*call, *saved[NUM_TENSORS:], dy_TD, list(needs))
        else:
            grads = ctx.form.backward(call, Saved(*saved[NUM_TENSORS:]), dy_TD, needs)
        return None, None, *[grad if need else None for grad, need in zip(grads, needs, strict=True)]


# Without what `apply` of PyTorch's class does about transforms: there are none.
_apply = super(torch.autograd.Function, _DirectFFN).apply


when_imported("torch.utils.flop_counter", flops.register)  # it imports Triton, which takes a second
