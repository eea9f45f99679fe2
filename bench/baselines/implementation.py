"""What every way of computing the expert FFN is brought to: all are bound, checked and timed alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..cases import FFNCase
from ..registry import DidNotRun, Outputs, Thunk

NORM_EPS = 1e-12  # BERT's
PASSES = ("forward", "forward+backward", "dispatch+forward", "dispatch+forward+backward")


@dataclass(frozen=True, eq=False)
class FFNInputs:
    """One call's data: unit scale, so that a wrong activation or bias cannot hide.

    Attributes:
        case: the shapes.
        x_TD: tokens.
        dy_TD: gradient at the output.
        w1_EFD, b1_EF, w2_EDF, b2_ED: the experts.
        expert_ids_TK: int64.
        gate_TK: 1/K throughout, for peers that want weights.
        ln_w_ED, ln_b_ED: each expert's LayerNorm over the sum of its output and x; None without `case.norm`.
    """

    case: FFNCase
    x_TD: Tensor
    dy_TD: Tensor
    w1_EFD: Tensor
    b1_EF: Tensor
    w2_EDF: Tensor
    b2_ED: Tensor
    expert_ids_TK: Tensor
    gate_TK: Tensor
    ln_w_ED: Tensor | None = None
    ln_b_ED: Tensor | None = None


@dataclass(frozen=True)
class Implementation:
    """One peer, bound to its own views of the weights.

    Attributes:
        parameters: leaves by name ("w1", "b1", "w2", "b2", with a norm "ln_w", "ln_b"); a list
            where each expert has a tensor of its own.
        dispatch: sorts the tokens, from the expert ids it was bound to.
        compute: (x_TD, what dispatch returned) -> y_TD.
    """

    parameters: dict[str, Tensor | list[Tensor]]
    dispatch: Callable[[], Any]
    compute: Callable[[Tensor, Any], Tensor]


Make = Callable[[FFNInputs], Implementation]


def weights_of(inputs: FFNInputs) -> dict[str, Tensor]:
    """Fresh leaves that share the inputs' memory."""
    named = (("w1", inputs.w1_EFD), ("b1", inputs.b1_EF), ("w2", inputs.w2_EDF), ("b2", inputs.b2_ED))
    return {name: tensor.detach() for name, tensor in named}


def norm_of(inputs: FFNInputs) -> dict[str, Tensor]:
    """Fresh leaves of the LayerNorms; none where the case has no norm."""
    if inputs.ln_w_ED is None or inputs.ln_b_ED is None:
        return {}
    return {"ln_w": inputs.ln_w_ED.detach(), "ln_b": inputs.ln_b_ED.detach()}


def with_norm(make: Make) -> Make:
    """Put residual and LayerNorm after a peer that has neither, in torch's operations."""

    def made(inputs: FFNInputs) -> Implementation:
        plain, norm = make(inputs), norm_of(inputs)
        if not norm:
            return plain
        if inputs.case.K != 1:
            raise DidNotRun(f"adds up its experts before any LayerNorm; top_k is {inputs.case.K}")
        experts_T = inputs.expert_ids_TK[:, 0]

        def compute(x_TD: Tensor, given: Any) -> Tensor:
            u_TD = plain.compute(x_TD, given) + x_TD
            xhat_TD = functional.layer_norm(u_TD, u_TD.shape[1:], eps=NORM_EPS)
            return torch.addcmul(norm["ln_b"][experts_T], xhat_TD, norm["ln_w"][experts_T])

        return Implementation({**plain.parameters, **norm}, plain.dispatch, compute)

    return made


def bind(make: Make, inputs: FFNInputs, pass_: str) -> Thunk:
    """The function to be timed. Outputs: "y", and with backward "dx" and a "d..." for each parameter."""
    implementation = make(inputs)
    train, dispatches = pass_.endswith("backward"), pass_.startswith("dispatch")
    x_TD = inputs.x_TD.detach().requires_grad_(train)
    groups = [value if isinstance(value, list) else [value] for value in implementation.parameters.values()]
    leaves = [leaf.requires_grad_(train) for group in groups for leaf in group]
    compute, dispatch = implementation.compute, implementation.dispatch
    given = dispatch()

    @torch.no_grad()
    def forward() -> Outputs:
        return {"y": compute(x_TD, dispatch() if dispatches else given)}

    def forward_backward() -> Outputs:
        y_TD = compute(x_TD, dispatch() if dispatches else given)
        dx_TD, *flat = torch.autograd.grad(y_TD, [x_TD, *leaves], inputs.dy_TD)
        outputs: Outputs = {"y": y_TD.detach(), "dx": dx_TD}
        for name, value in implementation.parameters.items():
            count = len(value) if isinstance(value, list) else 1
            mine, flat = flat[:count], flat[count:]
            outputs[f"d{name}"] = mine if isinstance(value, list) else mine[0]
        return outputs

    return forward_backward if train else forward


def no_dispatch(inputs: FFNInputs) -> Callable[[], Tensor]:
    """For peers that sort the tokens inside their forward pass: hand them the expert ids."""
    return lambda: inputs.expert_ids_TK
