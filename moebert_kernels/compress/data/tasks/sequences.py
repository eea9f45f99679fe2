"""Tasks with labels for a text or a pair of texts as a whole: classification and regression."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from scipy import stats
from sklearn import metrics
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from moebert_kernels.compress.data.tasks.task import EncodedRows, Kind, Outputs, Task, to_rows


class _SequenceKind(Kind):
    head = "ForSequenceClassification"
    auto_model = AutoModelForSequenceClassification

    def encode(
        self, task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> EncodedRows:
        """Cut each text to `max_length`; of a pair the longer is cut first."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
            return {**encoded, "labels": [*self.targets(task, batch["label"])]}

        labels = np.asarray([*self.targets(task, rows["label"][:])])

        def score(outputs: Outputs) -> dict[str, float]:
            predicted = self.predict(np.stack(outputs))
            return {name: float(METRICS[name](labels, predicted)) for name in task.metric_names}

        return EncodedRows(to_rows(rows, encode), score)

    def targets(self, task: Task, labels: Sequence[Any]) -> Iterable[Any]:
        """What the head's loss takes of the rows' labels."""
        return labels

    @abstractmethod
    def predict(self, outputs_NC: np.ndarray) -> np.ndarray:
        """The predictions, in the form of `targets`, by a head's outputs."""


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


class MultiLabelClassification(_SequenceKind):
    """Any number of classes per text or pair, each a yes or no of its own."""

    def num_outputs(self, task: Task) -> int:
        """One per class."""
        return len(task.label_names)

    def head_config(self, task: Task) -> dict[str, Any]:
        """The classes' names, and the loss: binary cross-entropy, averaged over classes."""
        return {**super().head_config(task), "problem_type": "multi_label_classification"}

    def targets(self, task: Task, labels: Sequence[Sequence[int]]) -> Iterable[list[float]]:
        """A number per class, 1 where the row has it and 0 elsewhere."""
        return ([float(i in row) for i in range(len(task.label_names))] for row in labels)

    def predict(self, outputs_NC: np.ndarray) -> np.ndarray:
        """1 at the classes [N, C] that are likelier than not, 0 at others."""
        return (outputs_NC > 0).astype(float)


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


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    # 0 / 0 of a class that nobody has and nobody predicts counts as 0, as everywhere.
    "macro_f1": partial(metrics.f1_score, average="macro", zero_division=0),
    "micro_f1": partial(metrics.f1_score, average="micro", zero_division=0),
    "matthews": metrics.matthews_corrcoef,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}
