"""Affinity: every expert takes the neurons its tokens need, every token id the expert with its neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebert_kernels.compress.experts.assignment import assign, loads, total_value
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.scoring.token_scores import TokenScores
from moebert_kernels.errors import UserError
from moebert_kernels.routing import hash_balance_tables

DEFAULT_MAX_LOAD = 1.1


@dataclass(frozen=True, eq=False)
class AffinitySplit:
    """Experts and the token ids that go to them, for every layer.

    Attributes:
        index_LEF: int64, the dense neurons of every expert: the shared ones by falling importance, then its
            own by falling score.
        tables_LV: int32, the expert of every token id.
        captured_LR: for every layer, the share of its scores that fall on neurons of the id's own expert: at
            the start and after every round; each is larger than the one before.
        loads_LE: the share of running tokens that every expert gets, by the counts that were given.
    """

    index_LEF: Tensor
    tables_LV: Tensor
    captured_LR: list[list[float]]
    loads_LE: Tensor


def split_by_affinity(
    importance: Importance,
    token_counts_V: Tensor,
    *,
    num_experts: int,
    expert_size: int,
    num_shared: int,
    max_load: float = DEFAULT_MAX_LOAD,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> AffinitySplit:
    """Choose neurons for experts and experts for token ids together, layer by layer.

    The score that is captured, summed over the groups of token ids, is that of the neurons which the group's
    expert holds. From a table balanced at random, two steps take turns for as long as more is captured: an
    expert takes the shared neurons, the most important, and then those with the largest summed score over its
    own groups (the more important among equals); a group moves to the expert that captures most of its score,
    as far as loads allow. Experts may choose the same neuron without its being shared, so their sizes need
    not add up to the dense width.

    A layer's scores are read twice a round, in two matrix products; beside the scores themselves little
    memory is needed.

    Args:
        importance: with token scores.
        token_counts_V: how often each id occurs in training, padding left out: what loads are measured by.
        num_experts: E.
        expert_size: neurons of one expert.
        num_shared: how many of them all experts have.
        max_load: the most running tokens an expert may get, in multiples of the mean. Where a single id
            weighs more than that, the largest load that `hash_balance_tables` reaches.
        seed: of the tables at the start. Torch's global random state is left alone.
        progress: called with (layers done, layers in all).

    Raises:
        UserError: the importance has no token scores, or they and the counts are of different vocabularies.
        ValueError: max_load is less than 1.
    """
    tokens = importance.tokens
    if tokens is None:
        raise UserError(
            "hash-affinity needs importance with token scores: take it with "
            "`moebert importance --per-token`, or give compute_importance group_V, from token_groups"
        )
    if token_counts_V.shape != tokens.group_V.shape:
        raise UserError(
            f"the token scores are for a vocabulary of {len(tokens.group_V)}, the token counts for one of "
            f"{tuple(token_counts_V.shape)}"
        )
    if not max_load >= 1:
        raise ValueError(f"max_load must be at least 1, got {max_load}")
    counts_G = _group_counts(tokens, token_counts_V)
    starts_LG = _balanced_starts(len(importance.scores_LF), counts_G, num_experts, seed)
    # What greedy balancing reaches depends on the counts alone: it is the same for all layers.
    reached = int(loads(starts_LG[0], counts_G, num_experts).max())
    capacity = max(int(max_load * int(counts_G.sum()) / num_experts), reached)
    layers = []
    for layer, start_G in enumerate(starts_LG):
        layers.append(
            alternate(
                tokens.scores_LGF[layer],
                counts_G,
                importance.scores_LF[layer],
                start_G,
                num_experts=num_experts,
                expert_size=expert_size,
                num_shared=num_shared,
                capacity=capacity,
            )
        )
        if progress is not None:
            progress(layer + 1, len(starts_LG))
    experts_LG = torch.stack([expert_G for _, expert_G, _ in layers])
    totals_L = [float(scores_GF.sum(1).double().sum()) or 1.0 for scores_GF in tokens.scores_LGF]
    return AffinitySplit(
        index_LEF=torch.stack([index_EF for index_EF, _, _ in layers]),
        tables_LV=experts_LG[:, tokens.group_V].to(torch.int32),
        captured_LR=[
            [captured / total for captured in history]
            for total, (_, _, history) in zip(totals_L, layers, strict=True)
        ],
        loads_LE=torch.stack([loads(expert_G, counts_G, num_experts) for expert_G in experts_LG])
        / counts_G.sum().clamp(min=1),
    )


def alternate(
    scores_GF: Tensor,
    counts_G: Tensor,
    importance_F: Tensor,
    start_G: Tensor,
    *,
    num_experts: int,
    expert_size: int,
    num_shared: int,
    capacity: int,
) -> tuple[Tensor, Tensor, list[float]]:
    """Choose one layer's neurons and its groups' experts in turn, for as long as more score is captured.

    Args:
        scores_GF: floating point.
        counts_G: int64, the running tokens of every group.
        importance_F: decides which neurons are shared.
        start_G: int64, the experts at the start, within the capacity.
        num_experts: E.
        expert_size: neurons of one expert.
        num_shared: how many of them all experts have.
        capacity: the most running tokens an expert may get.

    Returns:
        int64 [E, expert_size] neurons; int64 [G] experts; and the score captured at the start and after every
        round.
    """

    def choose(expert_G: Tensor) -> tuple[Tensor, Tensor, float]:
        index_EF = _choose_neurons(scores_GF, expert_G, importance_F, num_experts, expert_size, num_shared)
        holds_FE = scores_GF.new_zeros(scores_GF.shape[1], num_experts).scatter_(0, index_EF.T, 1)
        captured_GE = (scores_GF @ holds_FE).double()
        return index_EF, captured_GE, total_value(captured_GE, expert_G)

    expert_G = start_G
    index_EF, captured_GE, captured = choose(expert_G)
    history = [captured]
    while True:
        new_expert_G = assign(captured_GE, counts_G, capacity, expert_G)
        new_index_EF, new_captured_GE, captured = choose(new_expert_G)
        if captured <= history[-1]:
            return index_EF, expert_G, history
        index_EF, captured_GE, expert_G = new_index_EF, new_captured_GE, new_expert_G
        history.append(captured)


def _choose_neurons(
    scores_GF: Tensor,
    expert_G: Tensor,
    importance_F: Tensor,
    num_experts: int,
    expert_size: int,
    num_shared: int,
) -> Tensor:
    """The shared neurons and then, for every expert, those with the largest summed score; [E, F]."""
    order_F = importance_F.argsort(descending=True, stable=True)
    shared_EF = order_F[:num_shared].expand(num_experts, -1)
    goes_EG = scores_GF.new_zeros(num_experts, len(expert_G)).scatter_(0, expert_G[None], 1)
    rest_F = order_F[num_shared:]
    sums_EF = (goes_EG @ scores_GF)[:, rest_F]
    own_EF = rest_F[sums_EF.argsort(dim=1, descending=True, stable=True)]
    return torch.cat([shared_EF, own_EF], dim=1)[:, :expert_size]


def _group_counts(tokens: TokenScores, token_counts_V: Tensor) -> Tensor:
    num_groups = tokens.scores_LGF.shape[1]
    return torch.zeros(num_groups, dtype=torch.int64).index_add_(
        0, tokens.group_V, token_counts_V.cpu().long()
    )


def _balanced_starts(num_layers: int, counts_G: Tensor, num_experts: int, seed: int) -> list[Tensor]:
    """A table per layer, balanced as `hash_balance_tables` does it, with equals in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    starts = []
    for _ in range(num_layers):
        order_G = torch.randperm(len(counts_G), generator=generator)
        start_G = torch.empty_like(order_G)
        start_G[order_G] = hash_balance_tables(1, counts_G[order_G], num_experts)[0].long()
        starts.append(start_G)
    return starts
