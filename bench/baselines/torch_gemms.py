"""What torch itself offers over sorted tokens: one GEMM per expert, or `torch.nn.functional.grouped_mm`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..registry import DidNotRun
from .implementation import FFNInputs, Implementation, weights_of


class Sorted(NamedTuple):
    """Slots sorted by expert: their tokens and experts, where each slot went, where experts' rows end."""

    tokens_S: Tensor
    experts_S: Tensor
    inverse_S: Tensor
    ends_E: Tensor


def sort_slots(inputs: FFNInputs) -> Sorted:
    """Sort by expert without a host synchronisation."""
    experts_S, order_S = inputs.expert_ids_TK.flatten().sort(stable=True)
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
    bounds_E = torch.arange(inputs.case.E, device=order_S.device)
    ends_E = torch.searchsorted(experts_S, bounds_E, right=True, out_int32=True)
    return Sorted(order_S // inputs.case.K, experts_S, inverse_S, ends_E)


def _per_token(z_SD: Tensor, top_k: int) -> Tensor:
    return z_SD if top_k == 1 else z_SD.view(-1, top_k, z_SD.shape[1]).mean(1)


def expert_gemms(inputs: FFNInputs) -> Implementation:
    """One GEMM per expert and projection, the row counts known on the host when the forward pass starts.

    Knowing them takes a synchronisation in the dispatch, and none in the pass itself.
    """
    top_k = inputs.case.K
    parameters: dict[str, Tensor | list[Tensor]] = {
        name: [leaf.detach() for leaf in tensor.unbind()] for name, tensor in weights_of(inputs).items()
    }
    experts = list(zip(*parameters.values(), strict=True))

    def dispatch() -> tuple[Sorted, list[int]]:
        slots = sort_slots(inputs)
        return slots, slots.ends_E.diff(prepend=slots.ends_E.new_zeros(1)).tolist()

    def compute(x_TD: Tensor, routing: tuple[Sorted, list[int]]) -> Tensor:
        slots, counts = routing
        parts = x_TD[slots.tokens_S].split(counts)
        z_SD = torch.cat(
            [
                functional.linear(functional.gelu(functional.linear(part, w1_FD, b1_F)), w2_DF, b2_D)
                for part, (w1_FD, b1_F, w2_DF, b2_D) in zip(parts, experts, strict=True)
            ]
        )
        return _per_token(z_SD[slots.inverse_S], top_k)

    return Implementation(parameters, dispatch, compute)


def grouped_mm(inputs: FFNInputs) -> Implementation:
    """`grouped_mm` for both projections, everything else a torch operation of its own. It takes no bias."""
    if not hasattr(functional, "grouped_mm"):
        raise DidNotRun(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")
    top_k, leaves = inputs.case.K, weights_of(inputs)

    def compute(x_TD: Tensor, slots: Sorted) -> Tensor:
        h_SF = functional.grouped_mm(x_TD[slots.tokens_S], leaves["w1"].mT, offs=slots.ends_E)
        a_SF = functional.gelu(h_SF + leaves["b1"][slots.experts_S])
        z_SD = functional.grouped_mm(a_SF, leaves["w2"].mT, offs=slots.ends_E)
        z_SD = z_SD + leaves["b2"][slots.experts_S]
        return _per_token(z_SD[slots.inverse_S], top_k)

    return Implementation(dict(leaves), lambda: sort_slots(inputs), compute)
