"""`compress` from text without labels, for a teacher of any head: what the student says is held against it.

Stages, output folder and results.json are those of `pipeline.compress`, with importance from the teacher's
own predictions. Quality is measured on held-out texts, against what the teacher says of them: "agreement",
the share of texts (or tokens, or answers) of which both say the same, all classes of a text if it has any
number of them, or of numbers their correlation, "pearson"; and "divergence", as `divergence.divergence` has
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from moebert_kernels.compress.evaluate import batches, predict
from moebert_kernels.compress.importance import Importance, compute_importance
from moebert_kernels.compress.losses import prediction_loss
from moebert_kernels.compress.pipeline import Run, checked, results_of
from moebert_kernels.compress.settings import CompressSettings
from moebert_kernels.compress.stages import Progress
from moebert_kernels.compress.tasks import EncodedData, EncodedRows, TaskData, kind_of_model, tokenize
from moebert_kernels.compress.tasks.task import Outputs
from moebert_kernels.compress.teacher_loss import prediction_shift_loss


def compress_texts(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: str | Path,
    output_dir: str | Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compress a fine-tuned encoder into a MoE without labels; see `pipeline.compress`.

    Args:
        settings: what to make.
        data: as `load_texts` returns it.
        teacher_dir: of a model with any head that `load_model` knows, and its tokenizer.
        output_dir: as for `pipeline.compress`, as are the others.
        progress: too.
        say: too.

    Returns:
        The content of results.json.

    Raises:
        UserError: as `pipeline.compress`.
    """
    settings, data, teacher, tokenizer = checked(settings, data, Path(teacher_dir))
    metrics = ("pearson" if kind_of_model(teacher.config) == "regression" else "agreement", "divergence")
    data = replace(data, task=replace(data.task, metric_names=metrics, main_metric=metrics[0]))
    return results_of(
        _TextRun(settings, data, teacher, tokenizer, Path(teacher_dir), Path(output_dir), progress, say)
    )


class _TextRun(Run):
    """A run whose teacher is all that is known of the task."""

    @cached_property
    def data(self) -> EncodedData:
        """The texts as token ids; the held-out ones are scored against the teacher's predictions."""
        assert self.settings.max_length is not None  # resolved
        encoded = tokenize(self.raw, self.tokenizer, self.settings.max_length)

        @cache
        def theirs() -> list[np.ndarray]:
            return predict(self.teacher, encoded.validation, self.tokenizer)

        kind = kind_of_model(self.teacher.config)
        rows = EncodedRows(encoded.validation, lambda ours: likeness(kind, ours, theirs()))
        return replace(encoded, validation_sets={"": rows})

    def scores(self, rows: Dataset, group_V: Tensor | None, progress: Callable[[int], None]) -> Importance:
        """Score neurons by how far predictions move without them."""
        return compute_importance(
            self.teacher,
            batches(rows, self.tokenizer, device=self.device),
            loss=prediction_shift_loss(self.teacher.config, seed=self.settings.seed),
            task=self.raw.task.name,
            model_name=self.teacher_dir.resolve().name,
            group_V=group_V,
            progress=progress,
        )


def likeness(kind: str, ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """How alike two models' outputs on the same texts are.

    Args:
        kind: one of `losses.PREDICTION_KINDS`.
        ours: row by row, as `predict` returns them.
        theirs: too.

    Returns:
        "agreement", or of regression "pearson", 0 where all numbers are equal; and "divergence".
    """
    if kind == "question_answering":
        same = [np.array_equal(a.argmax(0), b.argmax(0)) for a, b in zip(ours, theirs, strict=True)]
        losses = [
            prediction_loss(kind, _start_and_end(a), _start_and_end(b))
            for a, b in zip(ours, theirs, strict=True)
        ]
        return {"agreement": float(np.mean(same)), "divergence": float(torch.stack(losses).mean())}
    join = np.concatenate if kind == "token_classification" else np.stack
    a_NC, b_NC = join(list(ours)), join(list(theirs))
    # Of tokens, one after the other, each is a row by itself.
    alike = "classification" if kind == "token_classification" else kind
    divergence = float(prediction_loss(alike, torch.from_numpy(a_NC), torch.from_numpy(b_NC)))
    if kind == "regression":
        return {"pearson": _pearson(a_NC.ravel(), b_NC.ravel()), "divergence": divergence}
    if kind == "multi_label_classification":
        same_N = ((a_NC > 0) == (b_NC > 0)).all(1)
    else:
        same_N = a_NC.argmax(1) == b_NC.argmax(1)
    return {"agreement": float(same_N.mean()), "divergence": divergence}


def _start_and_end(logits_S2: np.ndarray) -> tuple[Tensor, Tensor]:
    start_S, end_S = torch.from_numpy(logits_S2).unbind(1)
    return start_S.unsqueeze(0), end_S.unsqueeze(0)


def _pearson(ours: np.ndarray, theirs: np.ndarray) -> float:
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    return float(np.corrcoef(ours, theirs)[0, 1])
