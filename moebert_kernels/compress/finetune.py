"""Fine-tuning: a pre-trained encoder becomes the teacher."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from moebert_kernels.compress.batching import LengthGroupedTrainer
from moebert_kernels.compress.tasks import Task, TaskData, compute_metrics, tokenize
from moebert_kernels.errors import UserError
from moebert_kernels.models.surgery import find_ffns


def finetune(
    model: str | Path,
    data: TaskData,
    output_dir: str | Path,
    *,
    epochs: float = 3,
    lr: float = 3e-5,
    batch_size: int = 32,
    max_length: int = 128,
    weight_decay: float = 0.01,
    seed: int = 0,
    training_arguments: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Fine-tune a pre-trained encoder on a task and save it with its tokenizer.

    `output_dir` appears when all is done. Until then checkpoints are kept beside it, in
    `<output_dir>.unfinished`; the same call goes on from the last of them, and a call with other
    arguments or data starts again. Torch's, numpy's and Python's random states are seeded.

    Args:
        model: name on the hub or folder of a model and its tokenizer.
        data: as `load_task` returns it.
        output_dir: a folder that does not exist.
        epochs: passes over the training rows.
        lr: the highest learning rate, reached after a tenth of the steps and then falling to 0.
        batch_size: rows per step and device.
        max_length: tokens of a row.
        weight_decay: of AdamW.
        seed: of the new head, the order of rows and dropout.
        training_arguments: more arguments of `transformers.TrainingArguments`, such as {"bf16": True}.
        callbacks: for the Trainer.

    Returns:
        The task's metrics on the validation rows.

    Raises:
        UserError: no such model, or one that cannot be compressed later; arguments out of range;
            `output_dir` exists.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise UserError(f"{output_dir} exists already; delete it or choose another folder")
    for name, value in (("epochs", epochs), ("lr", lr), ("batch_size", batch_size)):
        if value <= 0:
            raise UserError(f"{name} must be more than 0, got {value}")
    set_seed(seed)
    tokenizer, network = _load(str(model), data.task, max_length)
    tokenized = tokenize(data, tokenizer, max_length)

    unfinished = output_dir.with_name(output_dir.name + ".unfinished")
    fixed = {
        "num_train_epochs": epochs,
        "learning_rate": lr,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2 * batch_size,
        "weight_decay": weight_decay,
        "warmup_steps": 0.1,
        "seed": seed,
        "save_steps": 0.1,
        "save_total_limit": 1,
        "logging_steps": 0.02,
        "report_to": "none",
        **(training_arguments or {}),
    }
    _prepare_folder(unfinished, {"model": _model_state(model), "data": _data_state(tokenized), **fixed})
    trainer = LengthGroupedTrainer(
        network,
        TrainingArguments(output_dir=str(unfinished), **fixed),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=tokenized.train,
        eval_dataset=tokenized.validation,
        processing_class=tokenizer,
        compute_metrics=compute_metrics(data.task),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(unfinished))
    found = trainer.evaluate()
    finished = unfinished / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    trainer.save_model(str(finished))
    os.replace(finished, output_dir)
    shutil.rmtree(unfinished)
    return {name: found[f"eval_{name}"] for name in data.task.metric_names}


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint of a Trainer that was written to its end; None if there is none."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            # The Trainer writes its state last.
            complete.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(complete)[1]) if complete else None


def _load(model: str, task: Task, max_length: int):
    num_labels = len(task.label_names) or 1
    labels = {
        "id2label": dict(enumerate(task.label_names)) or {0: "LABEL_0"},
        "label2id": {name: i for i, name in enumerate(task.label_names)} or {"LABEL_0": 0},
        "problem_type": "regression" if task.kind == "regression" else "single_label_classification",
    }
    try:
        config = AutoConfig.from_pretrained(model, num_labels=num_labels, **labels)
        tokenizer = AutoTokenizer.from_pretrained(model)
        # A head for another number of labels is replaced by a new one.
        network = AutoModelForSequenceClassification.from_pretrained(
            model, config=config, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{model} cannot be loaded as a pre-trained model: {error}") from error
    try:
        find_ffns(network)
    except ValueError as error:
        raise UserError(f"{model} cannot become a MoE: {error}") from error
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"max_length is {max_length}, but {model} has {config.max_position_embeddings} positions"
        )
    return tokenizer, network


def _prepare_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make `folder`, empty unless it was begun with the same settings."""
    record = folder / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True, default=str)
    if record.is_file() and record.read_text() == text:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record.write_text(text)


def _model_state(model: str | Path) -> list[Any]:
    """Tell a folder from the same folder with other weights."""
    files = sorted(Path(model).glob("*.*")) if Path(model).is_dir() else []
    return [str(model), [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def _data_state(data: TaskData) -> str:
    digest = hashlib.sha256(repr(data.task).encode())
    for rows in (data.train, data.validation):
        for batch in rows.iter(batch_size=1000):
            digest.update(repr(batch).encode())
    return digest.hexdigest()
