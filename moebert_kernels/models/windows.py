"""Which sequences attention takes side by side: on the CPU, many short ones are mostly overhead.

A window is a few sequences side by side, with a mask that keeps them apart. Windows of one size are one call
of attention on rows that lie as they are: nothing is gathered and nothing is padded. What a window's size
costs was measured by `python -m bench.windows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Microseconds of one head's attention over a window of n rows, c0 + c1 n + c2 n^2, and of a further call.
_BLOCK_US = (2.0, 0.07, 0.0014)
_CALL_US = 30.0
_HEADS = 12  # for which a choice is good enough
SIZES = (64, 128, 256)


class Group(NamedTuple):
    """Windows of the same size.

    Attributes:
        size: rows of each window.
        windows: the numbers of the sequences in each.
    """

    size: int
    windows: list[list[int]]


def choose_windows(lengths: Sequence[int]) -> list[Group]:
    """Windows for sequences of these lengths, of the size that is expected to cost least.

    Args:
        lengths: rows of each sequence; those of none are in no window.
    """
    longest = max(lengths, default=0)
    chosen: list[Group] = []
    least = float("inf")
    for size in SIZES:
        groups = fill_windows(lengths, size)
        cost = _cost_us(groups)
        if cost < least:
            chosen, least = groups, cost
        if size >= longest:
            break
    return chosen


def fill_windows(lengths: Sequence[int], size: int) -> list[Group]:
    """Fill windows of `size` rows, exactly where sequences can be found that do; longer ones are alone.

    The longest sequence that is left takes those beside it that leave the least room, longest first.
    """
    left = sorted((n for n in range(len(lengths)) if lengths[n]), key=lengths.__getitem__, reverse=True)
    groups: dict[int, list[list[int]]] = {}
    while left:
        first = left.pop(0)
        room = size - lengths[first]
        beside = _fullest([lengths[n] for n in left], room) if room > 0 else []
        window = [first, *(left[i] for i in beside)]
        for i in reversed(beside):
            del left[i]
        groups.setdefault(sum(lengths[n] for n in window), []).append(window)
    return [Group(rows, windows) for rows, windows in groups.items()]


def _fullest(lengths: list[int], room: int) -> list[int]:
    """The indices of lengths whose sum is the largest up to `room`; ascending."""
    within = (1 << room + 1) - 1
    sums = [1]  # bit s of sums[i]: some of the first i lengths add up to s
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & within)
        if sums[-1] >> room:
            break
    total = sums[-1].bit_length() - 1
    chosen = []
    for i in range(len(sums) - 2, -1, -1):
        if not sums[i] >> total & 1:
            chosen.append(i)
            total -= lengths[i]
    return chosen[::-1]


def _cost_us(groups: list[Group]) -> float:
    c0, c1, c2 = _BLOCK_US
    return sum(
        _CALL_US + _HEADS * len(windows) * (c0 + c1 * size + c2 * size * size) for size, windows in groups
    )
