"""Autocast's casts of parameters, made once per change of the parameter instead of once per call.

A layer's experts are E times the weights one token uses: casting them costs more than the layer itself when
tokens are few, and torch's own cache ends with each autocast region. The casts here live until the parameter
is written to (its version counter or storage changes) or an optimiser steps.

A write that autograd cannot see, `parameter.data.copy_(...)` outside an optimiser's step, is invisible here
too: write under `torch.no_grad()` instead. Compiled code and CUDA graphs under capture cast on every call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary


class _Entry(NamedTuple):
    state: tuple
    value: Tensor


_casts = WeakTensorKeyDictionary()
_watching_optimisers = False


def cast_parameter(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, differentiable; for an `nn.Parameter` in eager mode from the cache."""
    if (
        tensor.dtype == dtype
        or type(tensor) is not nn.Parameter
        or tensor.is_inference()
        or torch.compiler.is_compiling()
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return tensor.to(dtype)
    return _CachedCast.apply(tensor, dtype)


class _CachedCast(torch.autograd.Function):
    @staticmethod
    def forward(parameter: Tensor, dtype: torch.dtype) -> Tensor:
        return _cached(parameter, dtype).detach()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def _cached(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    _watch_optimisers()
    # A cast made in inference mode may not be saved for backward, one of another stream may not be ready.
    stream = torch.cuda.current_stream(parameter.device).stream_id if parameter.is_cuda else 0
    state = (dtype, parameter._version, parameter.data_ptr(), torch.is_inference_mode_enabled(), stream)
    entry = _casts.get(parameter)
    if entry is None or entry.state != state:
        entry = _Entry(state, parameter.detach().to(dtype))
        _casts[parameter] = entry
    return entry.value


def _watch_optimisers() -> None:
    """Some optimisers write through `.data`: after any step, every cast is stale."""
    global _watching_optimisers
    if not _watching_optimisers:
        _watching_optimisers = True
        register_optimizer_step_post_hook(_after_step)


def _after_step(*_) -> None:
    _casts.clear()
