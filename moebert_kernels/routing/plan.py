"""RoutingPlan: tokens sorted by expert, once, for every layer and every pass that needs it.

Notation: T tokens, K experts per token, S = T*K slots (slot s = t*K + k), E experts, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebert_kernels.checks import check_mask, check_whole
from moebert_kernels.routing.builder import from_expert_ids, from_input_ids


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Where every token goes, in the form that forward, backward and recomputation share.

    The sort is stable and free of atomics: the same routing always gives the same plan. Slots without an
    expert come last, so that `order_S` is a full permutation and kernels write every row of their output.

    Attributes:
        expert_ids_TK: int32, the expert of each slot; -1 where it has none.
        order_S: int32, the slots sorted by expert, in token order within one expert; slots without an
            expert last.
        inverse_S: int32, the inverse permutation: `inverse_S[order_S[i]] == i`.
        offsets_E1: int32, expert e's rows are `order_S[offsets_E1[e]:offsets_E1[e + 1]]`;
            `offsets_E1[E]` is the number of slots that have an expert.
    """

    expert_ids_TK: Tensor
    order_S: Tensor
    inverse_S: Tensor
    offsets_E1: Tensor

    @property
    def num_tokens(self) -> int:
        """T, the tokens the plan was made for, those without an expert included."""
        return self.expert_ids_TK.shape[0]

    @property
    def top_k(self) -> int:
        """K, the experts a token may use."""
        return self.expert_ids_TK.shape[1]

    @property
    def num_experts(self) -> int:
        """E, the experts there are, those without tokens included."""
        return self.offsets_E1.shape[0] - 1

    @property
    def counts_E(self) -> Tensor:
        """int32 [E]: the slots of each expert."""
        return self.offsets_E1.diff()

    @classmethod
    def from_expert_ids(cls, expert_ids: Tensor, num_experts: int) -> RoutingPlan:
        """Build the plan of one layer.

        Args:
            expert_ids: [T] or [T, K], any signed integer dtype; -1 marks a slot without an expert. Batch and
                sequence are flattened to T: [batch, sequence] would read as K = sequence.
            num_experts: E.

        Returns:
            The plan, on the device of `expert_ids`. No host synchronisation on an accelerator, where an
            id outside [-1, E) therefore counts as no expert.

        Raises:
            TypeError: `expert_ids` is not a signed integer tensor, or `num_experts` no whole number.
            ValueError: wrong shape, `num_experts` < 1, K > E, or (on the CPU) an id outside [-1, E).
        """
        expert_ids = _check_ids("expert_ids", expert_ids)
        if expert_ids.dim() not in (1, 2):
            raise ValueError(f"expert_ids must have shape [T] or [T, K], got {tuple(expert_ids.shape)}")
        if expert_ids.shape[1:] == (0,):
            raise ValueError(f"expert_ids must give every token a slot, got shape {tuple(expert_ids.shape)}")
        check_whole("num_experts", num_experts, least=1)
        if expert_ids.dim() == 2 and expert_ids.shape[1] > num_experts:
            raise ValueError(
                f"expert_ids must give a token at most num_experts={num_experts} experts, got shape "
                f"{tuple(expert_ids.shape)}, read as [T, K]: flatten batch and sequence to T"
            )
        if expert_ids.device.type == "cpu" and not torch.compiler.is_compiling() and expert_ids.numel():
            low, high = (int(v) for v in expert_ids.aminmax())
            if low < -1 or high >= num_experts:
                raise ValueError(
                    f"expert_ids must lie in [-1, {num_experts}) for num_experts={num_experts}, "
                    f"found values from {low} to {high}"
                )
        expert_ids_TK = expert_ids.unsqueeze(1) if expert_ids.dim() == 1 else expert_ids
        slots_3LS, offsets_LE1 = from_expert_ids(expert_ids_TK.reshape(1, -1), num_experts)
        (plan,) = _per_layer(slots_3LS, offsets_LE1, expert_ids_TK.shape[1])
        return plan

    @classmethod
    def from_input_ids(
        cls, input_ids: Tensor, tables_LV: Tensor, num_experts: int, mask: Tensor | None = None
    ) -> tuple[RoutingPlan, ...]:
        """Build the plans of all layers at once: a hash route is known before the first layer runs.

        Args:
            input_ids: token ids, any shape; flattened to T tokens.
            tables_LV: int32, the expert of every token id for each layer.
            num_experts: E.
            mask: shape of `input_ids`, nonzero at real tokens; others (padding) get no expert, and their
                ids are not looked at.

        Returns:
            L plans with K = 1. No host synchronisation on an accelerator.

        Raises:
            TypeError: `input_ids` or `tables_LV` is not a signed integer tensor, `mask` neither bool nor
                integer, or `num_experts` no whole number.
            ValueError: shapes do not fit, or (on the CPU) a real token's id lies outside the table.
        """
        input_ids = _check_ids("input_ids", input_ids)
        tables_LV = _check_ids("tables_LV", tables_LV)
        if tables_LV.dim() != 2:
            raise ValueError(f"tables_LV must have shape [L, V], got {tuple(tables_LV.shape)}")
        check_whole("num_experts", num_experts, least=1)
        if mask is not None:
            check_mask("mask", mask)
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"mask must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(mask.shape)}"
            )
        slots_3LT, offsets_LE1 = from_input_ids(
            input_ids.reshape(-1).to(torch.promote_types(input_ids.dtype, torch.int32)),
            tables_LV.to(torch.int32),
            None if mask is None else (mask if mask.dtype == torch.bool else mask != 0).reshape(-1),
            num_experts,
        )
        return _per_layer(slots_3LT, offsets_LE1, top_k=1)


def _check_ids(name: str, ids: Tensor) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a signed integer tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8):
        raise TypeError(f"{name} must be a signed integer tensor, got {ids.dtype}")
    return ids


def _per_layer(slots_3LS: Tensor, offsets_LE1: Tensor, top_k: int) -> tuple[RoutingPlan, ...]:
    expert_ids_LS, order_LS, inverse_LS = slots_3LS.unbind()
    L, S = expert_ids_LS.shape
    expert_ids_LTK = expert_ids_LS.view(L, S // top_k, top_k)
    layers = (expert_ids_LTK, order_LS, inverse_LS, offsets_LE1)
    return tuple(RoutingPlan(*layer) for layer in zip(*(t.unbind() for t in layers), strict=True))
