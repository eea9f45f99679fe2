"""Tasks made of one's own table: a text or two per row, and a label."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from moebert_kernels.compress.data.files import Table, read_table
from moebert_kernels.compress.data.tasks.hub import HubName, as_table
from moebert_kernels.compress.data.tasks.task import Task, TaskData
from moebert_kernels.errors import ArgumentError, ColumnsError, UserError, naming

_FEW_ROWS = 8  # too few to tell classes from labels that are all different
_KINDS = ("classification", "multi_label_classification", "regression")
_SEPARATORS = "|;,"  # of the labels of a row: the first of these that a column has


@dataclass(frozen=True)
class CsvOptions:
    """How to read one's own table (task "csv").

    Attributes:
        text: column of the text.
        text_pair: column of a second text, or None.
        label: column of the label.
        validation_file: a second table with the same columns, or None to hold out part of the first.
        validation_fraction: the part to hold out, drawn at random, each label in its due share.
        kind: "classification", "multi_label_classification" or "regression"; None to infer it: of several
            labels if they are lists, regression if all are numbers and not all of them whole.
        seed: of the draw.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    validation_file: Path | None = None
    validation_fraction: float = 0.1
    kind: str | None = None
    seed: int = 0


def load_table(data: HubName | Path, options: CsvOptions) -> TaskData:
    """Load one's own table.

    Args:
        data: a `.csv`, `.tsv` or `.jsonl` file, see `read_table`; or a data set of the hub with a split
            "train" and, unless part of it is to be held out, "validation".
        options: columns, and rows to validate on.

    Spaces around a label do not count, and numbers that are equal, 1 and 1.0, are one class.

    Returns:
        The rows; the task bears the name of the file or data set. Texts that are empty are kept, and told of
        as an oddity.

    Raises:
        UserError: options, file and columns do not fit each other, a row does not fit (its place is named),
            or no row of some label is left to train on.
    """
    if options.kind not in (None, *_KINDS):
        raise ArgumentError("kind", f"is {options.kind!r}, expected one of {', '.join(_KINDS)}")
    if options.validation_file is None and not 0 < options.validation_fraction < 1:
        raise ArgumentError(
            "validation_fraction", f"must be between 0 and 1, got {options.validation_fraction}"
        )
    if options.seed < 0:
        raise ArgumentError("split_seed", f"must not be negative, got {options.seed}")
    table, second = _read(data, options)
    columns = {"text": options.text, "text_pair": options.text_pair, "label": options.label}
    check_columns(table, **columns)
    kind = options.kind or _infer_kind(table, options.label)
    name = data.stem if isinstance(data, Path) else str(data)
    label_ids = None
    if kind == "regression":
        task = Task(name, kind, (), ("pearson", "spearman"), "pearson")
    elif kind == "multi_label_classification":
        label_names = _names_of({label for labels in _label_sets(table, options.label) for label in labels})
        if not label_names:
            raise UserError(
                f"{table.source} has no label in column {options.label!r}: it is empty in every row"
            )
        task = Task(name, kind, label_names, ("micro_f1", "macro_f1", "accuracy"), "micro_f1")
        label_ids = {label: i for i, label in enumerate(label_names)}
    else:
        label_names = _sorted_labels(table, options.label)
        if options.kind is None and 2 * len(label_names) > len(table.rows) > _FEW_ROWS:
            raise UserError(
                f"{table.source} has {len(label_names)} different labels in {len(table.rows)} rows of column "
                f"{options.label!r}: too many to be classes; name another label column, or say which kind of "
                "label this is (--kind)"
            )
        task = Task(name, kind, label_names, ("accuracy", "macro_f1"), "accuracy")
        label_ids = {label: i for i, label in enumerate(label_names)}

    oddities: list[str] = []

    def load(table: Table) -> Dataset:
        rows = labelled_rows(
            table,
            options.text,
            options.text_pair,
            options.label,
            label_ids,
            several=kind == "multi_label_classification",
        )
        oddities.extend(_empty_texts(table, options.text))
        return rows

    rows = load(table)
    if second is not None:
        with naming("data" if options.validation_file is None else "validation_file"):
            check_columns(second, **columns)
            data_of_task = TaskData(task, rows, load(second))
    else:
        if len(rows) < 2:
            raise UserError(f"{table.source} has one row, too few to hold any out for validation")
        held_out = min(max(round(len(rows) * options.validation_fraction), 1), len(rows) - 1)
        # Of several labels, the first that a row has.
        labels = [
            (label[0] if label else -1) if isinstance(label, list) else label for label in rows["label"]
        ]
        out = _spread_over_labels(labels, held_out, options.seed)
        kept = np.setdiff1d(np.arange(len(rows)), out)
        data_of_task = TaskData(task, rows.select(kept), rows.select(out))
    _check_rows_of_labels(data_of_task, table.source)
    return replace(data_of_task, oddities=tuple(oddities))


def check_columns(table: Table, **names: str | None) -> None:
    """Raise an error that tells of all columns that are missing; `names` are by fields of `CsvOptions`."""
    given = {field: name for field, name in names.items() if name is not None}
    missing = {field: name for field, name in given.items() if name not in table.columns}
    if missing:
        raise ColumnsError(table.source, missing, table.columns)


def _empty_texts(table: Table, column: str) -> list[str]:
    """What is to be said of them, if there are any."""
    empty = [row for row, text in enumerate(table.column(column)) if not text.strip()]
    if len(empty) == len(table.rows):
        raise UserError(f"{table.source} has no text in column {column!r}: it is empty in every row")
    if not empty:
        return []
    others = f", and in {len(empty) - 1} more rows" if len(empty) > 1 else ""
    return [f"{table.place(empty[0])}: the text in column {column!r} is empty{others}; such rows are kept."]


def _check_rows_of_labels(data: TaskData, source: str) -> None:
    labels = data.task.label_names
    several = data.task.kind == "multi_label_classification"
    there = set(chain.from_iterable(data.train["label"]) if several else data.train["label"])
    missing = sorted(set(range(len(labels))) - there)
    if missing:
        raise UserError(
            f"{source} has too few rows: of the {len(data.train)} to train on, none has the label "
            f"{labels[missing[0]]!r}; add rows of that label, or take it out"
        )


def _spread_over_labels(labels: Sequence[float], count: int, seed: int) -> np.ndarray:
    """Draw `count` rows at random that have each label, or range of labels, in its due share."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(np.asarray(labels)[order], kind="stable")]
    return np.sort(order[((np.arange(count) + 0.5) * len(labels) / count).astype(int)])


def labelled_rows(
    table: Table,
    text: str,
    text_pair: str | None,
    label: str,
    label_ids: dict[str, int] | None,
    *,
    several: bool = False,
) -> Dataset:
    """Make the rows of a classification or regression task.

    Args:
        table: the fields.
        text: column of the text.
        text_pair: column of the second text, or None.
        label: column of the label.
        label_ids: the classes' ids by what is written in the table; None if labels are numbers.
        several: whether a row has any number of labels: a list, or in one text with "|", ";" or "," between.

    Returns:
        "text", "text_pair" if there are pairs, and "label".

    Raises:
        UserError: a column is missing, or a label is not a class or number; its place is named.
    """
    columns: dict[str, Sequence[Any]] = {"text": table.column(text)}
    if text_pair is not None:
        columns["text_pair"] = table.column(text_pair)
    if label_ids is None:
        columns["label"] = _numbers(table, label)
    elif several:
        columns["label"] = [
            sorted({_class_id(name, label_ids, table.place(row)) for name in names})
            for row, names in enumerate(_label_sets(table, label))
        ]
    else:
        columns["label"] = _class_ids(table, label, label_ids)
    return Dataset.from_dict(dict(columns))


def _read(data: HubName | Path, options: CsvOptions) -> tuple[Table, Table | None]:
    second = None
    if options.validation_file is not None:
        with naming("validation_file"):
            second = read_table(Path(options.validation_file))
    if isinstance(data, Path):
        if data.is_dir():
            raise UserError(f"{data} is a folder; task csv needs a .csv, .tsv or .jsonl file")
        return read_table(data), second
    if data.name is None:
        raise UserError("task csv has no data set of its own on the hub; give its name: hub:NAME")
    found = data.load("train")
    if second is None and "validation" in found:
        second = as_table(found["validation"], f"{data} (validation)")
    return as_table(found["train"], f"{data} (train)"), second


def _label_sets(table: Table, column: str) -> list[list[str]]:
    """The labels of every row, without spaces around them; none where the field is empty."""
    fields = table.fields(column)
    texts = [field for field in fields if isinstance(field, str)]
    separator = next((sign for sign in _SEPARATORS if any(sign in text for text in texts)), None)
    parts = (field if isinstance(field, list) else field.split(separator) for field in fields)
    return [[label.strip() for label in labels if label.strip()] for labels in parts]


def _infer_kind(table: Table, column: str) -> str:
    if any(isinstance(field, list) for field in table.fields(column)):
        return "multi_label_classification"
    labels = table.column(column)
    numbers = [_parse_number(label) for label in labels]
    known = [number for number in numbers if number is not None]
    if all(number.is_integer() for number in known):
        return "classification"
    if len(known) == len(numbers):
        return "regression"
    if 2 * len(known) > len(numbers):
        row = numbers.index(None)
        raise UserError(
            f"{table.place(row)}: label {labels[row]!r} in column {column!r} is not a number, though most "
            "are; mend it, or give --kind classification if they are names"
        )
    return "classification"


def _sorted_labels(table: Table, column: str) -> tuple[str, ...]:
    labels = [label.strip() for label in table.column(column)]
    if "" in labels:
        raise UserError(f"{table.place(labels.index(''))}: the label in column {column!r} is empty")
    names = _names_of(labels)
    if len(names) < 2:
        raise UserError(f"{table.source} has one label in column {column!r}, {names[0]!r}; two are needed")
    return names


def _names_of(labels: Collection[str]) -> tuple[str, ...]:
    """The classes in order. Numbers that are equal are one class, called as its shortest spelling."""
    numbers = {label: _parse_number(label) for label in labels}
    if None in numbers.values():
        return tuple(sorted(numbers))
    by_number: dict[float | None, str] = {}
    for label in sorted(numbers, key=lambda label: (len(label), label)):
        by_number.setdefault(numbers[label], label)
    return tuple(sorted(by_number.values(), key=float))


def _class_ids(table: Table, column: str, label_ids: dict[str, int]) -> list[int]:
    return [_class_id(label, label_ids, table.place(row)) for row, label in enumerate(table.column(column))]


def _class_id(label: str, label_ids: dict[str, int], place: str) -> int:
    found = label_ids.get(label.strip())
    if found is None and (number := _parse_number(label)) is not None:
        found = next((i for name, i in label_ids.items() if _parse_number(name) == number), None)
    if not label.strip():
        raise UserError(f"{place}: the label is empty")
    if found is None:
        known = list(label_ids)
        listed = ", ".join(map(repr, known[:10])) + (", ..." if len(known) > 10 else "")
        raise UserError(f"{place}: label {label!r} is unknown, expected one of {listed}")
    return found


def _numbers(table: Table, column: str) -> list[float]:
    numbers = []
    for row, label in enumerate(table.column(column)):
        number = _parse_number(label)
        if number is None:
            raise UserError(f"{table.place(row)}: label {label!r} in column {column!r} is not a number")
        numbers.append(number)
    return numbers


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
