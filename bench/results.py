"""Result files: JSON lines, first how, where and from which commit, then one figure each."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moebert_kernels.timing import Spread

from .ceilings import Ceiling

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """How a file's figures were taken.

    Attributes:
        op: the benchmark.
        device_type: "cpu" or "cuda".
        device: its name.
        started: UTC, ISO format.
        threads: torch's, on the CPU.
        cpus: the processors the threads were confined to, on the CPU; empty where that cannot be known.
        busy_cpus: processors that other work kept busy right before the start: it distorts the figures.
        settings: what was asked for.
        environment: of `moebert_kernels.environment`, commit and versions among it.
        ceilings: by dtype.
    """

    op: str
    device_type: str
    device: str
    threads: int
    cpus: tuple[int, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]
    ceilings: dict[str, Ceiling]
    busy_cpus: float | None = None
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


@dataclass(frozen=True)
class Row:
    """One figure, or why there is none.

    Attributes:
        case: the case's fields.
        entry: who computed it.
        work: what; see `registry.Entry`.
        pass_: of the operator's passes.
        launch: "eager" or "graph".
        cache: "warm" or "cold".
        dispatch: "apart" or "inside"; see `registry.Entry`.
        seconds: None where it did not run.
        did_not_run: the reason, or None.
        errors: rms error of each output against the float64 reference, relative.
        flops, bytes: the work of the case.
        floor_s: its roofline, by this run's ceilings.
        predicted_us: microseconds that `machine` expects of it, None where it knows nothing.
    """

    case: dict[str, Any]
    entry: str
    work: str
    pass_: str
    launch: str
    cache: str
    dispatch: str
    seconds: Spread | None = None
    did_not_run: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    floor_s: float = 0.0
    predicted_us: float | None = None


@dataclass(frozen=True)
class Results:
    """One file's content."""

    run: Run
    rows: tuple[Row, ...]


def subject(run: Run) -> str:
    """The benchmark, and its form if that is not the plain one: `ffn`, `ffn-norm`, `model`..."""
    norm = run.settings.get("request", {}).get("norm")
    return f"{run.op}-norm" if norm and run.op == "ffn" else run.op


def slug(run: Run) -> str:
    """Name of a run's files, such as `ffn-cpu` or `ffn-nvidia-h200`."""
    device = "cpu" if run.device_type == "cpu" else re.sub(r"[^a-z0-9]+", "-", run.device.lower()).strip("-")
    return f"{subject(run)}-{device}"


def write(folder: str | Path, run: Run, rows: Iterable[Row]) -> Path:
    """Write a file under its own name, each row the moment it arrives: whatever stops the run, it has them.

    A file of that name is kept beside it, with ".before" added, until this one is complete.
    """
    path = Path(folder) / f"{slug(run)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.with_name(f"{path.name}.before")
    if path.exists():
        os.replace(path, before)
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, **asdict(run)}) + "\n")
        file.flush()
        for row in rows:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
    before.unlink(missing_ok=True)
    return path


def read(path: str | Path) -> Results:
    """Read a file that `write` wrote, or as much as it had written when it was stopped.

    Raises:
        ValueError: it is empty or of another format.
    """
    text = Path(path).read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()  # a line without its end was cut off
    try:
        header = json.loads(lines[0]) if lines else {}
    except json.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not a result file of format {FORMAT}")
    header["ceilings"] = {dtype: Ceiling(**ceiling) for dtype, ceiling in header["ceilings"].items()}
    header["cpus"] = tuple(header["cpus"])
    return Results(Run(**header), tuple(_row(json.loads(line)) for line in lines[1:]))


def read_folder(folder: str | Path) -> Iterator[Results]:
    """Every result file of a folder, by name."""
    for path in sorted(Path(folder).glob("*.jsonl")):
        yield read(path)


def _row(values: dict[str, Any]) -> Row:
    seconds = values.pop("seconds")
    return Row(seconds=None if seconds is None else Spread(**seconds), **values)
