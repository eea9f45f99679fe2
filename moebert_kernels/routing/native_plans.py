"""Routing plans of all layers in one call, in C++ on the host and by a CUDA kernel on the GPU.

Notation: L layers, T tokens, S = T * K slots, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebert_kernels import native
from moebert_kernels.addresses import address

_MAX_SLOTS = 2**31 - 1
_MAX_CUDA_EXPERTS = 256
_MAX_CUDA_LAYERS = 65535


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


def from_expert_ids(expert_ids_LS: Tensor, num_experts: int) -> PlanTensors | None:
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


def from_input_ids(
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
    device = ids.device.type
    if device not in ("cpu", "cuda") or ids.dtype not in (torch.int32, torch.int64) or num_slots > _MAX_SLOTS:
        return None
    extension = native.extension(cuda=device == "cuda")
    too_many = num_experts > _MAX_CUDA_EXPERTS or num_layers > _MAX_CUDA_LAYERS
    return None if device == "cuda" and (torch.version.hip or too_many) else extension
