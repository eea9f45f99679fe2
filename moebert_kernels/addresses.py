"""Addresses of tensors, for code that takes them raw: csrc/ and the kernels that Triton has compiled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def address(tensor: Tensor | None, device: torch.device = _CPU) -> int:
    """Where native code finds a tensor's elements; 0 for None. Every pointer that goes there is made here.

    Raises:
        ValueError: the tensor lies on another device, has gaps between its elements, or has lost its memory,
            as a sharded parameter between its uses has: native code would read or write somewhere else.
    """
    if tensor is None:
        return 0
    # On the CPU, where it is asked for each row kernel, without making a torch.device.
    if not (tensor.is_cpu if device is _CPU else tensor.device == device):
        raise ValueError(f"a tensor on {tensor.device} goes to native code that works on {device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"native code needs contiguous tensors: shape {tuple(tensor.shape)}, strides {tensor.stride()}"
        )
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no memory: its storage was freed")
    return place


def addresses_of(
    tensors: Sequence[Tensor | None], alignment: int = 1
) -> tuple[Sequence[Tensor | None], list[int]]:
    """Tensors with their elements in order, and their addresses; of floats, multiples of `alignment`.

    What is not so is copied; the address of None is 0. Where they lie is not looked at.

    Raises:
        ValueError: a tensor has lost its memory.
    """
    if not all([t is None or t.is_contiguous() for t in tensors]):
        tensors = [None if t is None else t.contiguous() for t in tensors]
    addresses = [0 if t is None else t.data_ptr() or address(t, t.device) for t in tensors]
    if reduce(or_, addresses) % alignment:
        tensors = [
            t.clone() if at % alignment and t is not None and t.is_floating_point() else t
            for t, at in zip(tensors, addresses, strict=True)
        ]
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
    return tensors, addresses
