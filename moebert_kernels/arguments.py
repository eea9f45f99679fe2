"""The arguments of `moe_ffn`, checked."""

from __future__ import annotations

import torch
from torch import Tensor

from moebert_kernels.activations import check_activation
from moebert_kernels.checks import check_number, check_tensor
from moebert_kernels.routing.plan import RoutingPlan


def check_kinds(x_TD, plan, w1_EFD, b1_EF, w2_EDF, b2_ED, gate_TK, norm, residual_TD, dropout_p):
    """Raise a TypeError that names what is not even of the right kind."""
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan must be a RoutingPlan, got {type(plan).__name__}")
    for name, tensor in (("x_TD", x_TD), ("w1_EFD", w1_EFD), ("w2_EDF", w2_EDF)):
        check_tensor(name, tensor)
    for name, tensor in (
        ("b1_EF", b1_EF),
        ("b2_ED", b2_ED),
        ("gate_TK", gate_TK),
        ("residual_TD", residual_TD),
    ):
        if tensor is not None:
            check_tensor(name, tensor)
    if norm is not None:
        if not isinstance(norm, tuple | list) or len(norm) != 2:
            raise TypeError(f"norm must be a pair of tensors, weight and bias, got {type(norm).__name__}")
        check_tensor("norm's weight", norm[0])
        check_tensor("norm's bias", norm[1])
    check_number("dropout_p", dropout_p)


def check_arguments(
    x_TD: Tensor,
    plan: RoutingPlan,
    w1_EFD: Tensor,
    b1_EF: Tensor | None,
    w2_EDF: Tensor,
    b2_ED: Tensor | None,
    gate_TK: Tensor | None,
    activation: str,
    norm: tuple[Tensor, Tensor] | None,
    residual_TD: Tensor | None,
    dropout_p: float,
) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: names the argument, what was found and what was expected.
    """
    check_activation(activation)
    if w1_EFD.dim() != 3:
        raise ValueError(f"w1_EFD must have shape [E, F, D], got {tuple(w1_EFD.shape)}")
    E, F, D = w1_EFD.shape
    T, K = plan.expert_ids_TK.shape
    if plan.num_experts != E:
        raise ValueError(f"plan is for {plan.num_experts} experts, but w1_EFD has {E}")
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("x_TD", x_TD, (T, D)),
        ("w2_EDF", w2_EDF, (E, D, F)),
        ("b1_EF", b1_EF, (E, F)),
        ("b2_ED", b2_ED, (E, D)),
        ("gate_TK", gate_TK, (T, K)),
        ("residual_TD", residual_TD, (T, D)),
        *((f"norm[{i}]", t, (E, D)) for i, t in enumerate(norm or ())),
    ]
    device = w1_EFD.device
    _check_plan(plan, device)
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} to fit the plan (T={T}, K={K}) and w1_EFD "
                f"(E={E}, F={F}, D={D}), got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but w1_EFD is on {device}")
    for name, tensor in (("w1_EFD", w1_EFD), ("w2_EDF", w2_EDF), ("b1_EF", b1_EF), ("b2_ED", b2_ED)):
        if tensor is not None and tensor.dtype != x_TD.dtype:
            raise ValueError(
                f"{name} must have x_TD's dtype {x_TD.dtype}, got {tensor.dtype}: cast one, or use autocast"
            )
    if norm is None and residual_TD is not None:
        raise ValueError("residual_TD is added before the experts' LayerNorm and needs norm; got norm=None")
    if norm is None and dropout_p:
        raise ValueError(f"dropout_p={dropout_p} needs norm; without it, apply dropout to the result")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")


def _check_plan(plan: RoutingPlan, device: torch.device) -> None:
    """Refuse a plan whose tables would be read as something else, or somewhere else."""
    T, K = plan.expert_ids_TK.shape
    for name, shape in (
        ("expert_ids_TK", (T, K)),
        ("order_S", (T * K,)),
        ("inverse_S", (T * K,)),
        ("offsets_E1", plan.offsets_E1.shape),
    ):
        tensor = getattr(plan, name)
        if tensor.device != device:
            raise ValueError(f"plan is on {tensor.device}, but w1_EFD is on {device}")
        if tensor.dtype != torch.int32:
            raise ValueError(f"plan.{name} must be int32, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(
                f"plan.{name} must have shape {tuple(shape)} to fit plan.expert_ids_TK (T={T}, K={K}), "
                f"got {tuple(tensor.shape)}"
            )
