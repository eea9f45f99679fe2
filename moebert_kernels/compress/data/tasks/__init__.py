"""Tasks: rows of labelled text and the official metrics of models on them."""

from moebert_kernels.compress.data.tasks.catalog import load_task, task_names
from moebert_kernels.compress.data.tasks.chance import constant_score
from moebert_kernels.compress.data.tasks.kinds import (
    KINDS,
    auto_model_of,
    kind_of_model,
    match_labels,
    tokenize,
)
from moebert_kernels.compress.data.tasks.labels import describe_labels
from moebert_kernels.compress.data.tasks.tables import CsvOptions
from moebert_kernels.compress.data.tasks.task import (
    AnswerOptions,
    EncodedData,
    EncodedRows,
    Kind,
    Task,
    TaskData,
)

__all__ = [
    "KINDS",
    "AnswerOptions",
    "CsvOptions",
    "EncodedData",
    "EncodedRows",
    "Kind",
    "Task",
    "TaskData",
    "auto_model_of",
    "constant_score",
    "describe_labels",
    "kind_of_model",
    "load_task",
    "match_labels",
    "task_names",
    "tokenize",
]
