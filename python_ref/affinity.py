"""Affinity: experts and the token ids that are routed to them, chosen for each other. Not in the paper.

The paper routes ids by a random table and picks neurons by importance over all tokens (section 3.1). Here an
expert takes the neurons that matter to its own ids, and an id goes to the expert that holds the neurons that
matter to it, in turn, until neither changes. What is made larger by both is the captured score: the sum over
token ids v of the score of the neurons, for v, that v's expert holds.
"""

import torch
from torch import Tensor


def token_scores(a_TF: Tensor, dLda_TF: Tensor, token_ids_T: Tensor, vocab_size: int) -> Tensor:
    """What a neuron is worth to a token id: the sum over the id's occurrences t of | a_tj dL/da_tj |.

    That is how much the loss changes, to first order, if the neuron is silent at this one token.

    Args:
        a_TF: after the activation.
        dLda_TF: gradient of the summed loss at a.
        token_ids_T: of the real tokens.
        vocab_size: V.

    Returns:
        score_VF, 0 for ids that do not occur.
    """
    score_VF = a_TF.new_zeros(vocab_size, a_TF.shape[1])
    for t, token in enumerate(token_ids_T.tolist()):
        score_VF[token] += (a_TF[t] * dLda_TF[t]).abs()
    return score_VF


def choose_neurons(
    score_VF: Tensor,
    expert_V: Tensor,
    importance_F: Tensor,
    num_experts: int,
    expert_size: int,
    num_shared: int,
) -> Tensor:
    """Every expert takes the num_shared most important neurons, then those with the largest summed score.

    The sum is over the expert's own ids. Ties go to the more important neuron, then to the lower index.
    Experts may take the same neuron without its being shared: they choose independently.

    Returns:
        [E, expert_size] int64, in the order in which they were taken.
    """
    order = importance_F.argsort(descending=True, stable=True).tolist()
    index_EF = []
    for e in range(num_experts):
        own_F = score_VF[expert_V == e].sum(dim=0)
        rest = sorted(order[num_shared:], key=lambda j: -own_F[j])
        index_EF.append((order[:num_shared] + rest)[:expert_size])
    return torch.tensor(index_EF)


def captured_scores(score_VF: Tensor, index_EF: Tensor) -> Tensor:
    """Return [V, E]: the score, for id v, of the neurons that expert e holds."""
    return torch.stack([score_VF[:, index_F].sum(dim=1) for index_F in index_EF], dim=1)


def assign(value_GE: Tensor, weight_G: Tensor, capacity: int, start_G: Tensor) -> Tensor:
    """A bin for every item so that the summed value is large and no bin is heavier than capacity.

    A bin charges its price times the item's weight; every item goes where its value less the charge is
    largest. While a bin is too heavy, the heaviest raises its price until enough leave. Then two greedy
    passes: items leave bins that are still too heavy, and items go where they are worth more and there is
    room. If start_G after the last pass alone is worth more, it is the answer. (Ties: the lower bin, the
    lower item.)

    Args:
        value_GE: [items, bins].
        weight_G: integers >= 0.
        capacity: of every bin.
        start_G: an assignment that keeps to it.

    Returns:
        [G] int64.
    """
    values, weights = value_GE.tolist(), weight_G.tolist()
    best = _fill(start_G.tolist(), values, weights, capacity)
    priced = _make_room(_by_prices(values, weights, capacity), values, weights, capacity)
    if priced is not None:
        priced = _fill(priced, values, weights, capacity)
        if _total(values, priced) > _total(values, best):
            best = priced
    return torch.tensor(best)


def _total(values, bins):
    return sum(row[e] for row, e in zip(values, bins, strict=True))


def _loads(bins, weights, num_bins):
    return [sum(w for e, w in zip(bins, weights, strict=True) if e == bin) for bin in range(num_bins)]


def _argmax(row):
    return max(range(len(row)), key=lambda e: (row[e], -e))


def _by_prices(values, weights, capacity):
    net = [list(row) for row in values]
    num_bins = len(net[0])
    for _ in range(1000):
        bins = [_argmax(row) for row in net]
        load = _loads(bins, weights, num_bins)
        e = _argmax(load)
        if load[e] <= capacity:
            break
        inside = [g for g in range(len(bins)) if bins[g] == e and weights[g] > 0]
        regret = {
            g: (net[g][e] - max(net[g][f] for f in range(num_bins) if f != e)) / weights[g] for g in inside
        }
        inside.sort(key=lambda g: -regret[g])
        stay = 0
        while sum(weights[g] for g in inside[: stay + 1]) <= capacity:
            stay += 1
        border = [regret[g] for g in inside[max(stay - 1, 0) : stay + 1]]
        for g, weight in enumerate(weights):
            net[g][e] -= sum(border) / len(border) * weight
    return [_argmax(row) for row in net]


def _make_room(bins, values, weights, capacity):
    load = _loads(bins, weights, len(values[0]))
    for e in range(len(load)):
        if load[e] <= capacity:
            continue
        inside = [g for g in range(len(bins)) if bins[g] == e and weights[g] > 0]
        loss = {
            g: (values[g][e] - max(v for f, v in enumerate(values[g]) if f != e)) / weights[g] for g in inside
        }
        for g in sorted(inside, key=lambda g: loss[g]):
            if load[e] <= capacity:
                break
            others = [f for f in range(len(load)) if f != e and load[f] + weights[g] <= capacity]
            if others:
                bins[g] = max(others, key=lambda f: (values[g][f], -f))
                load[e] -= weights[g]
                load[bins[g]] += weights[g]
        if load[e] > capacity:
            return None
    return bins


def _fill(bins, values, weights, capacity):
    load = _loads(bins, weights, len(values[0]))
    start = list(bins)
    moves = [
        ((value - values[g][start[g]]) / max(weights[g], 1), g, e)
        for g in range(len(bins))
        for e, value in enumerate(values[g])
        if value > values[g][start[g]]
    ]
    for _, g, e in sorted(moves, key=lambda move: -move[0]):
        if bins[g] == start[g] and load[e] + weights[g] <= capacity:
            load[bins[g]] -= weights[g]
            load[e] += weights[g]
            bins[g] = e
    return bins


def alternate(
    score_VF: Tensor,
    count_V: Tensor,
    importance_F: Tensor,
    expert_V: Tensor,
    expert_size: int,
    num_shared: int,
    num_experts: int,
    capacity: int,
) -> tuple[Tensor, Tensor, list[float]]:
    """Choose neurons for the ids and experts for the neurons in turn, for as long as more is captured.

    Args:
        score_VF: one layer's, of ids that were seen.
        count_V: how many running tokens each id is.
        importance_F: of the layer; decides which neurons are shared.
        expert_V: where ids go at the start; within the capacity.
        expert_size: neurons of an expert.
        num_shared: how many of them all experts have.
        num_experts: E.
        capacity: the most running tokens an expert may get.

    Returns:
        index_EF, expert_V and the captured score at the start and after every round that raised it.
    """
    sizes = (num_experts, expert_size, num_shared)
    index_EF = choose_neurons(score_VF, expert_V, importance_F, *sizes)
    captured_VE = captured_scores(score_VF, index_EF)
    history = [_total(captured_VE.tolist(), expert_V.tolist())]
    while True:
        new_V = assign(captured_VE, count_V, capacity, expert_V)
        new_EF = choose_neurons(score_VF, new_V, importance_F, *sizes)
        new_VE = captured_scores(score_VF, new_EF)
        total = _total(new_VE.tolist(), new_V.tolist())
        if total <= history[-1]:
            return index_EF, expert_V, history
        index_EF, expert_V, captured_VE = new_EF, new_V, new_VE
        history.append(total)


def nearest_seen(embedding_VD: Tensor, seen_V: Tensor) -> Tensor:
    """The seen id whose input embedding has the largest cosine with an id's; a seen id is its own nearest.

    Args:
        embedding_VD: the input embeddings.
        seen_V: bool, whether an id occurred.

    Returns:
        [V] int64, ids (ties: the lower).
    """
    unit_VD = embedding_VD / embedding_VD.norm(dim=1, keepdim=True).clamp(min=1e-12)
    seen = seen_V.nonzero().flatten().tolist()
    return torch.tensor(
        [
            v if seen_V[v] else max(seen, key=lambda s: (float(unit_VD[v] @ unit_VD[s]), -s))
            for v in range(len(seen_V))
        ]
    )
