"""How kernels are started: one door, so that what production launches can be recorded and read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moebert_kernels.kernels.call import NUM_TENSORS, Call


class Launch(NamedTuple):
    """One kernel launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Recorder(threading.local):
    """Where this thread notes launches; None where it runs them."""

    record: list[Launch] | None = None


_recorder = _Recorder()


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, this thread's kernels are not run but noted, in order. Meta tensors need no device."""
    record: list[Launch] = []
    before, _recorder.record = _recorder.record, record
    try:
        yield record
    finally:
        _recorder.record = before


def is_recording() -> bool:
    """Whether this thread's kernels are noted in the place of being run."""
    return _recorder.record is not None


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Start `kernel` on the current stream unless its grid is empty."""
    if 0 in grid:
        return
    if _recorder.record is not None:
        _recorder.record.append(Launch(kernel, grid, arguments))
    else:
        kernel[grid](**arguments)


_HERE: AbstractContextManager[None] = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's device the current one: Triton launches there and not where its arguments are."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def in_order(call: Call) -> Call:
    """The same call with the elements of every tensor in order."""
    tensors: list[Any] = [None if t is None else t.contiguous() for t in call.tensors]
    return Call(*tensors, *call[NUM_TENSORS:])


def rows_are_aligned(matrix: Tensor) -> bool:
    """Whether the compiler knows that rows can be loaded 16 bytes at a time: what Triton specialises on."""
    return matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0


def descriptor_fits(tensor: Tensor) -> bool:
    """Whether a TMA descriptor can describe a contiguous tensor: 16-byte aligned rows, nothing empty."""
    return (
        tensor.numel() > 0
        and tensor.is_contiguous()
        and tensor.shape[-1] * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def describe(tensor: Tensor, *block: int) -> TensorDescriptor:
    """A TMA descriptor, passed by value at launch: it is captured in a CUDA graph like any argument."""
    return TensorDescriptor.from_tensor(tensor, list(block))


def weight(w: Tensor, tma: bool, *block: int) -> Tensor | TensorDescriptor:
    """An expert weight [E, *, *] as kernels take it: with `tma` as a descriptor of [1, *block] tiles."""
    return describe(w, 1, *block) if tma else w


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient rounded up."""
    return -(-numerator // denominator)


def most_row_tiles(num_slots: int, num_experts: int, tile_rows: int) -> int:
    """Bound of row tiles: every expert, and the slots without one, may leave one unfilled."""
    return min(num_slots, ceil_div(num_slots, tile_rows) + num_experts)


@cache
def groups_of(num_experts: int) -> int:
    """The power of two that holds every expert and the group of slots without one."""
    return triton.next_power_of_2(num_experts + 1)
