"""A model of a Hopper GPU: what each kernel of the layer should take, from its machine code and its order.

For 16-bit types, and not for warp-specialised kernels. A kernel is predicted from five things, none of which
needs a GPU:

    waves      its programs over multiprocessors, and the slots that registers and shared memory leave
    loop       of each step the slowest of products, shared memory, L2, instructions, waiting for loads
    epilogue   instructions after the last product, and the loads that they wait for
    traffic    L2 and DRAM bytes, by running the programs in their order through an LRU cache
    latencies  a launch, dependent loads before the first product

Programs that share a multiprocessor start together and go through these phases side by side: the model adds
the phases up and lets none hide behind another, which is what an H200 showed. A time is that of a launch in a
CUDA graph that finds nothing cached. Constants marked "fitted" were fitted to `results/h200/tiles.jsonl` at
T = 64 and 16384, by the squares of the ratios' logarithms, and rounded. `predictions` holds the model against
the rest, and against what others reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from .machine_code import Code, Tile, codes, tile_of
from .traffic import ELEMENT, OUTPUTS, Shape, Shares, Traffic, gemm_programs, simulate, weight_programs

MULTIPLY_ADDS = 2048  # of a multiprocessor in a cycle: the data sheet's 989 TFLOP/s by 132 and 1.83 GHz
MMA_SYNC = 0.63  # what the older instruction reaches of them (arXiv 2402.13499)
SHARED_BYTES = 128  # a cycle
LOAD_BYTES = 64  # a cycle from L2 into one multiprocessor
CLOCK_HZ = 1.7e9  # Nsight Compute: products ran 57 % of the 37.1 us of `scatter` at T = 16384
CLOCK_FLOPS = 780e12  # the large GEMM of that card; one whose GEMM is slower runs slower throughout
LOAD_S = 0.39e-6  # of one dependent load: fitted. Idle, 263 cycles from L2, 479 from DRAM (arXiv 2402.13499)
CHAIN_CYCLES = 3.5  # of one instruction of a warp alone: fitted
MEMORY_CYCLES = 8  # of a scheduler for a load, store or shuffle: fitted
STEP_CYCLES = 230  # of a step's waits and barriers, whatever else it does: fitted
LOAD_SHARE = 0.6  # of the time by LOAD_BYTES: fitted; requests of neighbours for the same rows are joined
SHARED_SHARE = 0.6  # of the time by SHARED_BYTES: fitted
FIRST_LOADS = 2  # dependent loads before the loop: offsets, order
BEGIN_S = 1.9e-6  # launch, and a GEMM's own code, 10 to 40 KB, brought in: fitted
LAUNCH_S = 0.9e-6  # of a kernel with little code: fitted to `sum_tiles` of results/h200/kernels-c10c161.jsonl

GEMM_ROLES = ("up", "up_training", "down", "down_backward", "up_backward")


@dataclass(frozen=True)
class Card:
    """A GPU by what was measured or published of it.

    Attributes:
        name: as CUDA has it, or the beginning of that.
        multiprocessors: how many.
        flops_per_s: of a large 16-bit GEMM.
        bytes_per_s: of a large copy.
        l2_bytes: of cache.
    """

    name: str
    multiprocessors: int
    flops_per_s: float
    bytes_per_s: float
    l2_bytes: int

    @property
    def clock_hz(self) -> float:
        return CLOCK_HZ * self.flops_per_s / CLOCK_FLOPS

    def cycles(self, seconds: float) -> float:
        """So many cycles as fit into a time."""
        return seconds * self.clock_hz


# The H200's ceilings are those of results/h200/kernels-c10c161.jsonl; the H100's a public GEMM of
# 8192 x 8192 x 16384 (Triton's Gluon tutorial 07) and 90 % of the data sheet's bandwidth.
CARDS = (
    Card("NVIDIA H200", 132, 780e12, 4.24e12, 60 * 2**20),
    Card("NVIDIA H100", 132, 665e12, 3.0e12, 50 * 2**20),
)


def card_of(name: str, flops_per_s: float | None = None, bytes_per_s: float | None = None) -> Card | None:
    """The card that a device's name begins with, at the ceilings measured there; None for one not known."""
    for card in CARDS:
        if name.startswith(card.name):
            return replace(
                card,
                flops_per_s=flops_per_s or card.flops_per_s,
                bytes_per_s=bytes_per_s or card.bytes_per_s,
            )
    return None


@dataclass(frozen=True)
class Prediction:
    """What a kernel should take.

    Attributes:
        seconds: of a launch on cold caches.
        waves: of programs over all slots.
        traffic: its bytes.
        phases: seconds of launch, start, loop and epilogue, which add up, and of DRAM, beside them.
        binds: what the loop waits for, or "DRAM" where that is longer than everything else.
    """

    seconds: float
    waves: float
    traffic: Traffic
    phases: dict[str, float]
    binds: str


def predict(
    role: str, tile: Tile, shape: Shape, card: Card, code: Code | None = None, simulated: bool = True
) -> Prediction:
    """A GEMM of the layer, by its role in `tune.ROLES`; weight gradients without what joins their pieces.

    Without the traffic, which takes the time of it, unless `simulated`.

    Raises:
        KeyError: nothing is known of the tile's code, and none is given.
    """
    code = code or codes()[role, tile]
    if role == "weight_grad":
        return _weight_grad(tile, shape, card, code, simulated)
    columns, depth = shape.sizes(role)
    across = ceil(columns / tile.n)
    programs = sum(ceil(count / tile.m) for count in shape.counts) * across
    slots = card.multiprocessors * code.programs
    traffic = _gemm_traffic(role, tile, shape, slots, card.l2_bytes) if simulated else Traffic(0, 0, 0)
    repeats = ceil(ceil(shape.D / 64) / across) - 1 if role == "down_backward" else 0
    # The bias, and in the backward pass slopes and once more the rows of dy.
    loads = repeats + 2 if role == "down_backward" else 1
    stored = len(OUTPUTS.get(role, ("out",))) + (2 if role == "down_backward" else 0)
    program = Program(tile, code, ceil(depth / tile.k), repeats, loads, tile.m * tile.n * ELEMENT * stored)
    return in_rounds(program, programs, code.programs, traffic, card)


@cache
def _gemm_traffic(role: str, tile: Tile, shape: Shape, slots: int, l2_bytes: int) -> Traffic:
    return simulate(gemm_programs(role, tile, shape), slots, l2_bytes)


@cache
def weight_traffic(shares: Shares, l2_bytes: int) -> Traffic:
    """Bytes of both weight gradients."""
    return simulate(weight_programs(shares), shares.programs, l2_bytes)


def _weight_grad(tile: Tile, shape: Shape, card: Card, code: Code, simulated: bool) -> Prediction:
    resident = tile.per_multiprocessor if tile.stream_k else code.programs
    slots = card.multiprocessors * resident
    shares = Shares(tile, shape, slots)
    programs = slots if tile.stream_k else len(shape.counts) * shares.tiles
    traffic = weight_traffic(shares, card.l2_bytes) if simulated else Traffic(0, 0, 0)
    tiles = len(shape.counts) * shares.tiles
    pieces = 1 + tiles / programs if tile.stream_k else 1.0
    stored = tile.m * tile.n * (4 if tile.stream_k else ELEMENT)
    # Without streaming the expert with most rows has programs that outlast the others.
    longest = 0.0 if tile.stream_k else max(shares.steps_E) / ceil(programs / slots)
    steps = max(shares.total / programs, longest)
    program = Program(tile, code, steps, 0, 0, stored, pieces, gathered_in_loop=True)
    return in_rounds(program, programs, resident, traffic, card)


@dataclass(frozen=True)
class Program:
    """One program: how often it goes through the parts of its code, and what it waits for.

    Attributes:
        steps: of the loop.
        repeats: of the loop after the products, beyond the first time.
        loads: dependent ones after the products.
        stored: bytes moved then.
        pieces: how often all that surrounds the loop is gone through.
        gathered_in_loop: addresses are loaded step by step, and made between barriers.
        waits: cycles of a step's barriers.
    """

    tile: Tile
    code: Code
    steps: float
    repeats: int
    loads: int
    stored: int
    pieces: float = 1.0
    gathered_in_loop: bool = False
    waits: float = STEP_CYCLES

    def phases(self, together: int, card: Card) -> tuple[dict[str, float], str]:
        """Seconds of start, loop and epilogue of so many programs at once; what binds the loop."""
        code, warps = self.code, self.tile.warps
        wait = card.cycles(LOAD_S)
        start = FIRST_LOADS * wait + code.before * CHAIN_CYCLES
        after = max(
            code.after + self.repeats * code.again,
            MEMORY_CYCLES * (code.after_memory + self.repeats * code.again_memory),
        )
        epilogue = max(together * after * warps / 4, after * CHAIN_CYCLES) + self.loads * wait
        epilogue += together * self.stored / LOAD_BYTES
        step, binds = self._step(together, wait)
        seconds = {
            "start": self.pieces * start / card.clock_hz,
            "loop": self.steps * step / card.clock_hz,
            "epilogue": self.pieces * epilogue / card.clock_hz,
        }
        return seconds, binds

    def _step(self, together: int, wait: float) -> tuple[float, str]:
        tile, code = self.tile, self.code
        rate = MULTIPLY_ADDS * (1.0 if code.asynchronous else MMA_SYNC)
        loaded = (tile.m + tile.n) * tile.k * ELEMENT
        # wgmma reads the weight's tile for every 64 rows; mma.sync both sides for every 16.
        m, n = (tile.m / 64, 1) if code.asynchronous else (tile.m / 16, tile.n / 16)
        shared = (tile.m * max(n, 1) + tile.n * max(m, 1)) * tile.k * ELEMENT + loaded
        stages = max(2, min(tile.stages, code.shared_bytes // loaded))
        own = together * code.step * tile.warps / 4
        costs = {
            "products": together * tile.m * tile.n * tile.k / rate,
            "L2 to multiprocessor": together * LOAD_SHARE * loaded / LOAD_BYTES,
            "shared memory": together * SHARED_SHARE * shared / SHARED_BYTES,
            "instructions": own,
            "latency of loads": wait / (stages - 1),
        }
        binds = max(costs, key=lambda name: costs[name])
        if not self.gathered_in_loop:
            return costs[binds] + self.waits, binds
        addresses = max(own, code.step * CHAIN_CYCLES)
        return costs[binds] + addresses, f"{binds}, then addresses"


def in_rounds(program: Program, programs: int, resident: int, traffic: Traffic, card: Card) -> Prediction:
    """Programs in rounds of as many as fit; DRAM works beside all of it."""
    each = ceil(programs / card.multiprocessors)
    full, rest = divmod(each, resident)
    phases = {"launch": BEGIN_S, "start": 0.0, "loop": 0.0, "epilogue": 0.0}
    binds = ""
    for together, times in ((resident, full), (rest, 1)):
        if together and times:
            seconds, bound = program.phases(together, card)
            binds = binds or bound
            for name, value in seconds.items():
                phases[name] += times * value
    total = sum(phases.values())
    dram = (traffic.read + traffic.written) / card.bytes_per_s
    if BEGIN_S + dram > total:
        total, binds = BEGIN_S + dram, "DRAM"
    return Prediction(
        total, programs / (card.multiprocessors * resident), traffic, phases | {"DRAM": dram}, binds
    )


def predict_join(tile: Tile, shape: Shape, card: Card) -> Prediction:
    """What adds the pieces of the streamed weight gradients' cut tiles up."""
    shares = Shares(tile, shape, card.multiprocessors * tile.per_multiprocessor)
    cut = [piece[:2] for p in range(shares.programs) for piece in shares.pieces(p) if not piece[3]]
    size = tile.m * tile.n
    return _small(Traffic(len(cut) * size * 4, len(cut) * size * 4, len(set(cut)) * size * ELEMENT), 3, card)


def predict_sum_tiles(rows_of_tile: int, shape: Shape, card: Card) -> Prediction:
    """The sums of both bias gradients over each expert's row tiles, 32 at a time."""
    tiles = [ceil(count / rows_of_tile) for count in shape.counts]
    size = (shape.D + shape.F) * 4
    traffic = Traffic(sum(tiles) * size, sum(tiles) * size, len(tiles) * size // 2)
    return _small(traffic, 1 + ceil(max(tiles) / 32), card)


def _small(traffic: Traffic, loads: int, card: Card) -> Prediction:
    """A kernel that does nothing but wait for its loads, one after the other, and for DRAM."""
    dram = (traffic.read + traffic.written) / card.bytes_per_s
    phases = {"launch": LAUNCH_S, "start": loads * LOAD_S, "DRAM": dram}
    return Prediction(
        sum(phases.values()), 1.0, traffic, phases, "DRAM" if dram > LOAD_S else "latency of loads"
    )


def predict_pass(config: Any, shape: Shape, card: Card, backward: bool) -> dict[str, Prediction]:
    """The kernels of a forward pass, or of forward and backward, by name, with a `configs.Config`."""
    found = {}
    for role in GEMM_ROLES[1:] if backward else ("up", "down"):
        tile = tile_of(getattr(config, role.removesuffix("_training")))
        found[role] = predict(role, tile, shape, card)
    if backward:
        tile = tile_of(config.weight_grad, config.stream_k)
        found["sum_tiles"] = predict_sum_tiles(config.down_backward.m, shape, card)
        found["weight_grad"] = predict("weight_grad", tile, shape, card)
        if config.stream_k:
            found["join"] = predict_join(tile, shape, card)
    return found
