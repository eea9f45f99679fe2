"""What is read: tasks and their official metrics, sentences, texts and tables of one's own, and how rows
become batches. Nothing here knows of experts.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.data.predictions import Pooling as Pooling
    from moebert_kernels.compress.data.predictions import prediction_kind as prediction_kind
    from moebert_kernels.compress.data.sentences import load_sentences as load_sentences
    from moebert_kernels.compress.data.tasks import AnswerOptions as AnswerOptions
    from moebert_kernels.compress.data.tasks import CsvOptions as CsvOptions
    from moebert_kernels.compress.data.tasks import EncodedData as EncodedData
    from moebert_kernels.compress.data.tasks import Task as Task
    from moebert_kernels.compress.data.tasks import TaskData as TaskData
    from moebert_kernels.compress.data.tasks import load_task as load_task
    from moebert_kernels.compress.data.tasks import match_labels as match_labels
    from moebert_kernels.compress.data.tasks import task_names as task_names
    from moebert_kernels.compress.data.tasks import tokenize as tokenize
    from moebert_kernels.compress.data.tasks.texts import load_texts as load_texts

__all__, __getattr__ = exports(
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
