"""What `machine` predicts beside what was measured and published, as tables; which tiles it would choose.

python -m bench machine [--card "NVIDIA H100"]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

from moebert_kernels.kernels.triton import configs, hopper

from . import results
from .cases import TIMED_TOKENS, FFNCase, expert_ids
from .machine import (
    BEGIN_S,
    CARDS,
    ELEMENT,
    GEMM_ROLES,
    Card,
    Prediction,
    Program,
    card_of,
    in_rounds,
    predict,
    predict_join,
    predict_pass,
)
from .machine_code import Tile, codes, tile_of
from .targets import target_of
from .traffic import Shape, Traffic, balanced

ROLES = (*GEMM_ROLES, "weight_grad")
FITTED_TOKENS = (64, 16384)  # of tiles.jsonl, which the model's constants were fitted to
PASSES = ("forward", "forward+backward")
_FITS = (log(1.1), log(1.2))
_KERNELS = {  # as the package names them
    "up": "gather",
    "up_training": "gather",
    "down": "scatter",
    "down_backward": "gather_backward",
    "up_backward": "scatter",
    "sum_tiles": "sum_tiles",
    "weight_grad": "weight_grad",
    "join": "join",
}


def config_of(T: int, E: int = 4) -> configs.Config:
    """What a Hopper card is given for so many slots of a 16-bit type."""
    fitting = (
        configs.TABLE.get(("sm_90", "half", size))
        for size, most in configs.SIZES.items()
        if most is None or most >= T / E
    )
    return next(config for config in fitting if config is not None)


def shape_of(case: FFNCase) -> Shape | None:
    """The shape of a case that the model knows the code of; None of another."""
    known = case.dtype != "float32" and case.activation == "gelu" and case.bias and case.K == 1
    if not known or case.gate or case.norm or case.D % 64 or case.F % 64:
        return None
    if case.routing == "balanced":
        return balanced(case.T, case.D, case.F, case.E)
    counts = expert_ids(case, seed=0).flatten().bincount(minlength=case.E)
    return Shape(case.D, case.F, tuple(counts.tolist()))


def of_kernels(
    case: FFNCase, device: str, ceiling: Any, pass_: str
) -> list[tuple[str, Prediction | None]] | None:
    """Every kernel of a pass by the package's name, in order; None where the model knows nothing.

    It knows nothing of warp-specialised kernels.

    Args:
        device: the card's name.
        ceiling: the run's, of the case's dtype.
        pass_: "forward" or "forward+backward".
    """
    card = card_of(device, ceiling.flops_per_s, ceiling.bytes_per_s)
    shape = shape_of(case)
    if card is None or shape is None or pass_ not in PASSES:
        return None
    config = config_of(shape.rows, case.E)
    found = predict_pass(config, shape, card, pass_ == PASSES[1])
    return [
        (f"{_KERNELS[name]}_pingpong", None)
        if name in config.specialised and hopper.takes(case.E, *shape.sizes(name))
        else (_KERNELS[name], prediction)
        for name, prediction in found.items()
    ]


def pass_us(case: FFNCase, device: str, ceiling: Any, pass_: str) -> float | None:
    """Microseconds of a whole pass in a CUDA graph on cold caches."""
    found = of_kernels(case, device, ceiling, pass_)
    known = [p for _, p in found or () if p is not None]
    return round(sum(p.seconds for p in known) * 1e6, 2) if found and len(known) == len(found) else None


# Figures that others published or that were measured of others, none of which the model was fitted to.


@dataclass(frozen=True)
class Known:
    """A rate of a dense 16-bit GEMM.

    Attributes:
        what, source: of the figure.
        tflops: the figure, from and to.
        size: M, N, K.
        card: it was measured on.
        library: loads come from warps of their own and a tile's start hides behind the one before, as in
            cuBLAS and CUTLASS; else as Triton compiles our kernels.
        why: it is not explained, if it is not.
    """

    what: str
    source: str
    tflops: tuple[float, float]
    size: tuple[int, int, int]
    card: Card
    library: bool
    why: str = ""


_GLUON, _TILEOPS = "Triton's Gluon tutorial 07", "TileOPs pull request 1567"
KNOWN = (
    Known(
        "Triton, a program a tile",
        _GLUON,
        (492, 492),
        (8192, 8192, 512),
        CARDS[1],
        False,
        "its epilogue goes out by TMA and is not our `scatter`'s; at this depth it is a third of the time",
    ),
    Known("Triton, a program a tile", _GLUON, (554, 554), (8192, 8192, 1024), CARDS[1], False),
    Known("Triton, a program a tile", _GLUON, (654, 654), (8192, 8192, 16384), CARDS[1], False),
    Known("cuBLAS", _GLUON, (588, 588), (8192, 8192, 512), CARDS[1], True),
    Known("cuBLAS", _GLUON, (588, 588), (8192, 8192, 1024), CARDS[1], True),
    Known("DeepGEMM, grouped", _TILEOPS, (657, 670), (16384, 6144, 4096), CARDS[0], True),
    Known(
        "torch, grouped",
        _TILEOPS,
        (597, 624),
        (16384, 6144, 4096),
        CARDS[0],
        True,
        "a CUTLASS tile and schedule that were not published",
    ),
    Known("Triton with TMA, grouped", _TILEOPS, (564, 628), (16384, 6144, 4096), CARDS[0], False),
    Known(
        "Triton with pointers, grouped",
        _TILEOPS,
        (469, 490),
        (16384, 6144, 4096),
        CARDS[0],
        False,
        "its tile is not known, and addresses made in the loop are counted for our kernels alone",
    ),
)
_LIBRARY_TILE = Tile(128, 256, 64, 8, 4, 4)


def dense_gemm(M: int, N: int, K: int, card: Card, library: bool) -> float:
    """Seconds of a dense GEMM with tiles of 128 x 256, the code that of `scatter` with them."""
    tile, code = _LIBRARY_TILE, codes()["down", _LIBRARY_TILE]
    programs = -(-M // tile.m) * -(-N // tile.n)
    program = Program(tile, code, -(-K // tile.k), 0, 0, tile.m * tile.n * ELEMENT)
    floor = 2.0 * M * N * K / card.flops_per_s
    if not library:
        return max(in_rounds(program, programs, code.programs, Traffic(0, 0, 0), card).seconds, floor)
    phases, _ = replace(program, waits=0.0).phases(1, card)
    each = -(-programs // card.multiprocessors)
    return max(BEGIN_S + phases["start"] + each * (phases["loop"] + phases["epilogue"]), floor)


def dense_ffn(T: int, D: int, width: int, card: Card) -> float:
    """Seconds of a dense network's forward pass by a library: two GEMMs with bias, GELU by itself."""
    gelu = BEGIN_S + 2 * T * width * ELEMENT / card.bytes_per_s
    return dense_gemm(T, width, D, card, True) + gelu + dense_gemm(T, D, width, card, True)


# Tables in markdown.


def _table(head: str, lines: Iterable[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|" + "---|" * columns, *lines])


def _us(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:.1f}"


def _ratio(predicted: float, measured: float | None) -> str:
    return "–" if measured is None else f"{predicted / measured:.2f}"


def _measured(path: Path, **wanted: str) -> dict[tuple[int, str], float]:
    """Medians by T and entry of a result file's balanced rows."""
    if not path.is_file():
        return {}
    rows = results.read(path).rows
    chosen = (row for row in rows if all(getattr(row, name) == value for name, value in wanted.items()))
    return {(row.case["T"], row.entry): row.seconds.median for row in chosen if row.seconds}


def passes_table(folder: Path) -> str:
    """Whole passes: predicted for each card, measured on an H200, and the aim."""
    from .ffn import OURS

    h200, h100 = CARDS
    lines = []
    for pass_ in PASSES:
        measured = _measured(folder / "h200" / "ffn-plain.jsonl", pass_=pass_, cache="cold", launch="graph")
        for T in TIMED_TOKENS:
            on = [
                sum(
                    p.seconds
                    for p in predict_pass(config_of(T), balanced(T), card, pass_ == PASSES[1]).values()
                )
                for card in (h200, h100)
            ]
            target, got = target_of(T, pass_), measured.get((T, OURS))
            aim = "–" if target is None or target.aim_us is None else f"{target.aim_us:g}"
            lines.append(
                f"| {pass_} | {T} | {aim} | {_us(on[0])} | {_us(got)} | {_ratio(on[0], got)} | {_us(on[1])} |"
            )
    return _table(
        "| µs | T | aim | H200: predicted | measured | predicted / measured | H100: predicted |", lines
    )


def _plain_name(entry: str) -> list[str]:
    """Place and kernel of an entry of `kernel_times`."""
    return [part.removesuffix("_stream") for part in entry.split()[:2]]


def kernels_table(folder: Path) -> str:
    """Every kernel of a training step on an H200, phase by phase, and what binds it."""
    measured = _measured(folder / "h200" / "kernels.jsonl", cache="cold")
    card, lines = CARDS[0], []
    for T in TIMED_TOKENS:
        found = predict_pass(config_of(T), balanced(T), card, True)
        for place, (name, p) in enumerate(found.items()):
            entry = [f"{place + 1}", _KERNELS[name]]
            # Of a streamed weight gradient the entry says so; that of a warp-specialised kernel is another.
            got = next((s for (t, e), s in measured.items() if t == T and _plain_name(e) == entry), None)
            phases = " | ".join(_us(p.phases.get(phase)) for phase in ("launch", "start", "loop", "epilogue"))
            traffic = f"{p.traffic.l2 / 1e6:.0f} | {(p.traffic.read + p.traffic.written) / 1e6:.0f}"
            times = f"{_us(p.seconds)} | {_us(got)} | {_ratio(p.seconds, got)}"
            rest = f"{p.waves:.2f} | {phases} | {traffic} | {_us(p.phases['DRAM'])} | {p.binds}"
            lines.append(f"| {T} | {entry[1]} | {times} | {rest} |")
    return _table(
        "| T | kernel | predicted, µs | measured | ratio | waves | launch | start | loop | epilogue | L2, MB "
        "| DRAM, MB | DRAM, µs | the loop is bound by |",
        lines,
    )


def recorded_tiles(folder: Path) -> Iterator[tuple[int, str, Tile, float]]:
    """T, role, tile and seconds of tiles.jsonl, but for loads by pointers in the place of TMA, and for
    warp-specialised kernels: the model knows neither."""
    path = folder / "h200" / "tiles.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        if "seconds" in row and row["tma"] and not row.get("specialised"):
            yield row["T"], row["role"], Tile(**row["tile"], stream_k=row["stream_k"]), row["seconds"]


def seconds_of(role: str, tile: Tile, shape: Shape, card: Card, simulated: bool = True) -> float:
    """A GEMM with what belongs to it: the weight gradients with what joins their pieces."""
    joined = predict_join(tile, shape, card).seconds if tile.stream_k else 0.0
    return predict(role, tile, shape, card, simulated=simulated).seconds + joined


def errors(folder: Path) -> dict[tuple[int, str], list[float]]:
    """log(predicted / measured) of all recorded tiles by T and "GEMMs" or "weight gradients"."""
    found: dict[tuple[int, str], list[float]] = {}
    for T, role, tile, seconds in recorded_tiles(folder):
        kind = "weight gradients" if role == "weight_grad" else "GEMMs"
        predicted = seconds_of(role, tile, balanced(T), CARDS[0], simulated=False)
        found.setdefault((T, kind), []).append(log(predicted / seconds))
    return found


def tiles_table(folder: Path) -> str:
    """How far the model is from all the tiles that were measured."""
    lines = []
    for (T, kind), off in sorted(errors(folder).items(), key=lambda one: (one[0][1], one[0][0])):
        rms, worst = sqrt(sum(e * e for e in off) / len(off)), exp(max(abs(e) for e in off)) - 1
        within = " | ".join(f"{sum(abs(e) <= limit for e in off) / len(off):.0%}" for limit in _FITS)
        used = "yes" if T in FITTED_TOKENS else "no"
        lines.append(f"| {kind} | {T} | {len(off)} | {used} | {exp(rms) - 1:.0%} | {within} | {worst:.0%} |")
    return _table(
        "| | T | measured | constants fitted to them | off by, rms | within 10 % | within 20 % | worst |",
        lines,
    )


def known_table(folder: Path) -> str:
    """What others reach: the model, and where it is more than a fifth off, why."""
    lines = []
    for known in KNOWN:
        M, N, K = known.size
        tflops = 2e-12 * M * N * K / dense_gemm(M, N, K, known.card, known.library)
        low, high = known.tflops
        ratio = tflops / min(max(tflops, low), high)
        said = known.why if abs(log(ratio)) > _FITS[1] else "within 20 %"
        figure = f"{low:g}" if low == high else f"{low:g}–{high:g}"
        what = f"{known.what} | {M} x {N} x {K}, {known.card.name}"
        lines.append(f"| {what} | {figure} TFLOP/s | {tflops:.0f} | {ratio:.2f} | {said} | {known.source} |")
    for name, factor in (("bound: one expert", 1), ("dense FFN replaced", 4)):
        measured = _measured(
            folder / "h200" / "ffn-plain.jsonl", pass_="forward", cache="cold", launch="graph"
        )
        for T in TIMED_TOKENS:
            if (got := measured.get((T, name))) is None:
                continue
            predicted = dense_ffn(T, 768, factor * 768, CARDS[0])
            off = abs(log(predicted / got)) > _FITS[1]
            why = "cuBLAS takes smaller tiles, which fill the card" if T < 16384 else "not explained"
            lines.append(
                f"| {name}, PyTorch | T = {T}, {CARDS[0].name} | {_us(got)} µs | {_us(predicted)} "
                f"| {predicted / got:.2f} | {why if off else 'within 20 %'} | h200/ffn-plain.jsonl |"
            )
    return _table("| | what | figure | predicted | ratio | | source |", lines)


def ranked(role: str, shape: Shape, card: Card) -> list[tuple[float, Tile]]:
    """All tiles whose code is known, the fastest first; of the first few, with their traffic."""
    tiles = [tile for of, tile in codes() if of == role]
    rough = sorted(tiles, key=lambda tile: seconds_of(role, tile, shape, card, simulated=False))[:2]
    return sorted(((seconds_of(role, tile, shape, card), tile) for tile in rough), key=lambda one: one[0])


def choices_table(folder: Path, card: Card = CARDS[0], least: float = 1.02) -> str:
    """What is committed beside the model's best and the best measured, where they differ by so much."""
    measured: dict[tuple[int, str], dict[Tile, float]] = {}
    for T, role, tile, seconds in recorded_tiles(folder):
        measured.setdefault((T, role), {})[tile] = seconds
    lines = []
    for T in TIMED_TOKENS:
        for role in ROLES:
            ours = committed(role, T)
            predicted = seconds_of(role, ours, balanced(T), card)
            (best, tile), *_ = ranked(role, balanced(T), card)
            best, tile = (predicted, ours) if predicted <= best else (best, tile)
            if predicted < least * best:
                continue
            times = measured.get((T, role), {})
            fastest = min(times, key=lambda one: times[one]) if times else None
            told = (
                "– | –" if fastest is None else f"{_us(times.get(ours))} | {fastest}: {_us(times[fastest])}"
            )
            lines.append(
                f"| {T} | {role} | {ours} | {_us(predicted)} | {tile}: {_us(best)} | {predicted / best:.2f} "
                f"| {told} |"
            )
    return _table(
        f"| T | GEMM | committed | predicted, µs | {card.name}: best predicted | committed / best "
        "| committed, measured | fastest measured |",
        lines,
    )


def committed(role: str, T: int) -> Tile:
    """The tile in the table of configs."""
    config = config_of(T)
    if role == "weight_grad":
        return tile_of(config.weight_grad, config.stream_k)
    return tile_of(getattr(config, role.removesuffix("_training")))


TABLES = {
    "passes": passes_table,
    "kernels": kernels_table,
    "tiles": tiles_table,
    "known": known_table,
    "choices": choices_table,
}


def block(name: str, folder: str | Path) -> str:
    """A table of the README by its name.

    Raises:
        ValueError: there is no such table.
    """
    if name not in TABLES:
        raise ValueError(f"there is no table machine-{name}; there are {', '.join(TABLES)}")
    return TABLES[name](Path(folder))


def show(folder: Path, card: Card) -> None:
    """Print all of them."""
    for name, table in TABLES.items():
        drawn = choices_table(folder, card, 0.0) if name == "choices" else table(folder)
        print(f"{name}\n\n{drawn}\n", flush=True)
