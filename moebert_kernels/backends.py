"""Which backend computes a call.

A backend is a module with `forward(call, training)` and `backward(call, saved, dy_TD, needs)`: `kernels`
(Triton) on CUDA, `cpu_native` (C++ between torch's GEMMs) on the CPU, `cpu` (plain PyTorch) for all else.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from moebert_kernels import cpu, cpu_native, native
from moebert_kernels.arguments import Call
from moebert_kernels.environment import why_not_triton


def choose(call: Call) -> ModuleType:
    """The backend of a call."""
    if call.x_TD.is_cuda:
        return on_cuda(call.x_TD)
    return cpu_native if cpu_native.serves(call) and native.row_kernels() is not None else cpu


def on_cuda(x: Tensor) -> ModuleType:
    """Where CUDA tensors go: the Triton kernels, which do not do float64, or the PyTorch path."""
    return cpu if x.dtype == torch.float64 else _triton_backend(x.device)


@cache
def _triton_backend(device: torch.device) -> ModuleType:
    problem = why_not_triton(device)
    if problem is None:
        try:
            from moebert_kernels import kernels
        except ImportError as error:
            problem = f"Triton cannot be imported ({error})"
        else:
            return kernels
    warnings.warn(
        f"moebert_kernels runs its slower PyTorch path on {device}, with a host synchronisation per call: "
        f"{problem}",
        stacklevel=2,
    )
    return cpu
