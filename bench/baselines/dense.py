"""Dense networks: the one the experts replace, the bound that one expert sets, all experts with a mask."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..registry import Outputs, stack_lists
from .implementation import NORM_EPS, FFNInputs, Implementation, norm_of, weights_of


def _dense(
    w1_ND: Tensor, b1_N: Tensor, w2_DN: Tensor, b2_D: Tensor, norm: dict[str, Tensor]
) -> Implementation:
    parameters: dict[str, Tensor | list[Tensor]] = {"w1": w1_ND, "b1": b1_N, "w2": w2_DN, "b2": b2_D, **norm}

    def plain(x_TD: Tensor, _: None) -> Tensor:
        return functional.linear(functional.gelu(functional.linear(x_TD, w1_ND, b1_N)), w2_DN, b2_D)

    def normed(x_TD: Tensor, _: None) -> Tensor:
        return functional.layer_norm(
            plain(x_TD, None) + x_TD, x_TD.shape[1:], norm["ln_w"], norm["ln_b"], NORM_EPS
        )

    return Implementation(parameters, lambda: None, normed if norm else plain)


def _side_by_side(inputs: FFNInputs, experts: int) -> Implementation:
    """The first experts as one network: the sum of what they compute, but for their output biases."""
    w1_eFD, b1_eF, w2_eDF = inputs.w1_EFD[:experts], inputs.b1_EF[:experts], inputs.w2_EDF[:experts]
    return _dense(
        w1_eFD.flatten(0, 1).detach(),
        b1_eF.flatten().detach(),
        w2_eDF.transpose(0, 1).flatten(1).contiguous().detach(),
        inputs.b2_ED[0].detach(),
        {name: leaf_ED[0] for name, leaf_ED in norm_of(inputs).items()},
    )


def replaced(inputs: FFNInputs) -> Implementation:
    """The dense FFN of width E*F that the experts were cut from."""
    return _side_by_side(inputs, inputs.case.E)


def bound(inputs: FFNInputs) -> Implementation:
    """A dense FFN of width K*F over the same tokens: the same work with no routing."""
    return _side_by_side(inputs, inputs.case.K)


def masked(inputs: FFNInputs) -> Implementation:
    """All E*F neurons for every token, those of other experts set to 0: E/K times the work, no sorting."""
    E, F = inputs.case.E, inputs.case.F
    leaves = weights_of(inputs)
    w1_ND, b1_N = leaves["w1"].flatten(0, 1), leaves["b1"].flatten()
    w2_DN, b2_ED = leaves["w2"].transpose(0, 1).flatten(1).contiguous(), leaves["b2"]

    def dispatch() -> Tensor:
        share_TE = inputs.gate_TK.new_zeros(inputs.expert_ids_TK.shape[0], E)
        return share_TE.scatter_(1, inputs.expert_ids_TK, inputs.gate_TK)

    def compute(x_TD: Tensor, share_TE: Tensor) -> Tensor:
        a_TN = functional.gelu(functional.linear(x_TD, w1_ND, b1_N))
        a_TEF = a_TN.view(-1, E, F) * share_TE.unsqueeze(2)
        return functional.linear(a_TEF.view(-1, E * F), w2_DN) + share_TE @ b2_ED

    parameters: dict[str, Tensor | list[Tensor]] = {"w1": w1_ND, "b1": b1_N, "w2": w2_DN, "b2": b2_ED}
    return Implementation(parameters, dispatch, compute)


def restore_masked(outputs: Outputs) -> dict[str, Tensor]:
    """Give the gradients of `masked` the experts' axis back."""
    restored = stack_lists(outputs)
    if "db2" in restored:
        E = restored["db2"].shape[0]
        restored["dw1"] = restored["dw1"].unflatten(0, (E, -1))
        restored["db1"] = restored["db1"].unflatten(0, (E, -1))
        restored["dw2"] = restored["dw2"].unflatten(1, (E, -1)).transpose(0, 1)
    return restored
