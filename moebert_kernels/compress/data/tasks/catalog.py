"""Every task by its name, from wherever its rows are."""

from __future__ import annotations

import warnings
from pathlib import Path

from moebert_kernels.compress.data.tasks.conll import load_conll
from moebert_kernels.compress.data.tasks.glue import GLUE_NAMES, load_glue
from moebert_kernels.compress.data.tasks.hub import HubName
from moebert_kernels.compress.data.tasks.squad import SQUAD_NAMES, load_squad
from moebert_kernels.compress.data.tasks.tables import CsvOptions, load_table
from moebert_kernels.compress.data.tasks.task import AnswerOptions, TaskData
from moebert_kernels.errors import UserError, naming


def task_names() -> tuple[str, ...]:
    """Return the names that `load_task` knows."""
    return (*GLUE_NAMES, *SQUAD_NAMES, "conll", "csv")


def load_task(
    name: str, data: str | Path, *, csv: CsvOptions | None = None, answers: AnswerOptions | None = None
) -> TaskData:
    """Load a task's training and validation rows.

    Args:
        name: one of `task_names`: those of GLUE, "squad", "squad_v2", "conll" for tagged words, or "csv" for
            one's own table.
        data: where the rows are. A path: the folder of the original files, or the table; see `load_glue`,
            `load_squad`, `load_conll` and `load_table`. Or "hub" for the data set that the Hugging Face hub
            has of the task, "hub:NAME" or "hub:NAME:CONFIG" for another in the same form; a folder of such a
            name is "./hub".
        csv: the table's columns and its validation rows; only for "csv".
        answers: how answers are found; only for "squad" and "squad_v2".

    Returns:
        The rows. What is odd about them is warned of, and kept with them.

    Raises:
        UserError: an unknown name, data that is missing or of another form (the place is named), no rows.
    """
    if name not in task_names():
        raise UserError(f"task {name!r} is unknown; there are {', '.join(task_names())}")
    if csv is not None and name != "csv":
        raise UserError(f"column and validation options belong to task csv, not to {name}")
    if answers is not None and name not in SQUAD_NAMES:
        raise UserError(f"options for finding answers belong to {' and '.join(SQUAD_NAMES)}, not to {name}")
    with naming("data"):
        found = _load(name, HubName.parse(data) or Path(data), csv, answers)
    for oddity in found.oddities:
        warnings.warn(oddity, stacklevel=2)
    return found


def _load(
    name: str, source: HubName | Path, csv: CsvOptions | None, answers: AnswerOptions | None
) -> TaskData:
    if name == "csv":
        return load_table(source, csv or CsvOptions())
    if name == "conll":
        return load_conll(source)
    if name in SQUAD_NAMES:
        return load_squad(name, source, answers or AnswerOptions())
    return load_glue(name, source)
