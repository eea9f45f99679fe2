"""The loop of MoEBERT's published code, written from its description.

Every layer sorts its tokens by expert with an argsort, counts them by a one-hot matrix, reads the counts on
the host to split the sorted tokens, runs one module per expert (on no tokens, too), stacks the results and
sorts them back with a second argsort.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..registry import DidNotRun
from .implementation import NORM_EPS, FFNInputs, Implementation, no_dispatch, norm_of


class AuthorsExpert(nn.Module):
    """One expert, fc1 -> GELU -> fc2, then the residual and its own LayerNorm where it has one."""

    def __init__(
        self, w1_FD: Tensor, b1_F: Tensor, w2_DF: Tensor, b2_D: Tensor, norm: nn.LayerNorm | None = None
    ):
        super().__init__()
        F, D = w1_FD.shape
        self.fc1 = nn.Linear(D, F, device="meta")
        self.fc2 = nn.Linear(F, D, device="meta")
        self.fc1.weight, self.fc1.bias = nn.Parameter(w1_FD), nn.Parameter(b1_F)
        self.fc2.weight, self.fc2.bias = nn.Parameter(w2_DF), nn.Parameter(b2_D)
        self.norm = norm

    def forward(self, x_RD: Tensor) -> Tensor:
        z_RD = self.fc2(functional.gelu(self.fc1(x_RD)))
        return z_RD if self.norm is None else self.norm(z_RD + x_RD)


class AuthorsExperts(nn.Module):
    """E experts of which every token uses one."""

    def __init__(self, experts: list[AuthorsExpert]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x_TD: Tensor, expert_ids_T: Tensor) -> Tensor:
        order_T = torch.argsort(expert_ids_T)
        counts = functional.one_hot(expert_ids_T, len(self.experts)).sum(0).tolist()
        parts = x_TD[order_T].split(counts)
        y_TD = torch.vstack([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return y_TD[torch.argsort(order_T)]


def authors_loop(inputs: FFNInputs) -> Implementation:
    """The experts of `inputs` as modules."""
    if inputs.case.K != 1:
        raise DidNotRun(f"gives every token one expert; top_k is {inputs.case.K}")
    weights = zip(inputs.w1_EFD, inputs.b1_EF, inputs.w2_EDF, inputs.b2_ED, _norms(inputs), strict=True)
    experts = [
        AuthorsExpert(w1_FD.detach(), b1_F.detach(), w2_DF.detach(), b2_D.detach(), norm)
        for w1_FD, b1_F, w2_DF, b2_D, norm in weights
    ]
    module = AuthorsExperts(experts)
    parameters: dict[str, Tensor | list[Tensor]] = {
        "w1": [expert.fc1.weight for expert in experts],
        "b1": [expert.fc1.bias for expert in experts],
        "w2": [expert.fc2.weight for expert in experts],
        "b2": [expert.fc2.bias for expert in experts],
    }
    norms = [expert.norm for expert in experts if expert.norm is not None]
    if norms:
        parameters |= {"ln_w": [norm.weight for norm in norms], "ln_b": [norm.bias for norm in norms]}
    return Implementation(parameters, no_dispatch(inputs), lambda x_TD, ids_TK: module(x_TD, ids_TK[:, 0]))


def _norms(inputs: FFNInputs) -> list[nn.LayerNorm | None]:
    leaves = norm_of(inputs)
    if not leaves:
        return [None] * inputs.case.E
    norms: list[nn.LayerNorm | None] = []
    for ln_w_D, ln_b_D in zip(leaves["ln_w"], leaves["ln_b"], strict=True):
        norm = nn.LayerNorm(inputs.case.D, eps=NORM_EPS, device="meta")
        norm.weight, norm.bias = nn.Parameter(ln_w_D), nn.Parameter(ln_b_D)
        norms.append(norm)
    return norms
