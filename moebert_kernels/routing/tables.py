"""Hash tables: the expert of every token id, drawn or balanced before training and then fixed."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from moebert_kernels.checks import check_tensor, check_whole


def hash_random_tables(num_layers: int, vocab_size: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """Draw one random table per layer (`hash-random`, the paper's default; Roller et al. 2021).

    Args:
        num_layers: L.
        vocab_size: V.
        num_experts: E.
        seed: of a generator of its own; the global random state is neither read nor moved.

    Returns:
        int32 [L, V] with entries in [0, E), on the CPU.

    Raises:
        ValueError: there is no layer or no expert, or `vocab_size` is negative.
    """
    _check_sizes(num_layers, num_experts)
    check_whole("vocab_size", vocab_size, least=0)
    check_seed(seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (num_layers, vocab_size)
    return torch.randint(num_experts, shape, generator=generator, dtype=torch.int32, device="cpu")


def hash_balance_tables(num_layers: int, token_counts_V: Tensor, num_experts: int) -> Tensor:
    """Deal token ids out so that experts see equally many running tokens (`hash-balance`).

    Greedy, as in the authors' code: ids by falling count (the lower id first among equals), each to the
    expert with the least load so far; among equal loads to the one with the fewest ids, then the first.
    Ids that never occur add no load and go to the expert with the fewest ids. Every layer has the same
    table, as in the authors' code.

    Args:
        num_layers: L.
        token_counts_V: [V], how often each token id occurs in the training data, padding not counted.
        num_experts: E.

    Returns:
        int32 [L, V] with entries in [0, E), on the CPU.

    Raises:
        ValueError: there is no layer or no expert, or `token_counts_V` is not one-dimensional or holds a
            negative count.
    """
    _check_sizes(num_layers, num_experts)
    check_tensor("token_counts_V", token_counts_V)
    if token_counts_V.dim() != 1 or (token_counts_V.numel() and int(token_counts_V.min()) < 0):
        raise ValueError(
            f"token_counts_V must be one count >= 0 per token id, got shape {tuple(token_counts_V.shape)}"
        )
    counts = token_counts_V.tolist()
    by_falling_count = sorted(range(len(counts)), key=lambda token: (-counts[token], token))
    num_seen = sum(count > 0 for count in counts)
    table = [0] * len(counts)

    queue = [(0, 0, expert) for expert in range(num_experts)]
    for token in by_falling_count[:num_seen]:
        load, num_ids, expert = queue[0]
        table[token] = expert
        heapq.heapreplace(queue, (load + counts[token], num_ids + 1, expert))
    queue = [(num_ids, 0, expert) for _, num_ids, expert in queue]
    heapq.heapify(queue)
    for token in by_falling_count[num_seen:]:
        num_ids, _, expert = queue[0]
        table[token] = expert
        heapq.heapreplace(queue, (num_ids + 1, 0, expert))
    return torch.tensor(table, dtype=torch.int32, device="cpu").repeat(num_layers, 1)


def check_seed(seed: int) -> None:
    """Raise a TypeError or ValueError unless a torch generator takes the seed."""
    check_whole("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must have at most 64 bits, got {seed}")


def _check_sizes(num_layers: int, num_experts: int) -> None:
    for name, size in (("num_layers", num_layers), ("num_experts", num_experts)):
        check_whole(name, size, least=1)
