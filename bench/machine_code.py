"""What the compiler makes of every candidate tile on Hopper, for `machine`: compiled and read without a GPU.

    python -m bench.machine_code

writes machine_code.json anew, about five minutes on two processors; a test compiles some of it again. 16-bit
types at hidden size and expert size 768, with biases, without a gate.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("machine_code.json")


@dataclass(frozen=True)
class Tile:
    """The tile of a `configs.Tile`, without what that imports; a streamed one is another kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    per_multiprocessor: int = 1
    stream_k: bool = False

    def __str__(self) -> str:
        stream = f", streamed {self.per_multiprocessor}" if self.stream_k else ""
        parts = f"/{self.parts}" if self.parts > 1 else ""
        return f"{self.m}x{self.n}{parts}, {self.warps} warps, {self.stages} stages{stream}"


@dataclass(frozen=True)
class Instructions:
    """What one thread executes around its products, by where it stands in the machine code.

    Attributes:
        before: up to the loop of products.
        step: of that loop, for each BLOCK_K.
        after: once the loop is left.
        after_memory: of these, loads, stores and shuffles.
        again: of these, what a loop of its own repeats.
        again_memory: loads, stores and shuffles of that loop.
    """

    before: int
    step: float
    after: int
    after_memory: int
    again: int
    again_memory: int


@dataclass(frozen=True)
class Code(Instructions):
    """One kernel's binary.

    Attributes:
        registers: of a thread.
        shared_bytes: of a program.
        programs: resident on a multiprocessor at once.
        asynchronous: multiplies by wgmma, not by mma.sync.
    """

    registers: int
    shared_bytes: int
    programs: int
    asynchronous: bool


@cache
def codes() -> dict[tuple[str, Tile], Code]:
    """Every binary read, by role of `tune.ROLES` and tile."""
    return {
        (row["role"], Tile(**row["tile"])): Code(**row["code"])
        for row in json.loads(FILE.read_text(encoding="utf-8"))
    }


def tile_of(tile: Any, stream_k: bool = False) -> Tile:
    """A `configs.Tile` as a key of `codes`."""
    return Tile(**asdict(tile), stream_k=stream_k)


def compiled(candidate: Any) -> Code:
    """Compile and read one candidate of `tune.candidates`."""
    from moebert_kernels.kernels.triton import configs

    from . import binaries, tune
    from .ahead import as_on
    from .cases import FFNCase

    with as_on("sm_90", 132):
        launches = tune._meta_launches(FFNCase(4096), candidate, configs.TABLE["sm_90", "half", "large"])
    reading = binaries.read(launches[0], "sm_90")
    if reading.around is None:
        raise RuntimeError(f"{reading.kernel} has no products")
    return Code(
        **asdict(reading.around),
        registers=reading.registers,
        shared_bytes=reading.shared_bytes,
        programs=reading.programs,
        asynchronous="wgmma" in reading.instructions,
    )


def main() -> None:
    """Compile all candidates and write the file."""
    from . import tune

    rows = []
    for candidate in (c for role in tune.ROLES for c in tune.candidates(role)):
        if candidate.specialised or not candidate.tma:
            continue
        tile = tile_of(candidate.tile, candidate.stream_k)
        row = {"role": candidate.role, "tile": asdict(tile), "code": asdict(compiled(candidate))}
        rows.append(json.dumps(row))
        print(candidate.role, tile, row["code"], flush=True)
    FILE.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
