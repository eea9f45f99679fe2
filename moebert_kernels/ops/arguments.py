"""What `moe_ffn` refuses: arguments of the wrong kind, and those that do not fit together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebert_kernels.activations import check_activation
from moebert_kernels.checks import check_number, check_tensor
from moebert_kernels.kernels.call import Call
from moebert_kernels.routing.plan import RoutingPlan

_PLAIN = frozenset((Tensor, nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}


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
