"""What a task is, what its rows are, and what differs between kinds of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from moebert_kernels.errors import ArgumentError

_FEW_VALIDATION_ROWS = 30  # one row more or less that is right moves the score by three points and more


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are looked for in long contexts, and chosen; only for question answering.

    Attributes:
        doc_stride: tokens that neighbouring windows of a context have in common; None for 128, or less where
            `max_length` leaves little room for the context.
        n_best: so many of a window's best starts and ends are combined.
        max_answer_length: tokens of the longest answer.
        may_be_absent: whether a question may have no answer; SQuAD 2.0 sets it, SQuAD 1.1 does not.
        null_threshold: a question has no answer if "none" scores higher than the best span by more than this;
            only where it may be absent.

    Raises:
        ArgumentError: a value is out of range.
    """

    doc_stride: int | None = None
    n_best: int = 20
    max_answer_length: int = 30
    may_be_absent: bool = False
    null_threshold: float = 0.0

    def __post_init__(self):
        if self.doc_stride is not None and self.doc_stride < 0:
            raise ArgumentError("doc_stride", f"must not be negative, got {self.doc_stride}")
        for name in ("n_best", "max_answer_length"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, f"must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Task:
    """What is predicted, and how it is scored.

    Attributes:
        name: as in `task_names`; of one's own table, that of the file.
        kind: "classification", "multi_label_classification", "regression", "token_classification" or
            "question_answering".
        label_names: the classes in the order of their ids; empty for regression and question answering.
        metric_names: the official metrics, fractions of 1.
        main_metric: the one of them to compare models by; larger is better.
        answers: for question answering, how answers are found.
    """

    name: str
    kind: str
    label_names: tuple[str, ...]
    metric_names: tuple[str, ...]
    main_metric: str
    answers: AnswerOptions | None = None


@dataclass(frozen=True)
class TaskData:
    """A task and its rows as text.

    The columns depend on the kind:

    * classification and regression: "text", "text_pair" for tasks on pairs, "label", a class id or number, or
      of multi-label classification a list of class ids;
    * token classification: "words", and "label", a class id per word;
    * question answering: "question", "context", "answers" (texts; none for a question without answer) and
      "starts", the character of the context at which each begins.

    Attributes:
        task: the task.
        train: the training rows.
        validation: the rows to evaluate on.
        further_validation: by name, sets that are evaluated beside `validation`; MNLI's "mismatched".
        oddities: what was odd about the rows when they were read, a sentence each.
    """

    task: Task
    train: Dataset
    validation: Dataset
    further_validation: Mapping[str, Dataset] = field(default_factory=dict)
    oddities: tuple[str, ...] = ()

    @property
    def validation_sets(self) -> dict[str, Dataset]:
        """All sets to evaluate on by name, `validation` first; its name is empty."""
        return {"": self.validation, **self.further_validation}

    @property
    def has_labels(self) -> bool:
        """Whether rows come with what a model should say of them."""
        return not {"label", "answers"}.isdisjoint(self.train.column_names)

    @property
    def scarcity(self) -> str | None:
        """That scores say little, if there are few rows to validate on."""
        rows = len(self.validation)
        if rows >= _FEW_VALIDATION_ROWS:
            return None
        there_are = "there is 1 row" if rows == 1 else f"there are {rows} rows"
        return f"Scores say little: {there_are} to validate on, fewer than {_FEW_VALIDATION_ROWS}."


Outputs = Sequence[np.ndarray]
"""A model's outputs row by row: [C] of a sequence, or [S, C] for the row's own S tokens, no padding.

C is the number of classes, 1 for regression, 2 (start, end) for question answering."""

Score = Callable[[Outputs], dict[str, float]]


@dataclass(frozen=True)
class EncodedRows:
    """Rows as token ids.

    Attributes:
        rows: the tokenizer's columns and the labels' ("labels", or "start_positions" and "end_positions"),
            ready for `transformers.Trainer`. A long text may have become several rows.
        score: the task's metrics of a model's outputs on `rows`, in their order.
    """

    rows: Dataset
    score: Score


@dataclass(frozen=True)
class EncodedData:
    """A task and its rows as token ids, as `tokenize` makes them.

    Attributes:
        task: the task.
        train: the training rows, see `EncodedRows.rows`.
        validation_sets: what to evaluate on, as in `TaskData`.
    """

    task: Task
    train: Dataset
    validation_sets: Mapping[str, EncodedRows]

    @property
    def validation(self) -> Dataset:
        """The rows of the first validation set."""
        return next(iter(self.validation_sets.values())).rows


class Kind(ABC):
    """What sets one kind of task apart from the others: its head, its rows, its labels, its score.

    Attributes:
        head: how the names of its model classes end.
        auto_model: the transformers Auto class of them.
        default_length: tokens that rows are cut to if nobody says otherwise.
    """

    head: str
    auto_model: Any
    default_length: int = 128

    @abstractmethod
    def num_outputs(self, task: Task) -> int:
        """The width of the head."""

    def head_config(self, task: Task) -> dict[str, Any]:
        """What a model's configuration says of its head."""
        names = task.label_names or tuple(f"LABEL_{i}" for i in range(self.num_outputs(task)))
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": None,
        }

    @abstractmethod
    def encode(
        self, task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> EncodedRows:
        """Turn raw rows into token ids, at most `max_length` per row; say how to score outputs on them."""


def to_rows(
    dataset: Dataset, encode: Callable[..., dict[str, Any]], *, with_indices: bool = False
) -> Dataset:
    """Put what `encode` makes of batches in the place of all columns; it may have more or fewer rows."""
    return dataset.map(
        encode,
        batched=True,
        with_indices=with_indices,
        remove_columns=dataset.column_names,
        load_from_cache_file=False,
        desc="Tokenizing",
    )
