"""Tasks: labelled text with official metrics, from the GLUE files or from one's own table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy import stats
from sklearn import metrics
from transformers import EvalPrediction, PretrainedConfig, PreTrainedTokenizerBase

from moebert_kernels.compress.files import Table, read_table
from moebert_kernels.errors import ArgumentError, UserError

KINDS = ("classification", "regression")


@dataclass(frozen=True)
class Task:
    """What is predicted, and how it is scored.

    Attributes:
        name: as in `task_names`.
        kind: "classification" or "regression".
        label_names: the classes in the order of their ids; empty for regression.
        metric_names: the official metrics, keys of what `compute_metrics` returns.
        main_metric: the one of them to compare models by; larger is better.
    """

    name: str
    kind: str
    label_names: tuple[str, ...]
    metric_names: tuple[str, ...]
    main_metric: str


@dataclass(frozen=True)
class TaskData:
    """A task and its rows.

    `train` and `validation` have the columns "text", "text_pair" for tasks on pairs, and "label" (class id or
    number); after `tokenize` the tokenizer's columns and "labels".
    """

    task: Task
    train: Dataset
    validation: Dataset


@dataclass(frozen=True)
class CsvOptions:
    """How to read one's own table (task "csv").

    Attributes:
        text: column of the text.
        text_pair: column of a second text, or None.
        label: column of the label.
        validation_file: a second table with the same columns, or None to hold out part of the first.
        validation_fraction: the part to hold out, drawn at random.
        kind: "classification" or "regression"; None to infer it: regression if all labels are numbers and
            not all of them whole.
        seed: of the draw.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    validation_file: Path | None = None
    validation_fraction: float = 0.1
    kind: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class _GlueTask:
    task: Task
    folder: str
    text: str
    text_pair: str | None
    label: str
    columns: tuple[str, ...] | None = None


_GLUE = {
    "sst2": _GlueTask(
        Task("sst2", "classification", ("negative", "positive"), ("accuracy",), "accuracy"),
        "SST-2",
        text="sentence",
        text_pair=None,
        label="label",
    ),
    "cola": _GlueTask(
        Task("cola", "classification", ("unacceptable", "acceptable"), ("matthews",), "matthews"),
        "CoLA",
        text="sentence",
        text_pair=None,
        label="label",
        columns=("source", "label", "mark", "sentence"),  # the files have no header
    ),
    "mrpc": _GlueTask(
        Task("mrpc", "classification", ("not_equivalent", "equivalent"), ("accuracy", "f1"), "f1"),
        "MRPC",
        text="#1 String",
        text_pair="#2 String",
        label="Quality",
    ),
    "stsb": _GlueTask(
        Task("stsb", "regression", (), ("pearson", "spearman"), "pearson"),
        "STS-B",
        text="sentence1",
        text_pair="sentence2",
        label="score",
    ),
}


def task_names() -> tuple[str, ...]:
    """Return the names that `load_task` knows."""
    return (*_GLUE, "csv")


def load_task(name: str, data: str | Path, *, csv: CsvOptions | None = None) -> TaskData:
    """Load a task's training and validation rows.

    Args:
        name: "sst2", "cola", "mrpc", "stsb" or "csv".
        data: for GLUE tasks the folder of the original `train.tsv` and `dev.tsv`; for "csv" the table, a
            `.csv` or `.tsv` file with a header line (see `read_table`).
        csv: the table's columns and its validation rows; only for "csv".

    Raises:
        UserError: an unknown name, a missing folder, file or column, a row that does not fit (named by file
            and line), an unknown label, no rows.
    """
    if name not in task_names():
        raise UserError(f"task {name!r} is unknown; there are {', '.join(task_names())}")
    if name == "csv":
        return _load_csv(Path(data), csv or CsvOptions())
    if csv is not None:
        raise UserError(f"column and validation options belong to task csv, not to {name}")
    return _load_glue(_GLUE[name], Path(data))


def _load_glue(spec: _GlueTask, folder: Path) -> TaskData:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; task {spec.task.name} needs one with train.tsv and dev.tsv"
        )
    if not (folder / "train.tsv").exists() and (folder / spec.folder / "train.tsv").exists():
        raise UserError(f"{folder} holds no train.tsv; {folder / spec.folder} does: give that folder")
    label_ids = {str(i): i for i in range(len(spec.task.label_names))}  # the files write ids, not names
    splits = []
    labels: Sequence[float]
    for file in ("train.tsv", "dev.tsv"):
        table = read_table(folder / file, spec.columns)
        labels = _numbers(table, spec.label) if not label_ids else _class_ids(table, spec.label, label_ids)
        splits.append(_dataset(table, spec.text, spec.text_pair, labels))
    return TaskData(spec.task, *splits)


def _load_csv(path: Path, options: CsvOptions) -> TaskData:
    if options.kind not in (None, *KINDS):
        raise UserError(f"kind is {options.kind!r}, expected {' or '.join(KINDS)}")
    if options.validation_file is None and not 0 < options.validation_fraction < 1:
        raise UserError(f"the validation fraction is {options.validation_fraction}, expected between 0 and 1")
    if path.is_dir():
        raise UserError(f"{path} is a folder; task csv needs a .csv or .tsv file")
    table = read_table(path)
    kind = options.kind or _infer_kind(table.column(options.label))
    if kind == "regression":
        task = Task("csv", kind, (), ("pearson", "spearman"), "pearson")
    else:
        label_names = _sorted_labels(table, options.label)
        task = Task("csv", kind, label_names, ("accuracy", "macro_f1"), "accuracy")

    def load(table: Table) -> Dataset:
        labels: Sequence[float]
        if kind == "regression":
            labels = _numbers(table, options.label)
        else:
            label_ids = {label: i for i, label in enumerate(task.label_names)}
            labels = _class_ids(table, options.label, label_ids)
        return _dataset(table, options.text, options.text_pair, labels)

    rows = load(table)
    if options.validation_file is not None:
        return TaskData(task, rows, load(read_table(Path(options.validation_file))))
    if len(rows) < 2:
        raise UserError(f"{path} has one row, too few to hold any out for validation")
    held_out = min(max(round(len(rows) * options.validation_fraction), 1), len(rows) - 1)
    order = np.random.default_rng(options.seed).permutation(len(rows))
    return TaskData(task, rows.select(np.sort(order[held_out:])), rows.select(np.sort(order[:held_out])))


def _infer_kind(labels: list[str]) -> str:
    numbers = [_parse_number(label) for label in labels]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers) or all(number.is_integer() for number in known):
        return "classification"
    return "regression"


def _sorted_labels(table: Table, column: str) -> tuple[str, ...]:
    names = set(table.column(column))
    if "" in names:
        line = table.lines[table.column(column).index("")]
        raise UserError(f"{table.path}, line {line}: the label in column {column!r} is empty")
    if len(names) < 2:
        raise UserError(f"{table.path} has one label in column {column!r}, {names.pop()!r}; two are needed")
    if all(_parse_number(name) is not None for name in names):
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    return tuple(sorted(names))


def _class_ids(table: Table, column: str, label_ids: dict[str, int]) -> list[int]:
    labels = table.column(column)
    for line, label in zip(table.lines, labels, strict=True):
        if label not in label_ids:
            known = list(label_ids)
            listed = ", ".join(map(repr, known[:10])) + (", ..." if len(known) > 10 else "")
            raise UserError(
                f"{table.path}, line {line}: label {label!r} is unknown, expected one of {listed}"
            )
    return [label_ids[label] for label in labels]


def _numbers(table: Table, column: str) -> list[float]:
    labels = table.column(column)
    numbers = []
    for line, label in zip(table.lines, labels, strict=True):
        number = _parse_number(label)
        if number is None:
            raise UserError(
                f"{table.path}, line {line}: label {label!r} in column {column!r} is not a number"
            )
        numbers.append(number)
    return numbers


def _parse_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _dataset(table: Table, text: str, text_pair: str | None, labels: Sequence[float]) -> Dataset:
    columns: dict[str, Sequence[Any]] = {"text": table.column(text)}
    if text_pair is not None:
        columns["text_pair"] = table.column(text_pair)
    return Dataset.from_dict({**columns, "label": labels})


def match_labels(data: TaskData, config: PretrainedConfig) -> TaskData:
    """Give the rows the label ids that a fine-tuned model's configuration uses.

    Names are compared without regard to case. A model that does not name its labels (LABEL_0 or plain
    numbers) is taken to use the task's order.

    Args:
        data: as `load_task` returns it.
        config: of the model.

    Returns:
        `data`, or the same rows with the model's order of labels.

    Raises:
        UserError: the model has another number of outputs than the task, or other labels.
    """
    task = data.task
    num_outputs = len(task.label_names) or 1
    if config.num_labels != num_outputs:
        raise UserError(
            f"the model has {config.num_labels} outputs, but task {task.name} ({task.kind}) needs"
            f" {num_outputs}; give a model fine-tuned on this task"
        )
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    if task.kind == "regression" or all(n == str(i) or n == f"LABEL_{i}" for i, n in enumerate(names)):
        return data
    ids = {name.casefold(): i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    new_ids = [ids.get(name, ids.get(name.casefold())) for name in task.label_names]
    if set(new_ids) != set(range(num_outputs)):
        raise UserError(
            f"the model's labels are {', '.join(names)}, the task's {', '.join(task.label_names)};"
            " give a model fine-tuned on this task"
        )

    def renumber(rows: Dataset) -> Dataset:
        labels = [new_ids[label] for label in rows["label"]]
        return Dataset.from_dict({**rows.remove_columns("label").to_dict(), "label": labels})

    return TaskData(replace(task, label_names=names), renumber(data.train), renumber(data.validation))


def tokenize(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TaskData:
    """Turn the texts into token ids, cut to `max_length`; padding is left to a collator.

    Args:
        data: as `load_task` returns it.
        tokenizer: of the model.
        max_length: the most tokens of a row, special ones included; of a pair the longer text is cut first.

    Returns:
        The rows with the tokenizer's columns and "labels", ready for `transformers.Trainer`.

    Raises:
        ArgumentError: `max_length` is less than 3 or more than the tokenizer's model has.
    """
    if not 3 <= max_length <= tokenizer.model_max_length:
        raise ArgumentError(
            "max_length", f"must be 3 to the model's {tokenizer.model_max_length}, got {max_length}"
        )

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)
        return {**encoded, "labels": rows["label"]}

    def convert(rows: Dataset, split: str) -> Dataset:
        return rows.map(
            encode,
            batched=True,
            remove_columns=rows.column_names,
            load_from_cache_file=False,
            desc=f"Tokenizing {split} rows",
        )

    return TaskData(data.task, convert(data.train, "training"), convert(data.validation, "validation"))


def compute_metrics(task: Task) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that gives `task.metric_names` of a model's logits, for `transformers.Trainer`.

    A correlation with constant predictions, which is 0/0, counts as 0.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        labels = np.asarray(prediction.label_ids)
        predicted = logits.reshape(len(labels)) if task.kind == "regression" else logits.argmax(-1)
        return {name: float(_METRICS[name](labels, predicted)) for name in task.metric_names}

    return compute


def _correlation(statistic: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlate(labels: np.ndarray, predicted: np.ndarray) -> float:
        if np.ptp(labels) == 0 or np.ptp(predicted) == 0:
            return 0.0
        return statistic(labels, predicted).statistic

    return correlate


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "macro_f1": partial(metrics.f1_score, average="macro"),
    "matthews": metrics.matthews_corrcoef,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
