"""Tasks with one label for a text or a pair of texts: classification and regression."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from scipy import stats
from sklearn import metrics
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from moebert_kernels.compress.tasks.task import EncodedRows, Kind, Outputs, Task, to_rows


class _SequenceKind(Kind):
    head = "ForSequenceClassification"
    auto_model = AutoModelForSequenceClassification

    def encode(
        self, task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> EncodedRows:
        """Cut each text to `max_length`; of a pair the longer is cut first."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
            return {**encoded, "labels": batch["label"]}

        labels = np.asarray(rows["label"][:])

        def score(outputs: Outputs) -> dict[str, float]:
            predicted = self.predict(np.stack(outputs))
            return {name: float(_METRICS[name](labels, predicted)) for name in task.metric_names}

        return EncodedRows(to_rows(rows, encode), score)

    @abstractmethod
    def predict(self, outputs_NC: np.ndarray) -> np.ndarray:
        """The predictions [N] by a head's outputs."""


class Classification(_SequenceKind):
    """One class per text or pair."""

    def num_outputs(self, task: Task) -> int:
        """One per class."""
        return len(task.label_names)

    def head_config(self, task: Task) -> dict[str, Any]:
        """The classes' names, and the loss: cross-entropy."""
        return {**super().head_config(task), "problem_type": "single_label_classification"}

    def predict(self, outputs_NC: np.ndarray) -> np.ndarray:
        """The likeliest classes [N]."""
        return outputs_NC.argmax(-1)


class Regression(_SequenceKind):
    """A number per text or pair."""

    def num_outputs(self, task: Task) -> int:
        """The number."""
        return 1

    def head_config(self, task: Task) -> dict[str, Any]:
        """The loss: squared error."""
        return {**super().head_config(task), "problem_type": "regression"}

    def predict(self, outputs_NC: np.ndarray) -> np.ndarray:
        """The numbers [N]."""
        return outputs_NC[:, 0]


def _correlation(statistic: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    """With constant predictions, which makes 0/0 of a correlation, it counts as 0."""

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
