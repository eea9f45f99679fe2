"""What is read: tasks and their official metrics, sentences, texts and tables of one's own, and how rows
become batches. Nothing here knows of experts.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.data.predictions import Pooling, prediction_kind
    from moebert_kernels.compress.data.sentences import load_sentences
    from moebert_kernels.compress.data.tasks import (
        AnswerOptions,
        CsvOptions,
        EncodedData,
        Task,
        TaskData,
        load_task,
        match_labels,
        task_names,
        tokenize,
    )
    from moebert_kernels.compress.data.tasks.texts import load_texts

__all__ = [
    "AnswerOptions",
    "CsvOptions",
    "EncodedData",
    "Pooling",
    "Task",
    "TaskData",
    "load_sentences",
    "load_task",
    "load_texts",
    "match_labels",
    "prediction_kind",
    "task_names",
    "tokenize",
]

__getattr__ = getter(
    __name__,
    {
        "tasks": [
            "AnswerOptions",
            "CsvOptions",
            "EncodedData",
            "Task",
            "TaskData",
            "load_task",
            "match_labels",
            "task_names",
            "tokenize",
        ],
        "tasks.texts": ["load_texts"],
        "sentences": ["load_sentences"],
        "predictions": ["Pooling", "prediction_kind"],
    },
)
