"""The activation functions an expert may have, with the derivatives the backward passes need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def check_activation(name: str) -> None:
    """Raise a ValueError that lists the known names unless `name` is one of them."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")


def activate(name: str, h: Tensor) -> Tensor:
    """act(h): "gelu" is the exact erf form, "gelu_tanh" its tanh approximation."""
    if name == "gelu":
        return F.gelu(h)
    if name == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if name == "relu":
        return F.relu(h)
    return F.silu(h)


def activate_backward(name: str, da: Tensor, h: Tensor) -> Tensor:
    """da * act'(h), by the fused kernels torch differentiates these functions with."""
    if name == "gelu":
        return torch.ops.aten.gelu_backward(da, h)
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(da, h, approximate="tanh")
    if name == "relu":
        return torch.ops.aten.threshold_backward(da, h, 0)
    return torch.ops.aten.silu_backward(da, h)
