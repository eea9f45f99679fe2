"""Sorting slots by expert for all layers at once: natively where csrc/ is built, in PyTorch elsewhere.

Two custom operators, so that a compiled graph sees a plan as one opaque step; where nobody watches, they are
called past the dispatcher. Both return the three tables of the slots in one tensor, `slots_3LS`: expert ids,
order and inverse (see `RoutingPlan`).
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from moebert_kernels.routing import native_plans
from moebert_kernels.watchers import unwatched


def build_from_expert_ids(expert_ids_LS: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Build the plans of L layers from the expert of every slot.

    Args:
        expert_ids_LS: any signed integer dtype; an id outside [0, E) means no expert.
        num_experts: E.

    Returns:
        slots_3LS and offsets_LE1, int32.
    """
    plans = native_plans.from_expert_ids(expert_ids_LS, num_experts)
    if plans is None:
        return sort_in_torch(expert_ids_LS, num_experts)
    return plans.slots_3LS, plans.offsets_LE1


plan_from_expert_ids = library.custom_op(
    "moebert_kernels::plan_from_expert_ids", build_from_expert_ids, mutates_args=()
)


@plan_from_expert_ids.register_fake
def _(expert_ids_LS, num_experts):
    num_layers, num_slots = expert_ids_LS.shape
    return _empty(expert_ids_LS, num_layers, num_slots, num_experts)


def build_from_input_ids(
    input_ids_T: Tensor, tables_LV: Tensor, mask_T: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Build the plans of L layers from token ids and each layer's table.

    Args:
        input_ids_T: int32 or int64.
        tables_LV: int32.
        mask_T: bool, False at tokens that get no expert, whose ids are not looked at.
        num_experts: E.

    Returns:
        slots_3LS (S = T) and offsets_LE1, int32.

    Raises:
        ValueError: on the CPU, an unmasked id outside [0, V). On an accelerator, where looking would wait for
            the device, such a token gets no expert.
    """
    plans = native_plans.from_input_ids(input_ids_T, tables_LV, mask_T, num_experts)
    on_cpu = input_ids_T.device.type == "cpu"
    if plans is not None and not (on_cpu and plans.num_invalid):
        return plans.slots_3LS, plans.offsets_LE1

    vocab_size = tables_LV.shape[1]
    known_T = (input_ids_T >= 0) & (input_ids_T < vocab_size)
    wanted_T = torch.ones_like(known_T) if mask_T is None else mask_T
    if on_cpu and bool((wanted_T & ~known_T).any()):
        low, high = (int(v) for v in input_ids_T[wanted_T].aminmax())
        raise ValueError(
            f"input_ids must lie in [0, {vocab_size}), the vocabulary of the routing tables, "
            f"found values from {low} to {high}"
        )
    if vocab_size == 0:
        expert_ids_LT = tables_LV.new_full((tables_LV.shape[0], input_ids_T.shape[0]), -1)
    else:
        expert_ids_LT = tables_LV.index_select(1, input_ids_T.clamp(0, vocab_size - 1))
    return sort_in_torch(torch.where(known_T & wanted_T, expert_ids_LT, -1), num_experts)


plan_from_input_ids = library.custom_op(
    "moebert_kernels::plan_from_input_ids", build_from_input_ids, mutates_args=()
)


@plan_from_input_ids.register_fake
def _(input_ids_T, tables_LV, mask_T, num_experts):
    return _empty(input_ids_T, tables_LV.shape[0], input_ids_T.shape[0], num_experts)


def from_expert_ids(expert_ids_LS: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`plan_from_expert_ids`, directly where that may be."""
    build = build_from_expert_ids if _may_build(expert_ids_LS) else plan_from_expert_ids
    return build(expert_ids_LS, num_experts)


def from_input_ids(
    input_ids_T: Tensor, tables_LV: Tensor, mask_T: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor]:
    """`plan_from_input_ids`, directly where that may be."""
    build = build_from_input_ids if _may_build(input_ids_T, tables_LV, mask_T) else plan_from_input_ids
    return build(input_ids_T, tables_LV, mask_T, num_experts)


def _may_build(ids: Tensor, *others: Tensor | None) -> bool:
    return (ids.is_cpu or ids.is_cuda) and unwatched((ids, *others))


def sort_in_torch(expert_ids_LS: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """`plan_from_expert_ids` by a stable sort: what the native builders are held against."""
    num_layers, num_slots = expert_ids_LS.shape
    has_expert = (expert_ids_LS >= 0) & (expert_ids_LS < num_experts)
    slots_3LS, offsets_LE1 = _empty(expert_ids_LS, num_layers, num_slots, num_experts)
    slots_3LS[0] = torch.where(has_expert, expert_ids_LS, -1)
    keys_LS = torch.where(has_expert, expert_ids_LS, num_experts).to(torch.int32)
    sorted_keys_LS, order_LS = keys_LS.sort(dim=1, stable=True)
    slots_3LS[1] = order_LS
    slot_numbers_S = torch.arange(num_slots, device=keys_LS.device, dtype=torch.int32)
    slots_3LS[2].scatter_(1, order_LS, slot_numbers_S.expand_as(keys_LS))
    bounds_E1 = torch.arange(num_experts + 1, device=keys_LS.device, dtype=torch.int32)
    bounds_LE1 = bounds_E1.expand(num_layers, -1).contiguous()
    offsets_LE1.copy_(torch.searchsorted(sorted_keys_LS, bounds_LE1, out_int32=True))
    return slots_3LS, offsets_LE1


def _empty(like: Tensor, num_layers: int, num_slots: int, num_experts: int) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(3, num_layers, num_slots, dtype=torch.int32),
        like.new_empty(num_layers, num_experts + 1, dtype=torch.int32),
    )
