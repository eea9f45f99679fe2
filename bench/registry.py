"""What a benchmark is made of: an operator, described once, and the entries that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Request

Outputs = dict[str, Any]
Thunk = Callable[[], Outputs]


class DidNotRun(Exception):  # noqa: N818 - no error of ours
    """Why an entry has no figure; never a reason to call it slow."""


def stack_lists(outputs: Outputs) -> dict[str, Tensor]:
    """Make one tensor of an output that an entry has as one tensor per expert."""
    return {
        name: torch.stack(value) if isinstance(value, (list, tuple)) else value
        for name, value in outputs.items()
    }


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without: floating-point operations, and bytes read or written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Entry:
    """One way to compute an operator.

    Attributes:
        name: as tables and plots show it.
        bind: (inputs, pass) -> the function to be timed. Raises `DidNotRun` or anything else where there is
            none.
        work: what it computes: the operator's own "experts", or another function timed for comparison, such
            as the dense network replaced. It selects the reference and the work.
        dispatch: "apart" if a routing plan made beforehand can be handed to it; "inside" if every pass sorts
            the tokens again.
        restore: brings what the timed function returns into the reference's shapes; not timed.
    """

    name: str
    bind: Callable[[Any, str], Thunk]
    work: str = "experts"
    dispatch: str = "apart"
    restore: Callable[[Outputs], dict[str, Tensor]] = stack_lists


@dataclass(frozen=True)
class Op:
    """An operator to be measured. "Inputs" is whatever `make_inputs` returns.

    Attributes:
        name: of the command and of the result file.
        takes: fields of a `Request` that its cases depend on.
        passes: all there are.
        cases: (request, device type) -> cases, in the order they are run.
        make_inputs: (case, device, seed) -> inputs of one call.
        entries: (path of peers' sources or None) -> the entries; the first is ours.
        reference: (inputs, pass, entry's work) -> outputs to hold the entries' against, float64 or exact.
        check: (outputs, reference, inputs, entry's work) -> errors by output; raises `DidNotRun` if wrong.
        work: (inputs, pass, entry's work) -> Work.
        footprint: inputs -> bytes one call reads, of which several copies defeat the caches.
        baselines: names of entries that ours is set in ratio to.
        default_passes: those timed unless others are asked for; empty for all.
        predict: (case, pass, card's name, its ceiling) -> microseconds that ours should take in a CUDA graph
            on cold caches, or None.
        needs: packages, by the names they are imported by, without which none of its entries runs.
    """

    name: str
    takes: tuple[str, ...]
    passes: tuple[str, ...]
    cases: Callable[[Request, str], list[Any]]
    make_inputs: Callable[[Any, torch.device, int], Any]
    entries: Callable[[str | None], list[Entry]]
    reference: Callable[[Any, str, str], dict[str, Tensor]]
    check: Callable[[dict[str, Tensor], dict[str, Tensor], Any, str], dict[str, float]]
    work: Callable[[Any, str, str], Work]
    footprint: Callable[[Any], int]
    baselines: tuple[str, ...] = ()
    default_passes: tuple[str, ...] = ()
    predict: Callable[[Any, str, str, Any], float | None] = lambda *_: None
    needs: tuple[str, ...] = ()
