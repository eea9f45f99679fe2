"""How alike two models are, a graph and the one it was made of, on real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from moebert_kernels.compress.data.tasks import KINDS, EncodedData, TaskData, match_labels, tokenize
from moebert_kernels.compress.data.tasks import texts as plain_texts
from moebert_kernels.compress.data.tasks.task import Task
from moebert_kernels.compress.evaluation.quality import predict, score
from moebert_kernels.compress.storage.loading import row_length
from moebert_kernels.errors import ArgumentError
from moebert_kernels.export.folder import Source
from moebert_kernels.export.heads import ANSWERS, SEQUENCE, head_of
from moebert_kernels.export.runtime import GraphModel

MOST_TRIED = 512  # rows of a trial
# The least that 8 bits may leave of each kind of likeness before layers are kept in 32.
LEAST = {"agreement": 0.98, "correlation": 0.995, "cosine": 0.985}


@dataclass(frozen=True)
class Likeness:
    """How alike the outputs of two models are.

    Attributes:
        largest_difference: of any two numbers.
        kind: of `alike`: "agreement", the share of equal predictions, of rows, tokens or answers;
            "correlation", of scores; "cosine", the mean of two embeddings', of rows or tokens.
        alike: at most 1.
        num_texts: that were looked at.
        scores: the task's metrics by name, where texts have labels.
    """

    largest_difference: float
    kind: str
    alike: float
    num_texts: int
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def is_enough(self) -> bool:
        """Whether 8 bits may leave so much."""
        return self.alike >= LEAST[self.kind]

    def __str__(self) -> str:
        scores = "".join(f", {name} {value:.4f}" for name, value in self.scores.items())
        return (
            f"largest difference {self.largest_difference:.2g}, {self.kind} {self.alike:.4f} on "
            f"{self.num_texts} texts{scores}"
        )


class Checker:
    """The rows that graphs are tried on and what PyTorch makes of them.

    Args:
        source: what is exported, with its tokenizer.
        texts: or the rows of a task, of which the validation rows are taken.

    Attributes:
        scores: the PyTorch model's metrics, where texts have labels.

    Raises:
        ArgumentError: there is no tokenizer, or no text.
        UserError: the rows are of another task than the model's.
    """

    def __init__(self, source: Source, texts: Sequence[str] | TaskData):
        if source.tokenizer is None:
            raise ArgumentError("tokenizer", "must be given with a model to check its graph on text")
        if not isinstance(texts, TaskData) and not texts:
            raise ArgumentError("check", "must have a text at least")
        self._source = source
        self._data = _encode(source, texts)
        self._has_labels = self._data.task.kind != plain_texts.KIND
        self._kind = _kind_of(source.model)
        self._expected = {
            name: self._predict(source.model, encoded.rows)
            for name, encoded in self._data.validation_sets.items()
        }
        self.scores = self._score(self._expected)

    def check(self, graph: Path) -> Likeness:
        """Run a graph on all rows and compare it with PyTorch."""
        model = GraphModel(graph, self._source.model.config)
        outputs = {
            name: self._predict(model, encoded.rows) for name, encoded in self._data.validation_sets.items()
        }
        ours, theirs = ([row for rows in of.values() for row in rows] for of in (outputs, self._expected))
        return compare(ours, theirs, self._kind, scores=self._score(outputs))

    def measure(self, graph: Path) -> Likeness:
        """Compare a graph with PyTorch on at most `MOST_TRIED` rows: one trial of many."""
        name, encoded = next(iter(self._data.validation_sets.items()))
        step = -(-len(encoded.rows) // MOST_TRIED)
        chosen = range(0, len(encoded.rows), step)
        model = GraphModel(graph, self._source.model.config)
        outputs = self._predict(model, encoded.rows.select(chosen))
        return compare(outputs, self._expected[name][::step], self._kind)

    def _predict(self, model: Any, rows: Dataset) -> list[np.ndarray]:
        sentences, tokenizer = self._source.sentences, cast(Any, self._source.tokenizer)
        pooling: Any = None if sentences is None else sentences.pool
        if pooling is None and head_of(self._source.model) is None:
            pooling = _states
        return predict(model, rows, tokenizer, pooling=pooling)

    def _score(self, outputs: dict[str, list[np.ndarray]]) -> dict[str, float]:
        return score(self._data, outputs) if self._has_labels else {}


def compare(
    outputs: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    kind: str,
    *,
    scores: dict[str, float] | None = None,
) -> Likeness:
    """Compare what two models say of the same rows, as `predict` returns it; for `kind` see `_kind_of`."""
    largest = max(
        float(np.abs(ours - theirs).max(initial=0)) for ours, theirs in zip(outputs, expected, strict=True)
    )
    pairs = list(zip(outputs, expected, strict=True))
    if kind == "correlation":
        ours, theirs = (np.concatenate([row.ravel() for row in rows]) for rows in (outputs, expected))
        spread = ours.std() * theirs.std()
        alike = float(np.corrcoef(ours, theirs)[0, 1]) if spread > 0 else float(np.allclose(ours, theirs))
    elif kind == "cosine":
        alike = float(np.concatenate([np.atleast_1d(_cosine(*pair)) for pair in pairs]).mean())
    else:
        alike = float(np.concatenate([np.atleast_1d(_same(*pair, kind)) for pair in pairs]).mean())
    name = kind if kind in LEAST else "agreement"
    return Likeness(largest, name, alike, len(pairs), scores or {})


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return (ours * theirs).sum(-1) / np.maximum(norms, np.finfo(np.float32).tiny)


def _same(ours: np.ndarray, theirs: np.ndarray, kind: str) -> np.ndarray:
    if kind == "answers":
        return (ours.argmax(0) == theirs.argmax(0)).all()
    if kind == "labels":
        return ((ours > 0) == (theirs > 0)).mean(-1)
    return ours.argmax(-1) == theirs.argmax(-1)


def _kind_of(model: PreTrainedModel) -> str:
    """A kind of `Likeness`, or of agreement: of "answers", or of each of several "labels"."""
    head = head_of(model)
    if head is None:
        return "cosine"
    if head == ANSWERS:
        return "answers"
    if head == SEQUENCE and (model.config.num_labels == 1 or model.config.problem_type == "regression"):
        return "correlation"
    if head == SEQUENCE and model.config.problem_type == "multi_label_classification":
        return "labels"
    return "agreement"


def _states(states_BSD: Any, mask_BS: Any) -> Any:
    return states_BSD


def _encode(source: Source, texts: Sequence[str] | TaskData) -> EncodedData:
    tokenizer: Any = source.tokenizer
    if not isinstance(texts, TaskData):
        rows = Dataset.from_dict({"text": list(texts)})
        texts = TaskData(Task("texts", plain_texts.KIND, (), (), ""), rows, rows)
    data = texts if texts.task.kind == plain_texts.KIND else match_labels(texts, source.model.config)
    default = KINDS[data.task.kind].default_length
    sentences = source.sentences
    if sentences is None:
        length = row_length(None, source.model.config, tokenizer, "max_length", default=default)
    else:
        length = min(default, sentences.max_length)
        data = _prepared(data, sentences)
    return tokenize(data, tokenizer, length)


def _prepared(data: TaskData, sentences: Any) -> TaskData:
    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        text = sentences.prompt + row["text"]
        return {"text": text.lower() if sentences.lower_case else text}

    rows = data.validation.map(prepare, load_from_cache_file=False)
    return TaskData(data.task, rows, rows)
