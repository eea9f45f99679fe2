"""Which sequences attention takes side by side: on the CPU, many short ones are mostly overhead.

A window is a few sequences side by side, with a mask that keeps them apart. Windows of one size are one call
of attention on rows that lie as they are: nothing is gathered and nothing is padded. What a window's size
costs was measured by `python -m bench.windows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_HEADS = 12  # for which a choice is good enough
STEP = 16  # of sizes that PyTorch's kernels take no longer for than they must


class Costs(NamedTuple):
    """What attention costs, in microseconds.

    Attributes:
        block: c0 and c2 of one head over a window of n rows, c0 + c2 n^2, where 16 divides n.
        ragged: how many times as much where it does not.
        call: of each group's further call.
        sizes: of windows that may be best; 1 has every sequence in a window of its own.
    """

    block: tuple[float, float]
    ragged: float
    call: float
    sizes: tuple[int, ...]


# Forward, by flash attention: small windows are all overhead.
FLASH = Costs((1.5, 0.0026), 1.7, 100.0, (64, 96, 128, 256))
# Forward and backward with dropout, for which PyTorch writes all weights to memory, several times.
DROPOUT = Costs((4.0, 0.045), 1.0, 200.0, (1, 32, 64))


class Group(NamedTuple):
    """Windows of the same size.

    Attributes:
        size: rows of each window.
        windows: the numbers of the sequences in each.
    """

    size: int
    windows: list[list[int]]


def choose_windows(lengths: Sequence[int], costs: Costs = FLASH) -> list[Group]:
    """Windows for sequences of these lengths, of the size that is expected to cost least.

    Args:
        lengths: rows of each sequence; those of none are in no window.
        costs: `FLASH` or `DROPOUT`.
    """
    longest = max(lengths, default=0)
    chosen: list[Group] = []
    least = float("inf")
    for size in costs.sizes:
        groups = fill_windows(lengths, size)
        cost = cost_us(groups, costs)
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


def cost_us(groups: Sequence[Group], costs: Costs) -> float:
    """What attention over these windows is expected to take, in microseconds of one thread."""
    c0, c2 = costs.block

    def block(size: int) -> float:
        return (c0 + c2 * size * size) * (costs.ragged if size % STEP else 1.0)

    return sum(costs.call + _HEADS * len(windows) * block(size) for size, windows in groups)
