"""Distillation: the student learns from labels and from every layer of its frozen teacher, at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from moebert_kernels.compress import defaults, distributed
from moebert_kernels.compress.data.batching import LABEL_COLUMNS, LengthGroupedTrainer, RowCollator
from moebert_kernels.compress.data.predictions import Pooling
from moebert_kernels.compress.experts.layerwise import forward_replaced
from moebert_kernels.compress.storage.writing import writing
from moebert_kernels.compress.training.arguments import OneDevice
from moebert_kernels.compress.training.divergence import divergence
from moebert_kernels.compress.training.finetuning import last_checkpoint
from moebert_kernels.compress.training.load import SayLoad
from moebert_kernels.compress.training.nearest import KeepNearest, Nearest
from moebert_kernels.compress.training.precision import check_bf16
from moebert_kernels.compress.training.progress import ReportSteps
from moebert_kernels.compress.training.trainer import DistillationTrainer
from moebert_kernels.errors import UserError
from moebert_kernels.layer import MoEFFN


@dataclass(frozen=True)
class DistillSettings:
    """How to distil.

    Attributes:
        epochs: passes over the training rows; may be a fraction.
        learning_rate: the highest; it falls linearly to 0.
        distill_weight: lambda.
        batch_size: rows of a step, over all processes.
        weight_decay: of AdamW; biases and LayerNorms are exempt.
        seed: of data order and dropout.
        bf16: compute matrix products in bfloat16, by autocast; weights stay float32.
        warmup: share of the steps in which the learning rate rises from 0.
        dropout: whether the student's dropout is on.
        labels: whether labels are learned from, where rows have them.
    """

    epochs: float = defaults.EPOCHS
    learning_rate: float = 3e-5
    distill_weight: float = defaults.DISTILL_WEIGHT
    batch_size: int = defaults.BATCH_SIZE
    weight_decay: float = defaults.WEIGHT_DECAY
    seed: int = 0
    bf16: bool = False
    warmup: float = defaults.WARMUP
    dropout: bool = True
    labels: bool = True


class Distilled(NamedTuple):
    """What is known of a distillation beside the student.

    Attributes:
        losses: the curves: at each logged step "step", "ce", "layer", "prediction" (or "layer", "embedding"),
            with learned gates "balance", and "total", averaged since the log before.
        load_NLE: for each of the N epochs, the share of a layer's real tokens that each expert got; empty
            for a student without experts.
        nearest: of held-out rows; None if there were none.
    """

    losses: list[dict[str, float]]
    load_NLE: list[list[list[float]]]
    nearest: Nearest | None = None


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: DistillSettings,
    checkpoints: Path,
    *,
    held_out: Dataset | None = None,
    layer_map: Sequence[int] | None = None,
    pooling: Pooling | None = None,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Distilled:
    """Distil in place, on one device per process; go on from the last checkpoint if there is one.

    An interrupted run that is called again ends with the same weights and returns the same as an undisturbed
    one, unless it goes on in another number of processes: steps take the same rows then, but dropout is
    drawn otherwise and sums are added up in another order. Among several processes this is collective.

    Args:
        student: as it was at the start of the run, also when resuming.
        teacher: as for `DistillationTrainer`.
        rows: tokenised training rows.
        tokenizer: pads, and is saved with each checkpoint.
        settings: the same when resuming.
        checkpoints: folder for this run's checkpoints and nothing else.
        held_out: tokenised rows, not among `rows`; their labels are not read. The student is, in the end,
            what it was when its predictions of them were nearest to the teacher's (see `divergence`): after
            one of the epochs, or as it began. Without them it is what it is after the last step.
        layer_map: as for `DistillationTrainer`.
        pooling: as for `DistillationTrainer`.
        progress: called with (steps done, steps in all), at the start and after each step.
        say: hears in a sentence that training goes on from a checkpoint and, at the end of each epoch, how
            full the fullest expert was, and which weights were kept; in the main process alone.
        callbacks: of the Trainer.

    Raises:
        UserError: the loss became infinite or NaN, or the processes cannot share the rows of a step evenly,
            or the GPU computes no bfloat16.
        OutputError: a checkpoint cannot be written.
    """
    check_bf16(settings.bf16)
    if not settings.labels:
        rows = rows.remove_columns([name for name in LABEL_COLUMNS if name in rows.column_names])
    rows_each = distributed.rows_each(settings.batch_size)
    distributed.init_process_group()
    say = say if distributed.is_main() else None
    on_cuda = torch.cuda.is_available()
    steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
    logging_steps = min(max(math.ceil(settings.epochs * steps_per_epoch / 50), 1), 100)
    arguments = OneDevice(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=rows_each,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        seed=settings.seed,
        bf16=settings.bf16,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,  # it waits for the device each step, and hides what we report
        save_steps=5 * logging_steps,  # a multiple: a resumed run's logs average over the same steps
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not on_cuda,
        dataloader_pin_memory=on_cuda,
    )
    trainer = _LengthGroupedDistillationTrainer(
        student,
        teacher,
        args=arguments,
        distill_weight=settings.distill_weight,
        layer_map=layer_map,
        pooling=pooling,
        train_dataset=rows,
        data_collator=RowCollator(tokenizer),
        processing_class=tokenizer,
        callbacks=[
            *callbacks,
            _NoLastCheckpoint(),
            _StopWhenDiverged(),
            ReportSteps(progress, say),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if say is not None and trainer.load is not None:
        trainer.add_callback(SayLoad(trainer.load, say))
    keep = None
    if held_out is not None:

        def distance() -> float:
            # As the student will be used: without the autocast it is trained in.
            with forward_replaced(student, partial(type(student).forward, student)):
                return divergence(student, teacher, held_out, tokenizer, pooling=pooling)

        keep = KeepNearest(student, checkpoints / "nearest.safetensors", distance, steps_per_epoch)
        trainer.add_callback(keep)
    with writing(checkpoints), nullcontext() if settings.dropout else without_dropout(student):
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    distributed.barrier()  # the others may still be writing their part of the last checkpoint
    nearest = None if keep is None else keep.restore(trainer.state)
    if nearest is not None and say is not None:
        say(nearest.told(settings.epochs))
    terms = ("ce", "layer", "prediction", "embedding", "balance")
    losses = [
        {"step": entry["step"], **{t: entry[t] for t in terms if t in entry}, "total": entry["loss"]}
        for entry in trainer.state.log_history
        if "layer" in entry
    ]
    return Distilled(losses, [] if trainer.load is None else trainer.load.shares(), nearest)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Let a model compute in training mode what it computes in evaluation mode."""
    kept: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "dropout" if isinstance(module, MoEFFN) else None
        if name is not None:
            kept.append((module, name, getattr(module, name)))
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, probability in kept:
            setattr(module, name, probability)


class _LengthGroupedDistillationTrainer(DistillationTrainer, LengthGroupedTrainer):
    """Both models compute less padding; order of rows by seed and epoch alone."""

    def _repeats_a_batch(self) -> bool:
        """A last batch of fewer rows than there are processes is taken whole by all; the main one counts."""
        rows, step = len(cast(Dataset, self.train_dataset)), self.args.world_size * self.args.train_batch_size
        left = rows - self.state.global_step % math.ceil(rows / step) * step
        return left < self.args.world_size and not distributed.is_main()


class _NoLastCheckpoint(TrainerCallback):
    """From a checkpoint at the end of a part of an epoch, a Trainer would go on with one step more."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_save = False


class _StopWhenDiverged(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise UserError(
                f"distillation diverged: the loss is {logs['loss']} at step {state.global_step} of "
                f"{state.max_steps}; use a lower learning rate than {args.learning_rate:g}"
            )
