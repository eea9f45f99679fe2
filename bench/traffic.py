"""L2 and DRAM bytes of the layer's kernels: their programs in the order they have, through an LRU cache.

Programs that are resident together take their steps side by side, as programs of the same work do that start
together; the cache holds blocks of tiles. 16-bit types.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import NamedTuple

from .machine_code import Tile

ELEMENT = 2  # bytes
OUTPUTS = {"up_training": ("a", "slope")}
_SLICE = 256  # columns of K in one block


@dataclass(frozen=True)
class Shape:
    """One call of the layer: sizes in the package's notation, and each expert's rows."""

    D: int
    F: int
    counts: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def sizes(self, role: str) -> tuple[int, int]:
        """A GEMM's columns and its depth."""
        return (self.F, self.D) if role in ("up", "up_training", "down_backward") else (self.D, self.F)


def balanced(T: int, D: int = 768, F: int = 768, E: int = 4, K: int = 1) -> Shape:
    """Every expert with as many rows."""
    return Shape(D, F, tuple(T * K // E + (e < T * K % E) for e in range(E)))


class Traffic(NamedTuple):
    """Bytes that multiprocessors ask of L2, and that move between it and DRAM."""

    l2: int
    read: int
    written: int


class Cache:
    """An LRU cache of blocks. What was written goes to DRAM when it is pushed out or at the end."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = self.asked = self.missed = self.written = 0
        self._blocks: OrderedDict[Hashable, tuple[int, bool]] = OrderedDict()

    def read(self, block: Hashable, size: int) -> None:
        self.asked += size
        if block in self._blocks:
            self._blocks.move_to_end(block)
        else:
            self.missed += size
            self._put(block, size, False)

    def write(self, block: Hashable, size: int) -> None:
        if block in self._blocks:
            self.used -= self._blocks.pop(block)[0]
        self._put(block, size, True)

    def _put(self, block: Hashable, size: int, dirty: bool) -> None:
        self._blocks[block] = (size, dirty)
        self.used += size
        while self.used > self.size:
            _, (size, dirty) = self._blocks.popitem(last=False)
            self.used -= size
            self.written += size * dirty

    def traffic(self) -> Traffic:
        """All of it, with what is still to be written."""
        rest = sum(size for size, dirty in self._blocks.values() if dirty)
        return Traffic(self.asked, self.missed, self.written + rest)


# A program is the list of its steps, a step the blocks it touches: (block, bytes, whether it writes).
Step = Sequence[tuple[Hashable, int, bool]]


def simulate(programs: Iterable[Iterator[Step]], slots: int, l2_bytes: int) -> Traffic:
    """Run programs step by step side by side, the next in order wherever one has ended."""
    cache = Cache(l2_bytes)
    waiting = iter(programs)
    running = list(islice(waiting, slots))
    while running:
        going: list[Iterator[Step]] = []
        for program in running:
            step = next(program, None)
            if step is None:
                going += islice(waiting, 1)
                continue
            for block, size, writes in step:
                (cache.write if writes else cache.read)(block, size)
            going.append(program)
        running = going
    return cache.traffic()


def gemm_programs(role: str, tile: Tile, shape: Shape) -> Iterator[Iterator[Step]]:
    """The programs of a grouped GEMM in the order of their numbers: row tile by row tile, columns fastest."""
    columns, depth = shape.sizes(role)

    def program(expert: int, row: int, live: int, column: int) -> Iterator[Step]:
        for k in range(0, depth, _SLICE):
            width = min(_SLICE, depth - k) * ELEMENT
            rows, weight = ("rows", expert, row, k), ("weight", expert, column, k)
            yield [(rows, live * width, False), (weight, tile.n * width, False)]
        out = live * min(tile.n, columns - column) * ELEMENT
        if role == "down_backward":
            yield [(("slope", expert, row, column), out, False)]
        yield [((name, expert, row, column), out, True) for name in OUTPUTS.get(role, ("out",))]

    for expert, count in enumerate(shape.counts):
        for row in range(0, count, tile.m):
            for column in range(0, columns, tile.n):
                yield program(expert, row, min(tile.m, count - row), column)


@dataclass(frozen=True)
class Shares:
    """The list of steps of both weight gradients, as `kernels.wgrad` shares it out."""

    tile: Tile
    shape: Shape
    programs: int
    rotated: bool = True

    @property
    def tiles(self) -> int:
        """Of one expert."""
        return 2 * ceil(self.shape.F / self.tile.m) * ceil(self.shape.D / self.tile.n)

    @property
    def steps_E(self) -> list[int]:
        return [max(1, ceil(count / self.tile.k)) for count in self.shape.counts]

    @property
    def total(self) -> int:
        return sum(self.steps_E) * self.tiles

    def begin(self, program: int) -> int:
        each, longer = divmod(self.total, self.programs)
        return program * each + min(program, longer)

    def owner(self, step: int) -> int:
        each, longer = divmod(self.total, self.programs)
        within_longer = step // (each + 1)
        return within_longer if within_longer < longer else (step - longer) // max(each, 1)

    def pieces(self, program: int) -> Iterator[tuple[int, int, range, bool]]:
        """A program's work in order: expert, tile, steps of its rows, whether that is the whole tile."""
        step, last = self.begin(program), self.begin(program + 1)
        while step < last:
            expert, at = 0, step
            while at >= self.steps_E[expert] * self.tiles:
                at -= self.steps_E[expert] * self.tiles
                expert += 1
            steps = self.steps_E[expert]
            tile, at = divmod(at, steps)
            until = min(at + last - step, steps)
            cut = self._before_cut(step - at, steps) if self.rotated else 0
            first = at - cut + (steps if at < cut else 0)
            yield expert, tile, range(first, first + until - at), until - at == steps
            step += until - at

    def _before_cut(self, first: int, steps: int) -> int:
        """Steps of the tile from `first` on that a program takes which began before it."""
        owner = self.owner(first)
        return min(self.begin(owner + 1) - first, steps) if self.begin(owner) < first else 0


def weight_programs(shares: Shares) -> Iterator[Iterator[Step]]:
    """The programs of the streamed weight gradients; of the plain ones where there is one for each tile."""
    tile, shape = shares.tile, shares.shape
    columns = ceil(shape.D / tile.n)

    def program(number: int, pieces: Iterable[tuple[int, int, range, bool]]) -> Iterator[Step]:
        for expert, index, steps, whole in pieces:
            weight, within = divmod(index, shares.tiles // 2)
            m, n = divmod(within, columns)
            for k in steps:
                live = min(tile.k, max(0, shape.counts[expert] - k * tile.k)) * ELEMENT
                left, right = ("left", weight, expert, k, m), ("right", weight, expert, k, n)
                yield [(left, live * tile.m, False), (right, live * tile.n, False)]
            size = tile.m * tile.n * (ELEMENT if whole else 4)
            yield [(("out", expert, index, None if whole else number), size, True)]

    if tile.stream_k:
        for number in range(shares.programs):
            yield program(number, shares.pieces(number))
        return
    for expert, steps in enumerate(shares.steps_E):
        for index in range(shares.tiles):
            yield program(0, [(expert, index, range(steps), True)])
