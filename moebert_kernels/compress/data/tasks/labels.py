"""What the labels of a task's rows are, in a line that its user can check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import chain

from moebert_kernels.compress.data.tasks.task import TaskData

_MOST_LISTED = 10


def describe_labels(data: TaskData) -> str:
    """Say how many rows there are, which classes were found, and how often.

    Example:
        >>> describe_labels(data)
        '900 training rows, 100 to validate; 2 classes: neg (412), pos (488)'
    """
    task, rows = data.task, data.train
    if not data.has_labels:
        return f"{len(rows):,} training texts, {len(data.validation):,} held out; no labels"
    sizes = f"{len(rows):,} training rows, {len(data.validation):,} to validate"
    if task.kind == "question_answering":
        without = sum(not answers for answers in rows["answers"])
        return f"{sizes}; {without:,} questions without an answer" if without else sizes
    labels = rows["label"][:]
    if task.kind == "regression":
        return f"{sizes}; labels from {min(labels):g} to {max(labels):g}"
    one_each = task.kind == "classification"
    counts = Counter(labels if one_each else chain.from_iterable(labels))
    listed = (f"{name} ({counts[i]:,})" for i, name in enumerate(task.label_names))
    return f"{sizes}; {len(task.label_names)} classes: {_joined(listed)}"


def _joined(parts: Iterable[str]) -> str:
    parts = list(parts)
    more = len(parts) - _MOST_LISTED
    return ", ".join(parts[:_MOST_LISTED]) + (f", and {more} more" if more > 0 else "")
