"""Texts without labels: what importance and fitted experts are taken from, whatever a teacher's head is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from moebert_kernels.compress.data.files import TABLE_SUFFIXES, check_file, read_table, read_text, split_lines
from moebert_kernels.compress.data.tasks.tables import CsvOptions, check_columns
from moebert_kernels.compress.data.tasks.task import EncodedRows, Kind, Outputs, Task, TaskData, to_rows
from moebert_kernels.errors import ArgumentError, SourceError, UserError, naming

KIND = "text"
TEXT_SUFFIXES = (".txt", *TABLE_SUFFIXES)


class Texts(Kind):
    """Rows for a model of any head; what they are to be scored by, nobody has said."""

    head = "(any)"
    auto_model = None

    def num_outputs(self, task: Task) -> int:
        """Unknown.

        Raises:
            UserError: always.
        """
        raise UserError(f"{task.name} has texts without labels, and labels are needed here: name a task")

    def encode(
        self, task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> EncodedRows:
        """Cut each text to `max_length`; of a pair the longer is cut first. Scoring raises a UserError."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return dict(
                tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
            )

        def score(outputs: Outputs) -> dict[str, float]:
            raise UserError(f"{task.name} has texts without labels, and cannot be scored by: name a task")

        return EncodedRows(to_rows(rows, encode), score)


def load_texts(data: str | Path, columns: CsvOptions | None = None) -> TaskData:
    """Load texts, or pairs of them; labels are not read.

    Args:
        data: a `.txt` file with a text per line, or a table, see `read_table`. Empty texts are left out.
        columns: of a table, the text's and a second text's, if there is one; where held-out texts are, or how
            many are drawn.

    Returns:
        Rows with "text" and perhaps "text_pair"; what is held out are the validation rows.

    Raises:
        UserError: a file or a column is missing, or there are fewer than two texts.
    """
    columns = columns or CsvOptions()
    path = Path(data)
    with naming("data"):
        rows = _read(path, columns)
    task = Task(path.stem, KIND, (), (), "")
    if columns.validation_file is not None:
        with naming("validation_file"):
            return TaskData(task, rows, _read(Path(columns.validation_file), columns))
    if not 0 < columns.validation_fraction < 1:
        raise ArgumentError(
            "validation_fraction", f"must be between 0 and 1, got {columns.validation_fraction}"
        )
    if len(rows) < 2:
        raise SourceError("data", UserError(f"{path} has one text, too few to hold any out"))
    count = min(max(round(len(rows) * columns.validation_fraction), 1), len(rows) - 1)
    out = np.sort(np.random.default_rng(columns.seed).permutation(len(rows))[:count])
    return TaskData(task, rows.select(np.setdiff1d(np.arange(len(rows)), out)), rows.select(out))


def has_no_labels(data: str | Path, columns: CsvOptions) -> bool:
    """Whether a file has texts, and labels alone are missing: it is a `.txt`, or a table without that column.

    Raises:
        UserError: the table cannot be read.
    """
    path = Path(data)
    if path.suffix.lower() == ".txt":
        return True
    with naming("data"):
        known = read_table(path).columns
    return columns.text in known and columns.label not in known


def _read(path: Path, columns: CsvOptions) -> Dataset:
    check_file(path, TEXT_SUFFIXES)
    if path.suffix.lower() == ".txt":
        found: dict[str, Sequence[str]] = {"text": split_lines(read_text(path))}
    else:
        table = read_table(path)
        check_columns(table, text=columns.text, text_pair=columns.text_pair)
        found = {"text": table.column(columns.text)}
        if columns.text_pair is not None:
            found["text_pair"] = table.column(columns.text_pair)
    kept = [row for row, text in enumerate(found["text"]) if text.strip()]
    if not kept:
        raise UserError(f"{path} has no text")
    return Dataset.from_dict({name: [texts[row] for row in kept] for name, texts in found.items()})
