"""Assignment: each item to the bin that values it most, when bins hold only so much."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MOST_PRICE_RISES = 1000


def assign(value_GE: Tensor, weight_G: Tensor, capacity: int, start_G: Tensor) -> Tensor:
    """Give every item a bin so that the summed value is large and no bin is heavier than `capacity`.

    The generalised assignment problem, which is NP-hard, by prices: a bin charges each item its price times
    the item's weight, and the item goes where value less charge is largest. As long as a bin is too heavy,
    the heaviest raises its price to the point where enough leave: those that lose least per unit of weight.
    That is a descent on the dual of the linear relaxation, coordinate by coordinate; as the relaxation splits
    at most E - 1 items, little remains for two greedy passes, one that makes room where too much is left and
    one that fills up the room that heavy items left behind. `start_G` after the second pass is the result
    instead if it is worth more.

    Args:
        value_GE: float64 [items, bins].
        weight_G: int64, not negative.
        capacity: of every bin.
        start_G: int64, an assignment that keeps to the capacity.

    Returns:
        int64 [G], a bin for every item: within the capacity, and worth at least as much as `start_G`.
    """
    by_price_G = _make_room(_by_prices(value_GE, weight_G, capacity), value_GE, weight_G, capacity)
    candidates = [_fill(start_G, value_GE, weight_G, capacity)]
    if by_price_G is not None:
        candidates.append(_fill(by_price_G, value_GE, weight_G, capacity))
    return max(candidates, key=lambda bin_G: total_value(value_GE, bin_G))


def total_value(value_GE: Tensor, bin_G: Tensor) -> float:
    """Return the summed value of every item in its bin."""
    return float(value_GE.gather(1, bin_G[:, None]).sum())


def loads(bin_G: Tensor, weight_G: Tensor, num_bins: int) -> Tensor:
    """Return the summed weight in every bin, int64 [E]."""
    return torch.zeros(num_bins, dtype=torch.int64).index_add_(0, bin_G, weight_G)


@np.errstate(invalid="ignore")  # of a single bin no price is too high: it is infinite
def _by_prices(value_GE: Tensor, weight_G: Tensor, capacity: int) -> Tensor:
    """Let bins that are too heavy raise their price one after the other; some may stay too heavy."""
    num_bins = value_GE.shape[1]
    # In NumPy, which takes a tenth of the time over items this few.
    net_GE, weighs_G = value_GE.numpy().copy(), weight_G.numpy()
    bin_G = net_GE.argmax(1)
    for _ in range(_MOST_PRICE_RISES):
        load_E = np.bincount(bin_G, weighs_G, num_bins)
        e = int(load_E.argmax())
        if load_E[e] <= capacity:
            break
        inside = ((bin_G == e) & (weighs_G > 0)).nonzero()[0]
        weight, net = weighs_G[inside], net_GE[inside]
        here = net[:, e].copy()
        net[:, e] = -np.inf
        regret = (here - net.max(1)) / weight
        order = (-regret).argsort(kind="stable")
        first_out = int((weight[order].cumsum() <= capacity).sum())
        # Half way to the last that stays, so that the first that leaves does not tie.
        rise = regret[order[max(first_out - 1, 0) : first_out + 1]].mean()
        if rise == 0:  # nor would any later one change anything
            break
        net_GE[:, e] -= rise * weighs_G
        bin_G[inside] = net_GE[inside].argmax(1)  # to all others this bin was less before
    return torch.from_numpy(bin_G)


def _make_room(bin_G: Tensor, value_GE: Tensor, weight_G: Tensor, capacity: int) -> Tensor | None:
    """Move what loses least per weight out of bins that are too heavy; None if it fits nowhere else."""
    load = loads(bin_G, weight_G, value_GE.shape[1]).tolist()
    bin_G = bin_G.clone()
    for e in range(len(load)):
        if load[e] <= capacity:
            continue
        inside = ((bin_G == e) & (weight_G > 0)).nonzero().squeeze(1)
        elsewhere = value_GE[inside].index_fill_(1, torch.tensor(e), -torch.inf).max(1).values
        loss = (value_GE[inside, e] - elsewhere) / weight_G[inside]
        for g in inside[loss.argsort(stable=True)].tolist():
            weight = int(weight_G[g])
            for f in value_GE[g].argsort(descending=True, stable=True).tolist():
                if f != e and load[f] + weight <= capacity:
                    bin_G[g] = f
                    load[e] -= weight
                    load[f] += weight
                    break
            if load[e] <= capacity:
                break
        if load[e] > capacity:
            return None
    return bin_G


def _fill(bin_G: Tensor, value_GE: Tensor, weight_G: Tensor, capacity: int) -> Tensor:
    """Move items to where they are worth more and there is room, the largest gain per weight first."""
    num_bins = value_GE.shape[1]
    load = loads(bin_G, weight_G, num_bins).tolist()
    bins, weights = bin_G.tolist(), weight_G.tolist()
    gain_GE = value_GE - value_GE.gather(1, bin_G[:, None])
    wanted = (gain_GE > 0).flatten().nonzero().squeeze(1)
    rate = gain_GE.flatten()[wanted] / weight_G.clamp(min=1)[wanted // num_bins]
    moved = set()
    for move in wanted[rate.argsort(descending=True, stable=True)].tolist():
        g, e = divmod(move, num_bins)
        if g not in moved and load[e] + weights[g] <= capacity:
            load[bins[g]] -= weights[g]
            load[e] += weights[g]
            bins[g] = e
            moved.add(g)
    return torch.tensor(bins, dtype=torch.int64)
