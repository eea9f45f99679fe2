"""The arguments of `moe_ffn`: checked, and in the form in which the operator and every backend take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moebert_kernels.activations import check_activation
from moebert_kernels.checks import check_number, check_tensor
from moebert_kernels.routing.plan import RoutingPlan

_PLAIN = frozenset((Tensor, nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}


class Call(NamedTuple):
    """One call of the operator: `moe_ffn`'s arguments, the plan's tables among them, after any autocast.

    The norm's two are None without norm, `residual_TD` where it is x itself, `seed` (int64 [1], which fixes
    the dropout mask) without dropout, the last three where experts share no neurons.
    """

    x_TD: Tensor
    expert_ids_TK: Tensor
    order_S: Tensor
    inverse_S: Tensor
    offsets_E1: Tensor
    w1_EFD: Tensor
    b1_EF: Tensor | None
    w2_EDF: Tensor
    b2_ED: Tensor | None
    gate_TK: Tensor | None
    ln_w_ED: Tensor | None
    ln_b_ED: Tensor | None
    residual_TD: Tensor | None
    seed: Tensor | None
    shared_w1_CD: Tensor | None
    shared_b1_C: Tensor | None
    shared_w2_DC: Tensor | None
    activation: str
    norm_eps: float
    dropout_p: float

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Those that come first, None for each that there is not."""
        return self[:NUM_TENSORS]

    @property
    def top_k(self) -> int:
        """K, the experts a token may use."""
        return self.expert_ids_TK.shape[1]

    @property
    def num_shared(self) -> int:
        """C, the neurons that all experts have; F counts none of them."""
        return 0 if self.shared_w1_CD is None else self.shared_w1_CD.shape[0]

    @property
    def residual(self) -> Tensor:
        """What the norm adds to the experts' output."""
        return self.x_TD if self.residual_TD is None else self.residual_TD


NUM_TENSORS = Call._fields.index("activation")


class Saved(NamedTuple):
    """What a backend's forward leaves for its own backward, in rows of its own order; None where unused.

    `hidden` are pre-activations, or activations and slopes: [*, F], and of shared neurons `shared` [*, C], or
    both in `hidden`, [*, C + F]; with norm `z` [*, D] the experts' outputs, `stats_2S` mean and 1/std of each
    slot, float32 or wider.
    """

    hidden: Tensor | None
    z: Tensor | None
    stats_2S: Tensor | None
    shared: Tensor | None = None


class Gradients(NamedTuple):
    """One thing for each argument that has a gradient: the gradient or None, or whether it is wanted.

    Where the residual is x, its gradient is part of `x_TD`'s.
    """

    x_TD: Any
    w1_EFD: Any
    b1_EF: Any
    w2_EDF: Any
    b2_ED: Any
    gate_TK: Any
    ln_w_ED: Any
    ln_b_ED: Any
    residual_TD: Any
    shared_w1_CD: Any
    shared_b1_C: Any
    shared_w2_DC: Any


def check_kinds(x_TD, plan, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK, norm, residual_TD, dropout_p, shared):
    """Raise a TypeError that names what is not even of the right kind."""
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan must be a RoutingPlan, got {type(plan).__name__}")
    if norm is not None and not (isinstance(norm, tuple | list) and len(norm) == 2):
        raise TypeError(f"norm must be a pair of tensors, weight and bias, got {type(norm).__name__}")
    if shared is not None and not (isinstance(shared, tuple | list) and len(shared) == 3):
        raise TypeError(f"shared must be three, w1_CD, b1_C or None, and w2_DC, got {type(shared).__name__}")
    w1_CD, b1_C, w2_DC = shared or (None, None, None)
    needed = (x_TD, w1_EFD, w2_EDF, *(norm or ()), *(() if shared is None else (w1_CD, w2_DC)))
    optional = (b1_EF, b2_ED, gate_TK, residual_TD, b1_C)
    if not (_PLAIN.issuperset(map(type, needed)) and _PLAIN_OR_NONE.issuperset(map(type, optional))):
        names = ["x_TD", "w1_EFD", "w2_EDF", *(("norm's weight", "norm's bias") if norm else ())]
        for name, tensor in zip([*names, "shared's w1_CD", "shared's w2_DC"], needed, strict=False):
            check_tensor(name, tensor)
        names = ["b1_EF", "b2_ED", "gate_TK", "residual_TD", "shared's b1_C"]
        for name, tensor in zip(names, optional, strict=True):
            if tensor is not None:
                check_tensor(name, tensor)
    check_number("dropout_p", dropout_p)


def check_call(call: Call) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: names the argument, what was found and what was expected.
    """
    check_activation(call.activation)
    w1_EFD, (T, K) = call.w1_EFD, call.expert_ids_TK.shape
    if w1_EFD.dim() != 3:
        raise ValueError(f"w1_EFD must have shape [E, F, D], got {tuple(w1_EFD.shape)}")
    E, F, D = w1_EFD.shape
    if call.offsets_E1.shape != (E + 1,):
        raise ValueError(f"plan is for {call.offsets_E1.shape[0] - 1} experts, but w1_EFD has {E}")
    device, dtype, one_per_slot = w1_EFD.device, call.x_TD.dtype, (T * K,)
    C = call.num_shared
    if call.shared_w1_CD is not None and (call.shared_w1_CD.dim() != 2 or not C):
        raise ValueError(
            f"shared[0] must have shape [C, D], C at least 1, got {tuple(call.shared_w1_CD.shape)}"
        )
    if call.shared_w1_CD is not None and (call.shared_b1_C is None) != (call.b1_EF is None):
        raise ValueError("shared[1] and b1_EF must both be given, or both be None")
    tensor: Tensor | None
    shape: tuple[int, ...]
    for name, tensor, shape in (
        ("expert_ids_TK", call.expert_ids_TK, (T, K)),
        ("order_S", call.order_S, one_per_slot),
        ("inverse_S", call.inverse_S, one_per_slot),
        ("offsets_E1", call.offsets_E1, (E + 1,)),
    ):
        if tensor.device != device:
            raise ValueError(f"plan is on {tensor.device}, but w1_EFD is on {device}")
        if tensor.dtype != torch.int32:
            raise ValueError(f"plan.{name} must be int32, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(
                f"plan.{name} must have shape {tuple(shape)} to fit plan.expert_ids_TK (T={T}, K={K}), "
                f"got {tuple(tensor.shape)}"
            )
    for name, tensor, shape, expected in (
        ("x_TD", call.x_TD, (T, D), dtype),
        ("w1_EFD", w1_EFD, (E, F, D), dtype),
        ("w2_EDF", call.w2_EDF, (E, D, F), dtype),
        ("b1_EF", call.b1_EF, (E, F), dtype),
        ("b2_ED", call.b2_ED, (E, D), dtype),
        ("gate_TK", call.gate_TK, (T, K), None),
        ("residual_TD", call.residual_TD, (T, D), None),
        ("norm[0]", call.ln_w_ED, (E, D), None),
        ("norm[1]", call.ln_b_ED, (E, D), None),
        ("shared[0]", call.shared_w1_CD, (C, D), dtype),
        ("shared[1]", call.shared_b1_C, (C,), dtype),
        ("shared[2]", call.shared_w2_DC, (D, C), dtype),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to fit the plan (T={T}, K={K}) and w1_EFD "
                f"(E={E}, F={F}, D={D}), got {tuple(tensor.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but w1_EFD is on {device}")
        if expected is not None and tensor.dtype != expected:
            raise ValueError(
                f"{name} must have x_TD's dtype {dtype}, got {tensor.dtype}: cast one, or use autocast"
            )
    if call.ln_w_ED is None and call.residual_TD is not None:
        raise ValueError("residual_TD is added before the experts' LayerNorm and needs norm; got norm=None")
    if call.ln_w_ED is None and call.dropout_p:
        raise ValueError(f"dropout_p={call.dropout_p} needs norm; without it, apply dropout to the result")
    if not 0 <= call.dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {call.dropout_p}")
