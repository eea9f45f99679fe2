"""What the compilers make of the committed configs, for each GPU generation.

    python -m tests.kernels.readings

compiles all of them, two minutes, and writes readings.json anew. The tests read it: a kernel is compiled
again where the key of its binary is not that which was recorded, so that nothing that changed is taken for
what it was.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench import binaries
from moebert_kernels.kernels.triton import configs
from moebert_kernels.kernels.triton.hopper.launches import MOST_EXPERTS

FILE = Path(__file__).with_name("readings.json")
PINGPONG = ("gather_pingpong_kernel", "scatter_pingpong_kernel", "gather_backward_pingpong_kernel")
WITH_CODE = ("gather_kernel", "gather_backward_kernel", "scatter_kernel")

FULL = ((True, True, True),)
# Each choice of training, gate and bias without the others.
VARIANTS = ((True, False, False), (False, True, False), (False, False, True))
SPECIALISED = ((True, False, True), (False, False, True))  # of which warp-specialised kernels know more

# Each family at a size likely to fail. A tile that fitted at D=F=768 asked for twice the shared memory there
# is at TinyBERT's 312 x 1200; rows of 312 are no multiple of 16: their loads are narrower. BERT-large: 1024.
TINY = {"D": 312, "F": 1200}
OTHER_SIZES = {"sm_80": TINY, "sm_90": TINY, "sm_100": {"D": 1024, "F": 1024}}
MOST = {"D": 1024, "F": 1024, "E": MOST_EXPERTS, "K": 2}


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which launches are compiled.

    Attributes:
        arithmetics: of the configs.
        of_sizes: of the configs, "large" for example; all if there is none. IEEE has one for all sizes.
        variants: arguments of `binaries.Variant`.
        kernels: names; all if there is none.
        code: kernels whose instructions are read too.
        sizes: of `binaries.launches`.
    """

    arithmetics: tuple[str, ...]
    of_sizes: tuple[str, ...] = ()
    variants: tuple[tuple[bool, bool, bool], ...] = FULL
    kernels: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def launches(self, family: str) -> Iterator[tuple[str, Any]]:
        """Each that differs once, by the name of its config."""
        variants = [binaries.Variant(*choice) for choice in self.variants]
        for name, found in binaries.distinct_launches(
            family, self.arithmetics, variants, **self.sizes
        ).items():
            if not self.of_sizes or name.endswith(self.of_sizes) or name.startswith("ieee"):
                for launch in found:
                    if not self.kernels or launch.kernel.__name__ in self.kernels:
                        yield name, launch


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The large config with C shared neurons; warp-specialised kernels are not for those."""

    C: int
    code: tuple[str, ...] = ()

    def launches(self, family: str) -> Iterator[tuple[str, Any]]:
        """The products, whose loops are two."""
        config = dataclasses.replace(configs.TABLE[family, "half", "large"], specialised=())
        for launch in binaries.launches(config, binaries.ELEMENT["half"], C=self.C):
            if launch.kernel.__name__.startswith(("gather", "scatter", "weight_grad")):
                yield f"C={self.C}", launch


SHARED = {"apart": Sharing(0), "shared": Sharing(512)}


def _half(*of_sizes: str, **more: Any) -> Asked:
    return Asked(("half",), of_sizes, **more)


ASKED: dict[str, dict[str, Asked | Sharing]] = {
    "sm_80": {
        "half": _half(),
        "float32": Asked(("tf32",), ("large",)),
        "other size": _half("large", sizes=OTHER_SIZES["sm_80"]),
        **SHARED,
    },
    "sm_90": {
        "large": _half("medium", "large", code=WITH_CODE),
        "small": _half("tiny", "small", "safe"),
        "variants": _half("large", variants=VARIANTS),
        "float32": Asked(("tf32", "ieee"), ("large",)),
        "other size": _half("large", sizes=OTHER_SIZES["sm_90"]),
        "specialised": _half("large", variants=SPECIALISED, kernels=PINGPONG, sizes=MOST),
        **SHARED,
    },
    "sm_100": {
        "half": _half(),
        "float32": Asked(("tf32",), ("large",)),
        "other size": _half("large", sizes=OTHER_SIZES["sm_100"]),
    },
}


class Wanted(NamedTuple):
    """One launch: what asked for it, its config, and whether its instructions are read."""

    family: str
    name: str
    config: str
    launch: Any
    code: bool

    @property
    def key(self) -> str:
        """What it is recorded by."""
        return binaries.key_of(self.launch, self.family) + (" with code" if self.code else "")

    def read(self) -> dict[str, Any]:
        """Compile it, and read what came out."""
        reading = dataclasses.asdict(binaries.read(self.launch, self.family, code=self.code))
        del reading["around"]
        return json.loads(json.dumps(reading))


def wanted() -> Iterator[Wanted]:
    """Every launch that was asked for."""
    for family, of_family in ASKED.items():
        for name, asked in of_family.items():
            for config, launch in asked.launches(family):
                yield Wanted(family, name, config, launch, launch.kernel.__name__ in asked.code)


def record() -> None:
    """Compile all of it, and write the file."""
    readings: dict[str, Any] = {}
    for one in wanted():
        if one.key not in readings:
            readings[one.key] = one.read()
            print(one.family, one.config, one.launch.kernel.__name__, flush=True)
    lines = (f"{json.dumps(key)}: {json.dumps(reading)}" for key, reading in sorted(readings.items()))
    version, lines = json.dumps(triton.__version__), ",\n".join(lines)
    FILE.write_text(f'{{"triton": {version}, "readings": {{\n{lines}\n}}}}\n', encoding="utf-8")


def recorded() -> dict[str, Any]:
    """The file: readings by key, and the version of Triton."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def everything() -> dict[str, Any]:
    """What was asked for: from the file, or else compiled, and what had to be; keys that nobody asked for."""
    known, rows, compiled, asked = recorded()["readings"], [], [], set()
    for one in wanted():
        if one.key not in known:
            compiled.append(f"{one.launch.kernel.__name__} of {one.config} on {one.family}")
            known[one.key] = one.read()
        asked.add(one.key)
        rows.append({"family": one.family, "name": one.name, "config": one.config} | known[one.key])
    return {"rows": rows, "compiled": compiled, "not asked for": sorted(known.keys() - asked)}


def sample() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Some as they were recorded, and as they compile today."""
    known = recorded()["readings"]
    return [(known[one.key], one.read()) for one in [*wanted()][5::30] if one.key in known]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        record()
    else:
        print(json.dumps({"everything": everything, "sample": sample}[sys.argv[1]]()))
