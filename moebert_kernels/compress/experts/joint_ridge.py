"""Ridge equations of a layer's experts, solved together where experts have columns in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def solve(
    products_EGG: Tensor, lacking_EDG: Tensor, strength_E: Sequence[float], num_shared: int
) -> dict[int, Tensor]:
    """What experts are to add to their weights: W with, over those of positive strength,

        sum_e | W_e A_e^T - R_e |^2 + strength_e | W_e |^2

    smallest, the first C columns of all W_e the same. With held_e = A_e^T A_e + strength_e, and own columns
    named o and shared ones s, W_eo = (l_eo - W_s held_eso) held_eoo^-1: put into the equations of W_s, that
    leaves sum_e held_ess - held_eso held_eoo^-1 held_eso^T of size C. Without shared columns, each expert is
    solved alone.

    Args:
        products_EGG: A_e^T A_e, float64.
        lacking_EDG: l_e = R_e^T A_e.
        strength_E: 0 for an expert that is to stay as it is.
        num_shared: C.

    Returns:
        By expert, [D, G].
    """
    C, D = num_shared, lacking_EDG.shape[1]
    left_CC, lacking_DC = products_EGG.new_zeros(C, C), lacking_EDG.new_zeros(D, C)
    solved = {}
    for e, strength in enumerate(strength_E):
        if strength <= 0:
            continue
        held_GG = products_EGG[e].clone()
        held_GG.diagonal().add_(strength)
        between_CG = held_GG[:C, C:]
        wanted_NG = torch.cat([lacking_EDG[e, :, C:], between_CG])
        solved_NG = torch.cholesky_solve(wanted_NG.T, torch.linalg.cholesky(held_GG[C:, C:])).T
        own_DG, carried_CG = solved[e] = solved_NG.split([D, C])
        left_CC += held_GG[:C, :C] - carried_CG @ between_CG.T
        lacking_DC += lacking_EDG[e, :, :C] - own_DG @ between_CG.T
    if not C or not solved:
        return {e: own_DG for e, (own_DG, _) in solved.items()}
    shared_DC = torch.cholesky_solve(lacking_DC.T, torch.linalg.cholesky(left_CC)).T
    return {
        e: torch.cat([shared_DC, own_DG - shared_DC @ carried_CG], 1)
        for e, (own_DG, carried_CG) in solved.items()
    }
