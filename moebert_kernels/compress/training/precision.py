"""Computing in bfloat16: whether this machine can, and how."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from transformers.utils import is_torch_bf16_gpu_available

from moebert_kernels.errors import ArgumentError


def check_bf16(bf16: bool) -> None:
    """Refuse bfloat16 on a GPU that has none; every CPU computes it, though not every one faster.

    Raises:
        UserError: the GPU has none.
    """
    if bf16 and torch.cuda.is_available() and not is_torch_bf16_gpu_available():
        name = torch.cuda.get_device_name()
        raise ArgumentError("bf16", f"does not run on {name}, which computes no bfloat16: leave it out")


def computing(bf16: bool) -> AbstractContextManager[object]:
    """Have encoders' matrix products computed in bfloat16 inside, by autocast, if `bf16`.

    Raises:
        UserError: the GPU computes none.
    """
    check_bf16(bf16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16, enabled=bf16)
