"""The kinds of tasks, and how raw rows become rows for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from moebert_kernels.compress.data.predictions import sequence_kind
from moebert_kernels.compress.data.tasks import texts
from moebert_kernels.compress.data.tasks.answers import QuestionAnswering
from moebert_kernels.compress.data.tasks.sequences import Classification, MultiLabelClassification, Regression
from moebert_kernels.compress.data.tasks.task import EncodedData, Kind, TaskData
from moebert_kernels.compress.data.tasks.tokens import TokenClassification
from moebert_kernels.errors import ArgumentError, UserError

KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "classification": Classification(),
        "multi_label_classification": MultiLabelClassification(),
        "regression": Regression(),
        "token_classification": TokenClassification(),
        "question_answering": QuestionAnswering(),
        texts.KIND: texts.Texts(),
    }
)


def auto_model_of(architectures: list[str] | None) -> Any | None:
    """The Auto class that loads a model, by the class names its configuration has; None for other heads."""
    for kind in KINDS.values():
        if any(name.endswith(kind.head) for name in architectures or ()):
            return kind.auto_model
    return None


def kind_of_model(config: PretrainedConfig) -> str:
    """The kind of task that a model with a head was fine-tuned on, a key of `KINDS`."""
    for name in ("token_classification", "question_answering"):
        if any(architecture.endswith(KINDS[name].head) for architecture in config.architectures or ()):
            return name
    return sequence_kind(config)


def match_labels(data: TaskData, config: PretrainedConfig) -> TaskData:
    """Give the rows the label ids that a fine-tuned model's configuration uses.

    Names are compared without regard to case. A model that does not name its labels (LABEL_0 or plain
    numbers) is taken to use the task's order.

    Args:
        data: as `load_task` returns it.
        config: of the model.

    Returns:
        `data`, or the same rows and label names in the model's order; of texts without labels, `data`.

    Raises:
        UserError: the model has another head than the task needs, another number of outputs or of labels to
            a text, or other labels.
    """
    task, kind = data.task, KINDS[data.task.kind]
    if task.kind == texts.KIND:
        return data
    if config.architectures and not any(name.endswith(kind.head) for name in config.architectures):
        raise UserError(
            f"the model is a {' or '.join(config.architectures)}, but task {task.name} needs a model "
            f"...{kind.head}; give a model fine-tuned on this task"
        )
    _check_problem_type(data, config)
    num_outputs = kind.num_outputs(task)
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    is_named = bool(task.label_names) and any(n not in (str(i), f"LABEL_{i}") for i, n in enumerate(names))
    ids = {name.casefold(): i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    new_ids = [ids.get(name, ids.get(name.casefold())) for name in task.label_names]
    unknown = [name for name, new_id in zip(task.label_names, new_ids, strict=True) if new_id is None]
    if is_named and unknown:
        raise UserError(
            f"the model's labels are {_listed(names)}, the task's {_listed(task.label_names)}: the model has "
            f"not learned {_listed(unknown)}; give a model fine-tuned on this task"
        )
    if config.num_labels != num_outputs:
        raise UserError(
            f"the model has {config.num_labels} outputs, but task {task.name} ({task.kind}) needs"
            f" {num_outputs}; give a model fine-tuned on this task"
        )
    if not is_named:
        return data
    if set(new_ids) != set(range(num_outputs)):
        raise UserError(
            f"the model's labels are {_listed(names)}, the task's {_listed(task.label_names)};"
            " give a model fine-tuned on this task"
        )

    def new(label: Any) -> Any:
        return [new_ids[one] for one in label] if isinstance(label, list) else new_ids[label]

    def renumber(rows: Dataset) -> Dataset:
        labels = [new(label) for label in rows["label"]]
        return Dataset.from_dict({**rows.remove_columns("label").to_dict(), "label": labels})

    in_order = tuple(task.label_names[new_ids.index(i)] for i in range(num_outputs))
    return replace(
        data,
        task=replace(task, label_names=in_order),
        train=renumber(data.train),
        validation=renumber(data.validation),
        further_validation={name: renumber(rows) for name, rows in data.further_validation.items()},
    )


def _check_problem_type(data: TaskData, config: PretrainedConfig) -> None:
    """Any number of labels to a row and one to each are told apart by nothing else in a configuration."""
    several = "multi_label_classification"
    if config.problem_type == several and data.task.kind in ("classification", "regression"):
        raise UserError(
            f"the model gives a text any number of labels (problem_type {several}), task {data.task.name} "
            f'has one: give a table with all labels of a row in one field, "|" between them, as {several}'
        )
    if data.task.kind == several and config.problem_type != several:
        raise UserError(
            f"task {data.task.name} gives a text any number of labels, and the model was not trained so: its "
            f"configuration has problem_type {config.problem_type!r}, expected {several!r}"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def tokenize(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedData:
    """Turn the texts into token ids, `max_length` at most in a row; padding is left to a collator.

    Args:
        data: as `load_task` returns it.
        tokenizer: of the model.
        max_length: the most tokens of a row, special ones included. Longer texts are cut where one label is
            asked for, and become several rows where there is one for every word, or an answer to be found.

    Returns:
        The rows, and how outputs on the validation rows are scored.

    Raises:
        ArgumentError: `max_length` is less than 3 or more than the tokenizer's model has.
        UserError: the task needs to know where tokens come from, and the tokenizer does not.
    """
    if not 3 <= max_length <= tokenizer.model_max_length:
        raise ArgumentError(
            "max_length", f"must be 3 to the model's {tokenizer.model_max_length}, got {max_length}"
        )
    task, kind = data.task, KINDS[data.task.kind]
    if not tokenizer.is_fast and task.kind in ("token_classification", "question_answering"):
        raise UserError(
            f"task {task.name} needs to know which characters a token stands for, which "
            f"{type(tokenizer).__name__} does not say; load the model with a fast tokenizer"
        )
    return EncodedData(
        task,
        kind.encode(task, data.train, tokenizer, max_length).rows,
        {name: kind.encode(task, rows, tokenizer, max_length) for name, rows in data.validation_sets.items()},
    )
