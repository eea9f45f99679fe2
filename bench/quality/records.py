"""Records of finished runs: a file of json lines for each study, and beside it what was said of every row."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moebert_kernels.compress.storage.artifacts import replace_whole

from .contenders import CONTENDERS
from .study import TASKS

Record = dict[str, Any]
Rows = Mapping[str, np.ndarray]
"""By name: "TASK/labels" and "TASK/teacher" [N], and of each run `row_name`'s."""

_DTYPES = {"predictions": np.float16, "divergence": np.float16}  # classes are whole numbers below 2,048


def collect(folders: Iterable[Path], to: Path) -> dict[Path, int]:
    """Write the records of finished runs as json lines, a file `<study>.jsonl` for each study.

    What models say of every row once they are fitted, and distilled, goes to `<study>.rows.npz`, compactly.

    Returns:
        The files, and how many records each has.
    """
    studies: dict[str, list[Record]] = defaultdict(list)
    rows: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for folder in folders:
        for path in sorted((folder / "records").glob("*/*/*.json")):
            stage = json.loads(path.read_text(encoding="utf-8"))
            if not stage["done"]:
                continue
            record = stage["result"]
            of_states = record.pop("rows")
            studies[record["study"]].append(record)
            mine = rows[record["study"]]
            task = record["task"]
            of_task = json.loads((folder / "rows" / f"{task}.json").read_text(encoding="utf-8"))["result"]
            for name, values in of_task.items():
                mine[f"{task}/{name}"] = np.array(values, np.float16)
            for state in list(of_states)[1:][-2:] or of_states:
                for name, dtype in _DTYPES.items():
                    mine[row_name(record, state, name)] = np.array(of_states[state][name], dtype)
    files = {}
    for study, records in studies.items():
        records.sort(key=lambda record: (*place(record), record["seed"]))
        file = to / f"{study}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with replace_whole(_rows_file(file)) as fresh, fresh.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **rows[study])
        with replace_whole(file) as fresh:
            fresh.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        files[file] = len(records)
    return files


def read(file: Path) -> list[Record]:
    """Read a file that `collect` wrote; older ones, of students that were cut and distilled, too."""
    return [_as_today(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def read_rows(file: Path) -> Rows | None:
    """What models said of every row, if that was kept beside a file of records."""
    path = _rows_file(file)
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as kept:
        return dict(kept)


def row_name(record: Record, state: str, what: str) -> str:
    """Where a run's "predictions" or "divergence" after a step are kept, [N]."""
    return f"{record['task']}/{record['contender']}/{record['seed']}/{state}/{what}"


def place(record: Record) -> tuple[int, int]:
    """Where a record belongs among others: tasks and contenders in their order."""
    return list(TASKS).index(record["task"]), list(CONTENDERS).index(record["contender"])


def tasks_of(records: Sequence[Record]) -> list[str]:
    """In their order."""
    return sorted({record["task"] for record in records}, key=list(TASKS).index)


def contenders_of(records: Sequence[Record]) -> list[str]:
    """In their order."""
    return sorted({record["contender"] for record in records}, key=list(CONTENDERS).index)


def select(records: Iterable[Record], task: str, contender: str) -> list[Record]:
    """The runs of a contender on a task."""
    return [r for r in records if (r["task"], r["contender"]) == (task, contender)]


def quality(record: Record, state: str | None = None) -> float:
    """The task's main metric, times 100, after a step; None for the student that is kept."""
    return 100 * record["states"][state or record["kept"]][record["metric"]]


def _rows_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}.rows.npz")


def _as_today(record: Record) -> Record:
    if "states" in record:
        return record
    budget = record.pop("budget")
    return record | {
        "states": {"cut": record.pop("before"), "distilled": record.pop("after")},
        "kept": "distilled",
        "training": {"rows": record.pop("train_rows")},
        "budget": {"cost": 4, "fit_rows": None, "training": budget},
    }
