"""The door to csrc/: routing plans in C++ and CUDA, the CPU's row kernels. Without it slower, never broken.

Notation: L layers, T tokens, S = T * K slots, E experts, V vocabulary.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ABI_VERSION = 3  # kAbiVersion in csrc/bindings.cpp
_RECORD = "_native_missing.txt"  # RECORD in setup.py
_INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "the compiler's default instructions"}
_MAX_SLOTS = 2**31 - 1
_MAX_CUDA_EXPERTS = 256
_MAX_CUDA_LAYERS = 65535
_CPU = torch.device("cpu")


class PlanTensors(NamedTuple):
    """The plans of all layers, int32 and contiguous, on the device of the ids they were built from.

    Attributes:
        slots_3LS: `expert_ids_LS`, `order_LS` and `inverse_LS`, in this order. One storage, because freeing
            three large ones makes the C library give their pages back: touching fresh pages in the next
            call costs several times what building the plans does.
        counts_LE: the slots of each expert.
        offsets_LE1: exclusive prefix sums of the counts; `offsets[E]` is the number of routed slots.
        num_invalid: the unmasked token ids outside [0, V), on a GPU 0-dim; None for plans from expert ids,
            whose only launch on a GPU would otherwise be preceded by another, for a zero.
    """

    slots_3LS: Tensor
    counts_LE: Tensor
    offsets_LE1: Tensor
    num_invalid: Tensor | int | None

    @property
    def expert_ids_LS(self) -> Tensor:
        """The expert of each slot, -1 where it has none."""
        return self.slots_3LS[0]

    @property
    def order_LS(self) -> Tensor:
        """Per layer, the slots sorted stably by expert, those without an expert last."""
        return self.slots_3LS[1]

    @property
    def inverse_LS(self) -> Tensor:
        """Per layer, the inverse permutation: `inverse[order[i]] == i`."""
        return self.slots_3LS[2]


@dataclass(frozen=True)
class NativeStatus:
    """Which native parts this installation has.

    Attributes:
        cpu: plans on the host are built in C++, rows on the CPU handled by kernels in C++.
        cpu_detail: the compiler it was built with, or why it is absent.
        cuda: plans on CUDA devices are built by a CUDA kernel.
        cuda_detail: the toolkit and architectures it was built for, or why it is absent.
        rows_detail: the instruction set that the CPU's row kernels use here, or why they are absent.
    """

    cpu: bool
    cpu_detail: str
    cuda: bool
    cuda_detail: str
    rows_detail: str


def status() -> NativeStatus:
    """Say which native parts are present and why others are not; loads the extension, warns of nothing."""
    extension, problem = _load()
    if extension is None:
        return NativeStatus(False, problem, False, problem, problem)
    rows = _INSTRUCTION_SETS.get(extension.ROW_KERNELS, extension.ROW_KERNELS)
    if not extension.HAS_CUDA:
        return NativeStatus(True, extension.COMPILER, False, extension.NO_CUDA_REASON, rows)
    built_for = f"CUDA {extension.CUDA_VERSION}: {extension.CUDA_ARCHS}"
    return NativeStatus(True, extension.COMPILER, True, built_for, rows)


def row_kernels() -> Any | None:
    """The extension, whose row kernels `cpu_rows` and others call, or None after one warning."""
    extension, problem = _load()
    if extension is None:
        _warn_once(problem)
    return extension


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


def build_plans_from_expert_ids(expert_ids_LS: Tensor, num_experts: int) -> PlanTensors | None:
    """Sort the slots of L layers by expert, all layers in one call.

    On a CUDA device: one launch (two from 8193 slots on), on the current stream, no host synchronisation.

    Args:
        expert_ids_LS: [L, S], int32 or int64; an id outside [0, E) means no expert.
        num_experts: E.

    Returns:
        The plans, or None where no native part serves this device, dtype or size: build them in PyTorch.

    Raises:
        ValueError: `expert_ids_LS` is not two-dimensional, or `num_experts` is less than 1.
    """
    if expert_ids_LS.dim() != 2:
        raise ValueError(f"expert_ids_LS must have shape [L, S], got {tuple(expert_ids_LS.shape)}")
    num_layers, num_slots = expert_ids_LS.shape
    extension = _extension_for(expert_ids_LS, num_layers, num_slots, num_experts)
    if extension is None:
        return None
    expert_ids_LS = expert_ids_LS.contiguous()
    device = expert_ids_LS.device
    plans = _empty_plans(num_layers, num_slots, num_experts, device)
    source = (address(expert_ids_LS, device), expert_ids_LS.element_size())
    sizes = (num_layers, num_slots, num_experts)
    if device.type == "cpu":
        extension.from_expert_ids_cpu(*source, *sizes, *_addresses(plans), torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            workspace = _workspace(extension, sizes, device)
            stream = torch.cuda.current_stream().cuda_stream
            places = (*_addresses(plans), address(workspace, device))
            extension.from_expert_ids_cuda(*source, *sizes, *places, stream)
    return plans


def build_plans_from_input_ids(
    input_ids_T: Tensor, tables_LV: Tensor, mask_T: Tensor | None, num_experts: int
) -> PlanTensors | None:
    """Look up the expert of every token in every layer's table and sort the tokens by it, in one call.

    Token ids outside [0, V) are never looked up: the token gets no expert and counts in `num_invalid`. Masked
    tokens get no expert either, and their ids are not looked at: padding may hold anything.

    On a CUDA device: one launch (two from 8193 tokens on), on the current stream, no host synchronisation.

    Args:
        input_ids_T: [T], int32 or int64.
        tables_LV: [L, V], int32; an entry outside [0, E) means no expert.
        mask_T: [T], bool, False at padding; None where there is none.
        num_experts: E.

    Returns:
        The plans (S = T), or None where no native part serves this device, dtype or size: build them in
        PyTorch.

    Raises:
        TypeError: `tables_LV` is not int32, or `mask_T` not bool.
        ValueError: shapes or devices do not fit, or `num_experts` is less than 1.
    """
    _check_tables(input_ids_T, tables_LV, mask_T)
    num_layers, vocab_size = tables_LV.shape
    num_tokens = input_ids_T.shape[0]
    extension = _extension_for(input_ids_T, num_layers, num_tokens, num_experts)
    if extension is None or vocab_size == 0 or num_layers == 0:
        return None
    input_ids_T, tables_LV = input_ids_T.contiguous(), tables_LV.contiguous()
    mask_T = None if mask_T is None else mask_T.contiguous()
    device = input_ids_T.device
    plans = _empty_plans(num_layers, num_tokens, num_experts, device)
    source = (
        address(input_ids_T, device),
        input_ids_T.element_size(),
        address(mask_T, device),
        address(tables_LV, device),
        vocab_size,
    )
    sizes = (num_layers, num_tokens, num_experts)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        num_invalid = extension.from_input_ids_cpu(*source, *sizes, *_addresses(plans), threads)
    else:
        num_invalid = torch.empty((), dtype=torch.int32, device=device)
        with torch.cuda.device(device):
            workspace = _workspace(extension, sizes, device)
            stream = torch.cuda.current_stream().cuda_stream
            extension.from_input_ids_cuda(
                *source,
                *sizes,
                *_addresses(plans),
                address(num_invalid, device),
                address(workspace, device),
                stream,
            )
    return plans._replace(num_invalid=num_invalid)


def _check_tables(input_ids_T: Tensor, tables_LV: Tensor, mask_T: Tensor | None) -> None:
    if input_ids_T.dim() != 1:
        raise ValueError(f"input_ids_T must have shape [T], got {tuple(input_ids_T.shape)}")
    if tables_LV.dim() != 2:
        raise ValueError(f"tables_LV must have shape [L, V], got {tuple(tables_LV.shape)}")
    if tables_LV.dtype != torch.int32:
        raise TypeError(f"tables_LV must be int32, got {tables_LV.dtype}")
    if tables_LV.device != input_ids_T.device:
        raise ValueError(f"tables_LV is on {tables_LV.device}, input_ids_T on {input_ids_T.device}")
    if mask_T is None:
        return
    if mask_T.dtype != torch.bool:
        raise TypeError(f"mask_T must be bool, got {mask_T.dtype}")
    if mask_T.shape != input_ids_T.shape:
        raise ValueError(f"mask_T must have shape {tuple(input_ids_T.shape)}, got {tuple(mask_T.shape)}")
    if mask_T.device != input_ids_T.device:
        raise ValueError(f"mask_T is on {mask_T.device}, input_ids_T on {input_ids_T.device}")


def _empty_plans(num_layers: int, num_slots: int, num_experts: int, device: torch.device) -> PlanTensors:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    slots_3LS = empty(3, num_layers, num_slots)
    return PlanTensors(slots_3LS, empty(num_layers, num_experts), empty(num_layers, num_experts + 1), None)


def _addresses(plans: PlanTensors) -> list[int]:
    slots_3LS, counts_LE, offsets_LE1, _ = plans
    (_, L, S), device = slots_3LS.shape, slots_3LS.device
    slots = address(slots_3LS, device)
    of_slots = [slots + i * L * S * slots_3LS.element_size() for i in range(3)]
    return [*of_slots, address(counts_LE, device), address(offsets_LE1, device)]


def _workspace(extension: Any, sizes: tuple[int, int, int], device: torch.device) -> Tensor:
    # Freed on return, and safely: the allocator hands it out again only to later work of the same stream.
    return torch.empty(extension.workspace_size_cuda(*sizes), dtype=torch.int32, device=device)


def _extension_for(ids: Tensor, num_layers: int, num_slots: int, num_experts: int) -> Any | None:
    """The loaded extension if it serves ids of this device, dtype and size; warns once of a missing part."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if ids.device.type not in ("cpu", "cuda") or ids.dtype not in (torch.int32, torch.int64):
        return None
    extension, problem = _load()
    if extension is None:
        _warn_once(problem)
        return None
    if num_slots > _MAX_SLOTS:
        return None
    if ids.device.type == "cuda":
        if not extension.HAS_CUDA:
            _warn_once(extension.NO_CUDA_REASON)
            return None
        if torch.version.hip or num_experts > _MAX_CUDA_EXPERTS or num_layers > _MAX_CUDA_LAYERS:
            return None
    return extension


@cache
def _load() -> tuple[Any | None, str]:
    """The extension module, or None and the reason it cannot be used."""
    try:
        extension: ModuleType = importlib.import_module("moebert_kernels._native")
    except ModuleNotFoundError:
        return None, f"moebert_kernels._native {_why_not_built()}"
    except Exception as error:  # a file of another platform, Python or C++ runtime
        return None, f"moebert_kernels._native does not load ({type(error).__name__}: {error})"
    found = getattr(extension, "ABI_VERSION", None)
    if found != _ABI_VERSION:
        return None, (
            f"moebert_kernels._native has interface {found}, this package needs {_ABI_VERSION}: "
            "install it again"
        )
    return extension, ""


def _why_not_built() -> str:
    try:
        reason = Path(__file__).with_name(_RECORD).read_text(encoding="utf-8").strip()
    except OSError:
        return "was never built: `pip install .` in a source tree does, where there is a C++ compiler"
    return f"was not built at install: {reason}"


@cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"{problem}. What it would do is done in PyTorch, which is slower.", RuntimeWarning, stacklevel=4
    )
