"""Which backend computes a call.

Of those in `kernels`: `triton` on CUDA, `cpu` (C++ between torch's GEMMs) on the CPU, `torch` (plain PyTorch)
for all else.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebert_kernels.environment import why_not_triton
from moebert_kernels.kernels import cpu
from moebert_kernels.kernels import torch as plain
from moebert_kernels.kernels.call import NUM_TENSORS, Call, Gradients, Saved
from moebert_kernels.ops.arguments import check_call

_MOST_FORMS = 1024


class Form(NamedTuple):
    """What calls of the same shapes, dtypes, device and options have in common: they fit, and go this way."""

    backend: ModuleType
    kept: dict[Any, Any]

    def forward(self, call: Call, training: bool) -> tuple[Tensor, Saved]:
        """y_TD, and what `backward` needs if `training`."""
        return self.backend.forward(call, training, self.kept)

    def backward(self, call: Call, saved: Saved, dy_TD: Tensor, needs: Gradients) -> Gradients:
        """The gradients, at least those that `needs` says."""
        return self.backend.backward(call, saved, dy_TD, needs, self.kept)


_forms: dict[tuple[Any, ...], Form] = {}


def form_of(call: Call) -> Form:
    """The form of a call of tensors that have values.

    Raises:
        ValueError: its arguments do not fit together.
    """
    key = (
        *[None if t is None else (t.shape, t.dtype, t.device) for t in call.tensors],
        *call[NUM_TENSORS:],
    )
    form = _forms.get(key)
    if form is None:
        check_call(call)
        if len(_forms) >= _MOST_FORMS:
            _forms.clear()
        form = _forms[key] = Form(choose(call), {})
    return form


def choose(call: Call) -> ModuleType:
    """The backend of a call."""
    if call.x_TD.is_cuda:
        return on_cuda(call.x_TD)
    return cpu if cpu.serves(call) else plain


def on_cuda(x: Tensor) -> ModuleType:
    """Where CUDA tensors go: the Triton kernels, which do not do float64, or the PyTorch path."""
    return plain if x.dtype == torch.float64 else _triton_backend(x.device)


@cache
def _triton_backend(device: torch.device) -> ModuleType:
    problem = why_not_triton(device)
    if problem is None:
        try:
            from moebert_kernels.kernels import triton
        except ImportError as error:
            problem = f"Triton cannot be imported ({error})"
        else:
            return triton
    warnings.warn(
        f"moebert_kernels runs its slower PyTorch path on {device}, with a host synchronisation per call: "
        f"{problem}",
        stacklevel=2,
    )
    return plain
