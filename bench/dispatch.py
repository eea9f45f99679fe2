"""Dispatch: from a batch's token ids to the sorted order of every layer's tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moebert_kernels import RoutingPlan, hash_random_tables

from .baselines.from_source import load
from .cases import DispatchCase, Request, token_ids
from .options import TAKES
from .reference import specification
from .registry import DidNotRun, Entry, Op, Outputs, Thunk, Work

OURS = "moebert_kernels"
AUTHORS = "authors' loop"


@dataclass(frozen=True, eq=False)
class DispatchInputs:
    """A batch and the routing tables of all layers.

    Attributes:
        case: the sizes.
        ids_T: token ids, int64.
        tables_LV: int32, the expert of each id.
    """

    case: DispatchCase
    ids_T: Tensor
    tables_LV: Tensor


def cases(request: Request, device_type: str) -> list[DispatchCase]:
    """One case per token count."""
    base = DispatchCase(0, **request.given("E", "L", "V"))
    return [replace(base, T=count) for count in request.T or (512, 4096, 65536)]


def make_inputs(case: DispatchCase, device: torch.device, seed: int) -> DispatchInputs:
    """Zipf's token ids and random tables."""
    tables_LV = hash_random_tables(case.L, case.V, case.E, seed=seed)
    ids_T = token_ids(1, case.T, case.V, seed)[0]
    return DispatchInputs(case, ids_T.to(device), tables_LV.to(device))


def _ours(inputs: DispatchInputs, pass_: str) -> Thunk:
    def thunk() -> Outputs:
        plans = RoutingPlan.from_input_ids(inputs.ids_T, inputs.tables_LV, inputs.case.E)
        return {"order": [plan.order_S for plan in plans], "ends": [plan.offsets_E1[1:] for plan in plans]}

    return thunk


OneLayer = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def _layer_by_layer(dispatch: OneLayer, inputs: DispatchInputs, pass_: str) -> Thunk:
    """Each layer looks its experts up and sorts for itself."""

    def thunk() -> Outputs:
        layers = [dispatch(table_V[inputs.ids_T], inputs.case.E) for table_V in inputs.tables_LV]
        return {"order": [order for order, _ in layers], "ends": [ends for _, ends in layers]}

    return thunk


def _authors(expert_ids_T: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Two argsorts, a one-hot matrix, and the counts on the host."""
    order_T = torch.argsort(expert_ids_T)
    torch.argsort(order_T)
    counts = functional.one_hot(expert_ids_T.long(), experts).sum(0)
    counts.tolist()
    return order_T, counts.cumsum(0)


def _transformers(expert_ids_T: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The operations of transformers' grouped_mm: sort, histogram, sums, and the inverse permutation."""
    sorted_T, order_T = torch.sort(expert_ids_T)
    counted = sorted_T.float() if sorted_T.device.type == "cpu" else sorted_T
    counts_E = torch.histc(counted, bins=experts, min=0, max=experts - 1)
    inverse_T = torch.empty_like(order_T)
    inverse_T[order_T] = torch.arange(order_T.shape[0], device=order_T.device)
    return order_T, counts_E.cumsum(0, dtype=torch.int32)


def _single_plans(expert_ids_T: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    plan = RoutingPlan.from_expert_ids(expert_ids_T, experts)
    return plan.order_S, plan.offsets_E1[1:]


def _scattermoe(peer_path: str | None, inputs: DispatchInputs, pass_: str) -> Thunk:
    package = load("scattermoe", "scattermoe", peer_path, inputs.ids_T.device)

    def dispatch(expert_ids_T: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        _, order_T, ends_E = package.flatten_sort_count(expert_ids_T.unsqueeze(1), num_experts=experts)
        return order_T, ends_E

    return _layer_by_layer(dispatch, inputs, pass_)


def entries(peer_path: str | None) -> list[Entry]:
    """All layers in one call, and the peers, each layer for itself."""
    each_layer = {
        "moebert_kernels, layer by layer": _single_plans,
        AUTHORS: _authors,
        "transformers grouped_mm": _transformers,
    }
    return [
        Entry(OURS, _ours),
        *(Entry(name, functools.partial(_layer_by_layer, one)) for name, one in each_layer.items()),
        Entry("scattermoe", functools.partial(_scattermoe, peer_path)),
    ]


def reference(inputs: DispatchInputs, pass_: str, kind: str) -> dict[str, Tensor]:
    """`python_ref`'s order, and the experts it was made from."""
    routing = specification("routing")
    ids_LT = torch.stack([table_V[inputs.ids_T] for table_V in inputs.tables_LV]).long()
    ends_LE = torch.stack(
        [routing.sort_by_expert(ids_T.unsqueeze(1), inputs.case.E)[3][1:] for ids_T in ids_LT]
    )
    return {"ids": ids_LT, "ends": ends_LE}


def check(
    outputs: dict[str, Tensor], expected: dict[str, Tensor], inputs: DispatchInputs, kind: str
) -> dict[str, float]:
    """Exactly a permutation that sorts by expert, and exactly the counts; peers need not be stable."""
    order_LT = outputs["order"].long()
    everyone_T = torch.arange(inputs.case.T, device=order_LT.device)
    if order_LT.shape != expected["ids"].shape or not torch.equal(
        order_LT.sort(1).values, everyone_T.expand_as(order_LT)
    ):
        raise DidNotRun("wrong: its order is not a permutation of the tokens")
    if (expected["ids"].gather(1, order_LT).diff(dim=1) < 0).any():
        raise DidNotRun("wrong: its order does not sort the tokens by expert")
    if not torch.equal(outputs["ends"].long(), expected["ends"]):
        raise DidNotRun("wrong: its counts are not those of the experts")
    return {"order": 0.0, "ends": 0.0}


def work(inputs: DispatchInputs, pass_: str, kind: str) -> Work:
    """Ids read once; per layer a table entry read, expert, place and inverse written, 4 bytes each."""
    return Work(0.0, inputs.case.T * (8 + 16 * inputs.case.L))


def footprint(inputs: DispatchInputs) -> int:
    """Ids and tables."""
    return inputs.ids_T.numel() * 8 + inputs.tables_LV.numel() * 4


DISPATCH = Op(
    name="dispatch",
    takes=TAKES["dispatch"],
    passes=("dispatch",),
    cases=cases,
    make_inputs=make_inputs,
    entries=entries,
    reference=reference,
    check=check,
    work=work,
    footprint=footprint,
    baselines=(AUTHORS,),
)
