"""What answers score that do not look at the text: what a teacher has to be better than."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moebert_kernels.compress.data.tasks.sequences import METRICS
from moebert_kernels.compress.data.tasks.squad_score import answer_scores
from moebert_kernels.compress.data.tasks.task import TaskData


def constant_score(data: TaskData) -> float | None:
    """The best value of the main metric, on the validation rows, of one answer to all of them.

    Returns:
        It, 0 where it is a correlation or counts entities; None for rows without labels.
    """
    task = data.task
    if not data.has_labels:
        return None
    if task.kind == "question_answering":
        scores = [answer_scores("", gold, may_be_absent=True) for gold in data.validation["answers"]]
        return float(np.mean(scores, axis=0)[1]) if task.answers and task.answers.may_be_absent else 0.0
    if task.kind not in ("classification", "multi_label_classification"):
        return 0.0
    metric = METRICS[task.main_metric]
    return max(float(metric(labels, same)) for labels, same in _constant_answers(data))


def _constant_answers(data: TaskData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The labels, in the form that metrics take, and the same answer to every row."""
    labels = data.validation["label"][:]
    classes = range(len(data.task.label_names))
    if data.task.kind == "classification":
        for i in classes:
            yield np.asarray(labels), np.full(len(labels), i)
        return
    labels_NC = np.array([[i in row for i in classes] for row in labels], dtype=float)
    by_frequency = np.argsort(-labels_NC.sum(0), kind="stable")
    for count in range(1, len(classes) + 1):
        same_NC = np.zeros_like(labels_NC)
        same_NC[:, by_frequency[:count]] = 1
        yield labels_NC, same_NC
