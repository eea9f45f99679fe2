"""Which implementation runs an operator: Triton on CUDA, C++ row kernels on the CPU, plain PyTorch else."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from moebert_kernels import cpu, cpu_native, native
from moebert_kernels.cpu_rows import DTYPES


def for_ffn(x_TD: Tensor, gate_TK: Tensor | None, top_k: int, per_slot: bool) -> ModuleType:
    """The module that has `expert_ffn_forward` and `expert_ffn_backward` for such a call."""
    if x_TD.device.type == "cuda":
        return _cuda_backend(x_TD)
    served = x_TD.dtype in DTYPES and gate_TK is None and (top_k == 1 or per_slot)
    return cpu_native if served and native.row_kernels() is not None else cpu


def for_norm(z_SD: Tensor, residual_TD: Tensor, ln_w_ED: Tensor, ln_b_ED: Tensor) -> ModuleType:
    """The module that has `expert_norm_forward` and `expert_norm_backward` for such a call."""
    if z_SD.device.type == "cuda":
        return _cuda_backend(z_SD)
    served = _serves_norm(z_SD.dtype, residual_TD, ln_w_ED, ln_b_ED)
    return cpu_native if served and native.row_kernels() is not None else cpu


def runs_eagerly(
    x_TD: Tensor,
    gate_TK: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    residual_TD: Tensor | None,
    top_k: int,
) -> bool:
    """Whether `cpu_eager` serves such a call, and nobody but autograd watches operators."""
    if x_TD.dtype not in DTYPES or not _may_skip_dispatch(x_TD):
        return False
    if norm is None:
        served = gate_TK is None and top_k == 1
    else:
        served = _serves_norm(x_TD.dtype, x_TD if residual_TD is None else residual_TD, *norm)
    return served and native.row_kernels() is not None


def _serves_norm(z_dtype: torch.dtype, residual_TD: Tensor, ln_w_ED: Tensor, ln_b_ED: Tensor) -> bool:
    served = z_dtype in DTYPES and residual_TD.dtype in DTYPES and ln_w_ED.dtype in DTYPES
    return served and ln_b_ED.dtype == ln_w_ED.dtype


def _may_skip_dispatch(x: Tensor) -> bool:
    """Whether there is no compiler, mode, subclass or transform: a custom operator would add nothing."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _cuda_backend(x: Tensor) -> ModuleType:
    """Where CUDA tensors go: the Triton kernels, which do not do float64, or the PyTorch path."""
    return cpu if x.dtype == torch.float64 else _triton_backend()


@cache
def _triton_backend() -> ModuleType:
    try:
        from moebert_kernels import kernels
    except ImportError as error:
        warnings.warn(
            f"moebert_kernels runs its slower PyTorch path on CUDA, with a host synchronisation per call: "
            f"Triton cannot be imported ({error})",
            stacklevel=2,
        )
        return cpu
    return kernels
