"""A teacher and text to make students of it, for comparisons of how they are made: no labels decide anything.

What is compared is written down row by row, with seconds, environment and commit of each: a run that is
killed loses the row it was at, and the same command goes on from there.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.compress.data.batching import hold_out
from moebert_kernels.compress.data.docstrings import load_docstrings
from moebert_kernels.compress.data.tasks import (
    CsvOptions,
    TaskData,
    kind_of_model,
    load_task,
    match_labels,
    tokenize,
)
from moebert_kernels.compress.evaluation.likeness import prediction_likeness
from moebert_kernels.compress.evaluation.quality import batches, predict
from moebert_kernels.compress.experts.adaptation import token_counts
from moebert_kernels.compress.experts.fitting import RIDGE, Fitted, fit
from moebert_kernels.compress.scoring.importance import Importance, compute_importance
from moebert_kernels.compress.scoring.teacher_loss import prediction_shift_loss
from moebert_kernels.compress.scoring.token_scores import token_groups
from moebert_kernels.compress.storage.artifacts import write_json
from moebert_kernels.compress.storage.loading import load_teacher
from moebert_kernels.environment import describe_environment

from .quality.bootstrap import Interval, Resampled
from .quality.outcomes import outcomes
from .quality.remembered import RememberedLayers

ROWS = 2000  # what students are made on, if nothing else is said
_STAND_STILL = 1e12  # a ridge that leaves weights as they are: a fit by it is a measurement


class Testbed:
    """A teacher, the rows its students are made on, and those they are judged by.

    Args:
        name: of the text.
        teacher: folder of it.
        data: rows; of those to train on the first ones are those the teacher was trained on.
        max_length: tokens that rows are cut to.
    """

    def __init__(self, name: str, teacher: Path, data: TaskData, max_length: int):
        self.name = name
        self.teacher, self.tokenizer = load_teacher(teacher)
        self.kind = kind_of_model(self.teacher.config)
        encoded = tokenize(match_labels(data, self.teacher.config), self.tokenizer, max_length)
        self.train, self.validation = encoded.train, encoded.validation
        self.to_fit = lru_cache(maxsize=1)(self._to_fit)
        self.importance = lru_cache(maxsize=1)(self._importance)

    def rows(self, count: int, seed: int) -> tuple[Dataset, Dataset]:
        """The first `count` rows, without those that are held out of them; and these."""
        return hold_out(self.train.select(range(min(count, len(self.train)))), seed)

    def counts_V(self, count: int, seed: int) -> Tensor:
        """How often each token id occurs in the rows to fit to."""
        return token_counts(self.rows(count, seed)[0], self.teacher.config.vocab_size)

    def _importance(self, count: int, seed: int) -> Importance:
        rows, _ = self.rows(count, seed)
        return compute_importance(
            self.teacher,
            batches(rows, self.tokenizer),
            loss=prediction_shift_loss(self.teacher.config, seed=seed),
            group_V=token_groups(self.teacher, self.counts_V(count, seed)),
        )

    def _to_fit(self, count: int, seed: int) -> tuple[list[dict[str, Tensor]], RememberedLayers]:
        rows, _ = self.rows(count, seed)
        return list(batches(rows, self.tokenizer)), RememberedLayers(self.teacher)

    def fit(self, student: PreTrainedModel, count: int = ROWS, seed: int = 0, ridge: float = RIDGE) -> Fitted:
        """Fit a student, in place."""
        to_fit, remembered = self.to_fit(count, seed)
        # Of many rows the teacher's layers would take much memory.
        with remembered.answering() if count <= 2 * ROWS else nullcontext():
            return fit(student, self.teacher, to_fit, ridge=ridge)

    @cached_property
    def judging(self) -> tuple[list[dict[str, Tensor]], RememberedLayers]:
        """Batches of the validation rows, and the teacher's memory of them."""
        return list(batches(self.validation, self.tokenizer)), RememberedLayers(self.teacher)

    @cached_property
    def theirs(self) -> list[np.ndarray]:
        """What the teacher says of the validation rows."""
        return predict(self.teacher, self.validation, self.tokenizer)

    def layer_error(self, student: PreTrainedModel) -> float:
        """What share of a layer's output is wrong on validation rows, as the fit counts it; their mean."""
        to_judge, remembered = self.judging
        with remembered.answering():
            found = fit(copy.deepcopy(student), self.teacher, to_judge, ridge=_STAND_STILL)
        return float(np.mean(found.cut_L))

    def likeness(self, student: PreTrainedModel) -> Likeness:
        """How a student's predictions of the validation rows compare with the teacher's."""
        ours = predict(student, self.validation, self.tokenizer)
        found = prediction_likeness(self.kind, ours, self.theirs)
        rows = np.array(outcomes(self.kind, ours, self.theirs)["divergence"])
        said = np.stack(ours).argmax(1) == np.array(self.validation["labels"])
        return Likeness(found["divergence"], found["agreement"], float(said.mean()), rows)


class Likeness(NamedTuple):
    """Divergence from the teacher, in the mean and of every row; shares of rows that agree, and are right."""

    divergence: float
    agreement: float
    accuracy: float
    rows_N: np.ndarray

    def written(self) -> str:
        """The divergences of all rows as a line."""
        return " ".join(f"{value:.3g}" for value in self.rows_N)

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Likeness:
        """Of a record that has what `written` gives as "row_by_row"."""
        rows_N = np.array(row["row_by_row"].split(), float)
        return cls(row["divergence"], row["agreement"], row["accuracy"], rows_N)

    def times(self, base: Likeness) -> list[float]:
        """This divergence by that of another student on the same rows, and where 95 % of resamples lie."""
        nothing_N = np.zeros(len(self.rows_N))
        resampled = Resampled("rows", nothing_N, nothing_N, 1)
        ratio_R = resampled.mean([self.rows_N]) / resampled.mean([base.rows_N])
        return [round(value, 3) for value in Interval.of(ratio_R)]


_LENGTH, _TABLE_LENGTH = 48, 64  # tokens of the demonstration's rows, and of other tables
Folder = Annotated[Path, typer.Argument(help="Of a finished `moebert demo`; with --train, of a teacher.")]
TrainRows = Annotated[Path | None, typer.Option("--train", help="A table of texts and labels.")]
Validation = Annotated[Path | None, typer.Option(help="Another.")]
Label = Annotated[str, typer.Option(help="Column of the labels.")]
Only = Annotated[str | None, typer.Option(help="Rows by name; between them |.")]


def testbed_of(folder: Path, train: Path | None, validation: Path | None, label: str) -> Testbed:
    """What a command was asked to compare on: the demonstration, unless it was given tables."""
    if train is None or validation is None:
        return demonstration(folder, _LENGTH)
    return table_of_texts(folder, train, validation, label, _TABLE_LENGTH)


def demonstration(folder: Path, max_length: int) -> Testbed:
    """The demonstration's teacher and docstrings: those it was taught, and all others of the ten packages.

    Judged are all docstrings of the definitions that are held out there, of which the demonstration has some.

    Raises:
        ValueError: the folder's data are not of this Python's library.
    """
    taught = load_task(
        "csv",
        folder / "data" / "train.csv",
        csv=CsvOptions(validation_file=folder / "data" / "validation.csv"),
    )
    data = load_docstrings(train_per_package=1 << 30)
    texts = set(taught.train["text"])
    is_taught = np.array([text in texts for text in data.train["text"]])
    if is_taught.sum() != len(texts):
        raise ValueError(f"{folder} holds docstrings of another Python's library than this one's")
    parts = [data.train.select(np.flatnonzero(is_taught == which)) for which in (True, False)]
    train = concatenate_datasets(parts)
    return Testbed(folder.name, folder / "teacher", TaskData(data.task, train, data.validation), max_length)


def table_of_texts(teacher: Path, train: Path, validation: Path, label: str, max_length: int) -> Testbed:
    """A teacher of classes and two tables of texts, with the columns text and `label`."""
    data = load_task("csv", train, csv=CsvOptions(label=label, validation_file=validation))
    rows = data.train.shuffle(seed=0)
    data = TaskData(data.task, rows, data.validation)
    return Testbed(teacher.name, teacher, data, max_length)


class Records:
    """A json file of rows, each written when it is there.

    Args:
        path: of the file; rows that it holds are not made again.
    """

    def __init__(self, path: Path):
        self.path = path
        environment = asdict(describe_environment())  # as it is now, when the code has been read
        self._environment = {name: environment[name] for name in ("cpu", "threads", "versions", "commit")}
        self.rows: list[dict[str, Any]] = (
            json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
        )

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of this key, if it is there."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def row(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Make the row of this key, unless it is there."""
        if self.find(key) is not None:
            return
        began = time.monotonic()
        found = make()
        seconds = round(time.monotonic() - began, 1)
        self.rows.append(dict(key) | found | {"seconds": seconds, "environment": self._environment})
        write_json(self.path, {"rows": self.rows})
        told = ", ".join(f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, float))
        typer.echo(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, key.values()))}: {told}")
