"""Adaptation: a dense feed-forward layer becomes experts that share its most important neurons."""

import torch
from torch import Tensor


def split_neurons(importance_F: Tensor, num_experts: int, expert_size: int, num_shared: int) -> Tensor:
    """Section 3.1: the num_shared most important neurons go to every expert, the rest are dealt out in turn.

    Of the neurons sorted by descending importance (stable: ties in order of index), every expert has the
    first num_shared in that order; expert e of E then takes every E-th of the rest, starting at e, until it
    has expert_size. The least important are left out.

    Args:
        importance_F: one layer's importance, F the dense width.
        num_experts: E.
        expert_size: neurons of one expert.
        num_shared: how many of them are the same in all experts.

    Returns:
        [E, expert_size] int64, indices into the dense layer, each row by descending importance.

    Raises:
        ValueError: num_shared is not in 0 to expert_size, or the dense layer has too few neurons:
            E * (expert_size - num_shared) + num_shared must not exceed its width.
    """
    if not 0 <= num_shared <= expert_size:
        raise ValueError(f"num_shared is {num_shared}, expected 0 to expert_size ({expert_size})")
    dense_size = importance_F.shape[0]
    needed = num_experts * (expert_size - num_shared) + num_shared
    if needed > dense_size:
        raise ValueError(
            f"{num_experts} experts of {expert_size} neurons, {num_shared} of them shared, need {needed},"
            f" but importance_F has {dense_size}"
        )
    order_F = importance_F.argsort(descending=True, stable=True)
    shared, rest = order_F[:num_shared], order_F[num_shared:]
    return torch.stack([torch.cat([shared, rest[e::num_experts]])[:expert_size] for e in range(num_experts)])


def adapt_ffn(
    w1_FD: Tensor,
    b1_F: Tensor | None,
    w2_DF: Tensor,
    b2_D: Tensor | None,
    index_EF: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Section 3.1: cut the experts out of a dense layer, neuron by neuron.

    A neuron is a row of W1, its entry of b1 and a column of W2. b2 belongs to no neuron: every expert has all
    of it, and nothing is rescaled (the authors' moebert/utils.py, `load_experts`). Experts are copies, so
    shared neurons are alike only at the start.

    Args:
        w1_FD: first weight of the dense layer, F its width.
        b1_F: first bias, or None.
        w2_DF: second weight.
        b2_D: second bias, or None.
        index_EF: the neurons of each expert, from `split_neurons`.

    Returns:
        (w1_EFD, b1_EF, w2_EDF, b2_ED) with F the size of an expert; a bias is None where the dense one is.
    """
    w1_EFD = torch.stack([w1_FD[index_F] for index_F in index_EF])
    b1_EF = None if b1_F is None else torch.stack([b1_F[index_F] for index_F in index_EF])
    w2_EDF = torch.stack([w2_DF[:, index_F] for index_F in index_EF])
    b2_ED = None if b2_D is None else torch.stack([b2_D for _ in index_EF])
    return w1_EFD, b1_EF, w2_EDF, b2_ED


def tie_shared(
    w1_EFD: Tensor, b1_EF: Tensor | None, w2_EDF: Tensor, num_shared: int
) -> tuple[tuple[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None, Tensor]]:
    """Not in the paper: the neurons that all experts begin with are stored once and stay the same in all.

    Args:
        w1_EFD: first weight of each expert, the first num_shared neurons the same in all, as `adapt_ffn` and
            `split_neurons` make them.
        b1_EF: first bias, or None.
        w2_EDF: second weight.
        num_shared: C.

    Returns:
        (w1_CD, b1_C, w2_DC) of the shared neurons, and (w1_EFD, b1_EF, w2_EDF) of each expert's own.
    """
    C = num_shared
    b1_C, own_b1_EF = (None, None) if b1_EF is None else (b1_EF[0, :C], b1_EF[:, C:])
    return (w1_EFD[0, :C], b1_C, w2_EDF[0, :, :C]), (w1_EFD[:, C:], own_b1_EF, w2_EDF[:, :, C:])
