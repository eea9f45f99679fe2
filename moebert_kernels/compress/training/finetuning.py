"""Fine-tuning: a pre-trained encoder becomes the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from moebert_kernels import __version__
from moebert_kernels.compress import defaults, distributed
from moebert_kernels.compress.data.batching import LengthGroupedTrainer, RowCollator, count_labels
from moebert_kernels.compress.data.tasks import KINDS, Task, TaskData, tokenize
from moebert_kernels.compress.evaluation.quality import evaluate
from moebert_kernels.compress.storage.artifacts import (
    check_workroom,
    fingerprint,
    model_fingerprint,
    rows_fingerprint,
    workroom,
)
from moebert_kernels.compress.storage.checkpoint import (
    TRANSFORMERS_ERRORS,
    cause_of,
    load_weights,
    read_config,
)
from moebert_kernels.compress.storage.loading import load_tokenizer, row_length, save_encoder
from moebert_kernels.compress.storage.writing import writing
from moebert_kernels.compress.training.arguments import MAX_SEED, OneDevice, check_learning_rate
from moebert_kernels.compress.training.precision import check_bf16
from moebert_kernels.errors import ArgumentError, UserError, naming
from moebert_kernels.models.surgery import find_ffns


def finetune(
    model: str | Path,
    data: TaskData,
    output_dir: str | Path,
    *,
    epochs: float = defaults.FINETUNE_EPOCHS,
    lr: float = defaults.FINETUNE_LEARNING_RATE,
    batch_size: int = defaults.BATCH_SIZE,
    max_length: int | None = None,
    weight_decay: float = defaults.FINETUNE_WEIGHT_DECAY,
    bf16: bool = False,
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
        batch_size: rows of a step, over all processes.
        max_length: tokens of a row; by default 128, or 384 for question answering, or as many as the model
            takes if those are fewer.
        weight_decay: of AdamW.
        bf16: compute matrix products in bfloat16, by autocast; weights stay float32.
        seed: of the new head, the order of rows and dropout.
        training_arguments: more arguments of `transformers.TrainingArguments`.
        callbacks: for the Trainer.

    Returns:
        The task's metrics on the validation rows; see `evaluate`.

    Raises:
        UserError: no such model, or one that cannot be compressed later; arguments out of range;
            `output_dir` exists, or `<output_dir>.unfinished` holds what no run has made; the processes cannot
            share the rows of a step evenly.
        OutputError: a checkpoint or the model cannot be written.
    """
    output_dir = Path(output_dir)
    with naming("output_dir"):
        if distributed.on_main(output_dir.exists):
            raise UserError(f"{output_dir} exists already; delete it or choose another folder")
        distributed.on_main(lambda: check_workroom(output_dir))
    check_learning_rate("lr", lr)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not 0 < value < float("inf"):
            raise ArgumentError(name, f"must be more than 0, got {value}")
    if not 0 <= weight_decay < float("inf"):
        raise ArgumentError("weight_decay", f"must not be negative, got {weight_decay}")
    check_bf16(bf16)
    if not 0 <= seed <= MAX_SEED:
        raise ArgumentError("seed", f"must be 0 to {MAX_SEED}, got {seed}")
    distributed.rows_each(batch_size)  # refuses what does not divide
    set_seed(seed)
    with naming("model"):
        network = _load(str(model), data.task)
        tokenizer = load_tokenizer(model, network.config)
    default = KINDS[data.task.kind].default_length
    max_length = row_length(max_length, network.config, tokenizer, "max_length", default=default)
    tokenized = tokenize(data, tokenizer, max_length)
    fixed = {
        "num_train_epochs": epochs,
        "learning_rate": lr,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 2 * batch_size,
        "weight_decay": weight_decay,
        "bf16": bf16,
        "warmup_steps": 0.1,
        "seed": seed,
        "save_steps": 0.1,
        "save_total_limit": 1,
        "logging_steps": 0.02,
        "report_to": "none",
        **(training_arguments or {}),
    }
    folder = Path(model)
    answers = data.task.answers
    made_from = fingerprint(
        __version__,
        model_fingerprint(folder) if folder.is_dir() else str(model),
        [data.task.label_names, rows_fingerprint(data.train), answers and answers.doc_stride, max_length],
        {name: str(value) for name, value in fixed.items()},
    )
    with workroom(output_dir, made_from) as room:
        device = {"use_cpu": not torch.cuda.is_available()}
        arguments = OneDevice(output_dir=str(room), **{**device, **fixed, **_shared(fixed)})
        trainer = _FinetuningTrainer(
            network,
            arguments,
            data_collator=RowCollator(tokenizer),
            train_dataset=tokenized.train,
            eval_dataset=tokenized.validation,
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # the Trainer's stand-in for a bar that was switched off
        with writing(room):
            trainer.train(resume_from_checkpoint=last_checkpoint(room))
        distributed.barrier()  # the others may still be writing their part of the last checkpoint

        def finish() -> dict[str, float]:
            found = evaluate(network, tokenized, tokenizer, batch_size=2 * batch_size)
            save_encoder(network, tokenizer, output_dir, trained_on=data)
            return found

        return distributed.on_main(finish)


class _FinetuningTrainer(LengthGroupedTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the items of all processes, as it would be in one.

        transformers multiplies by the number of processes, for models that divide by `num_items_in_batch`;
        many heads do not.
        """
        if self.args.world_size == 1 or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        here = count_labels(inputs)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # The gradients of the processes are averaged: their shares must add up to the number of them.
        share = here * self.args.world_size / self.accelerator.reduce(here, "sum").clamp(min=1)
        loss = torch.where(here > 0, loss, 0) * share
        return (loss, outputs) if return_outputs else loss


def _shared(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of each of several processes that are not those of one process alone."""
    if distributed.world_size() == 1:
        return {}
    distributed.init_process_group()
    rows_each = distributed.rows_each(arguments["per_device_train_batch_size"])
    return {"per_device_train_batch_size": rows_each}


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


def _load(model: str, task: Task) -> PreTrainedModel:
    kind = KINDS[task.kind]
    head = kind.head_config(task)
    folder = Path(model)
    if folder.exists() or model.startswith((".", "/", "~")):  # otherwise a name on the hub
        network = load_weights(folder, read_config(folder, **head), kind.auto_model, new_head=True)
    else:
        network = _from_hub(model, head, kind.auto_model)
    try:
        find_ffns(network)
    except ValueError as error:
        raise UserError(f"{model} cannot become a MoE: {error}") from None
    return network


def _from_hub(name: str, head: Mapping[str, Any], auto_model: Any) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **head)
        # A head for another number of labels is replaced by a new one.
        return auto_model.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, use_safetensors=True, trust_remote_code=False
        )
    except TRANSFORMERS_ERRORS as error:
        raise UserError(
            f"there is no folder {name}, and no model of that name can be had from the hub: {cause_of(error)}"
        ) from None
