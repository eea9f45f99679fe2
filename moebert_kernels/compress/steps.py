"""The stages of `compress` one at a time, from files to files, for those who want to look in between."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moebert_kernels.compress.adapt import adapt, random_scores, token_counts
from moebert_kernels.compress.artifacts import (
    exclusive,
    fingerprint,
    model_fingerprint,
    rows_fingerprint,
)
from moebert_kernels.compress.distill import DistillSettings, distill
from moebert_kernels.compress.evaluate import batches, evaluate
from moebert_kernels.compress.importance import Importance, compute_importance
from moebert_kernels.compress.pipeline import Progress
from moebert_kernels.compress.settings import CompressSettings, load_teacher, resolve
from moebert_kernels.compress.tasks import TaskData, match_labels, tokenize
from moebert_kernels.errors import UserError
from moebert_kernels.models import find_ffns, is_moe


def score_teacher(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: Path,
    output: Path,
    *,
    progress: Progress,
) -> Importance:
    """Take importance on training rows and save it; see `compute_importance`.

    Args:
        settings: `importance_rows`, `max_length` and `seed` are read.
        data: raw rows.
        teacher_dir: of the fine-tuned model.
        output: safetensors file to write.
        progress: hears (stage, rows done, rows in all).

    Raises:
        UserError: teacher, data and settings do not fit.
    """
    teacher, tokenizer = load_teacher(teacher_dir)
    data = tokenize(match_labels(data, teacher.config), tokenizer, settings.max_length)
    count = min(settings.importance_rows or len(data.train), len(data.train))
    order = np.random.default_rng(settings.seed).permutation(len(data.train))
    rows = data.train.select(np.sort(order[:count]))
    _place(teacher)
    importance = compute_importance(
        teacher,
        batches(rows, tokenizer, device=_device()),
        task=data.task.name,
        model_name=teacher_dir.resolve().name,
        progress=lambda done: progress("importance", done, count),
    )
    importance.save(output)
    return importance


def split_teacher(
    settings: CompressSettings,
    teacher_dir: Path,
    importance: Path | None,
    output_dir: Path,
    *,
    data: TaskData | None = None,
) -> PreTrainedModel:
    """Make the MoE of a teacher and save it with the teacher's tokenizer; see `adapt`.

    Args:
        settings: the experts'.
        teacher_dir: of the fine-tuned model.
        importance: the scores' file; None for a split at random.
        output_dir: of the new model; must not hold another.
        data: raw rows whose tokens "hash-balance" counts; other routings need none.

    Raises:
        UserError: sizes, scores and teacher do not fit, or data is missing.
    """
    _check_no_model(output_dir)
    teacher, tokenizer = load_teacher(teacher_dir)
    ffns = find_ffns(teacher)
    scores: Importance | torch.Tensor
    if importance is None:
        scores = random_scores(len(ffns), ffns[0].w1.out_features, seed=settings.seed)
    else:
        scores = Importance.load(importance)
    counts_V = None
    if settings.routing == "hash-balance":
        if data is None:
            raise UserError("hash-balance counts the tokens of the training rows: name the task and its data")
        rows = tokenize(data, tokenizer, settings.max_length).train
        counts_V = token_counts(rows, teacher.config.vocab_size)
    student = adapt(
        teacher,
        scores,
        num_experts=settings.num_experts,
        expert_size=settings.expert_size,
        num_shared=settings.num_shared,
        routing=settings.routing,
        top_k=settings.top_k,
        seed=settings.seed,
        token_counts_V=counts_V,
    )
    _save(student, tokenizer, output_dir)
    return student


def distill_student(
    settings: CompressSettings,
    data: TaskData,
    student_dir: Path,
    teacher_dir: Path,
    output_dir: Path,
    *,
    progress: Progress,
) -> list[dict[str, float]]:
    """Distil a saved MoE from its teacher and save the result; see `distill`.

    Interrupted and called again with the same arguments, it goes on from its last checkpoint.

    Args:
        settings: those of training.
        data: raw rows.
        student_dir: of the MoE, left as it is.
        teacher_dir: of the model it was made of.
        output_dir: of the distilled model; must not hold another.
        progress: hears (stage, steps done, steps in all).

    Returns:
        The loss curves.

    Raises:
        UserError: the folders' models do not fit each other or the data, or training diverged.
    """
    _check_no_model(output_dir)
    teacher, tokenizer = load_teacher(teacher_dir)
    student = _load(student_dir)[0]
    if not is_moe(student.config):
        raise UserError(f"the model in {student_dir} has no experts: make a MoE of it with `moebert adapt`")
    settings = replace(settings, measure_length=settings.max_length)  # nothing is measured here
    settings = resolve(settings, teacher, tokenizer, len(data.train))
    assert settings.learning_rate is not None
    how = DistillSettings(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        distill_weight=settings.distill_weight,
        batch_size=settings.batch_size,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
    )
    data = match_labels(data, teacher.config)
    made_from = fingerprint(
        model_fingerprint(student_dir),
        model_fingerprint(teacher_dir),
        rows_fingerprint(data.train),
        settings.max_length,
        asdict(how),
    )
    rows = tokenize(data, tokenizer, settings.max_length).train
    with exclusive(output_dir):
        checkpoints = output_dir / f"checkpoints-{made_from[:16]}"
        _place(student)
        _place(teacher)
        try:
            log = distill(
                student,
                teacher,
                rows,
                tokenizer,
                how,
                checkpoints,
                progress=lambda done, total: progress("distill", done, total),
            )
        except ValueError as error:
            raise UserError(f"{student_dir} cannot be distilled from {teacher_dir}: {error}") from error
        _save(student, tokenizer, output_dir)
        for folder in output_dir.glob("checkpoints-*"):
            shutil.rmtree(folder)
    return log


def evaluate_model(
    model_dir: Path, data: TaskData, *, max_length: int = 128, progress: Progress
) -> dict[str, float]:
    """Score a saved model, dense or MoE, on the validation rows by the task's official metrics.

    Raises:
        UserError: the folder holds no classifier or regressor, or one for another task.
    """
    model, tokenizer = _load(model_dir)
    data = tokenize(match_labels(data, model.config), tokenizer, max_length)
    _place(model)
    return evaluate(
        model,
        data,
        tokenizer,
        progress=lambda done, total: progress("evaluate", done, total),
    )


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _place(model: torch.nn.Module) -> None:
    model.to(_device())


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: give the folder of a saved transformers model")
    try:
        architectures = AutoConfig.from_pretrained(folder).architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in architectures):
            raise UserError(
                f"the model in {folder} has no classification head: it is {architectures or 'bare'}"
            )
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the model in {folder}: {error}") from None


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _check_no_model(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        raise UserError(f"{folder} already holds a model; give another output folder")
