"""The stages of `compress` one at a time, from files to files, for those who want to look in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from moebert_kernels.compress import distributed
from moebert_kernels.compress.data import sentences
from moebert_kernels.compress.data.batching import hold_out
from moebert_kernels.compress.data.tasks import TaskData
from moebert_kernels.compress.evaluation.quality import evaluate
from moebert_kernels.compress.experts.adaptation import COUNTING_ROUTINGS, random_scores
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.runs.stages import Progress
from moebert_kernels.compress.runs.subjects import Subject, model_alone, subject_of
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.storage.artifacts import (
    check_workroom,
    fingerprint,
    model_fingerprint,
    rows_fingerprint,
    workroom,
)
from moebert_kernels.compress.storage.loading import check_new_folder, place
from moebert_kernels.compress.storage.writing import check_writable
from moebert_kernels.compress.training.distillation import Distilled, distill
from moebert_kernels.errors import ArgumentError, UserError, naming
from moebert_kernels.models import find_ffns, is_moe


def score_teacher(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: Path,
    output: Path,
    *,
    per_token: bool = False,
    progress: Progress,
) -> Importance:
    """Take importance on training rows and save it; see `compute_importance`. Collective, as that is.

    Args:
        settings: `importance_rows`, `max_length`, `seed` and `bf16` are read.
        data: raw rows. Without labels, by the teacher's own predictions or embeddings: see `teacher_loss`.
        teacher_dir: of the fine-tuned model.
        output: safetensors file to write.
        per_token: take token scores too, which "hash-affinity" needs.
        progress: hears (stage, rows done, rows in all).

    Raises:
        UserError: teacher, data and settings do not fit, or `output` is something else.
    """
    check_scores_file(output)
    subject = _teacher(teacher_dir, data)
    rows = subject.encode(settings.max_length).train
    subject.place()
    distributed.on_main(lambda: check_writable(output.parent))
    importance = subject.importance(
        rows,
        settings,
        per_token=per_token,
        progress=lambda done, total: progress("importance", done, total),
    )
    distributed.on_main(lambda: importance.save(output))
    return importance


def split_teacher(
    settings: CompressSettings,
    teacher_dir: Path,
    importance: Path | None,
    output_dir: Path,
    *,
    data: TaskData | None = None,
    progress: Progress,
    say: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """Make the MoE of a teacher and save it with the teacher's tokenizer; see `adapt` and `fit`.

    Args:
        settings: the experts'; whether, and to how many rows, they are fitted.
        teacher_dir: of the fine-tuned model.
        importance: the scores' file; None for a split at random.
        output_dir: of the new model; a new or an empty folder.
        data: raw rows, which need no labels: to fit to, but for some that are held out (see `hold_out`), and
            whose tokens are counted for `COUNTING_ROUTINGS`; otherwise none are needed.
        progress: hears (stage, done, total): layers of "hash-affinity", batches of the fit.
        say: hears in a sentence what the fit has brought.

    Raises:
        UserError: sizes, scores and teacher do not fit, or data is missing.
    """
    with naming("output_dir"):
        check_new_folder(output_dir)
    if settings.fit and data is None:
        raise ArgumentError(
            "data", "must be given: experts are fitted to rows of text, which need no labels; or do not fit"
        )
    if settings.routing in COUNTING_ROUTINGS and data is None:
        raise UserError(
            f"{settings.routing} counts the tokens of the training rows: name the task and its data"
        )
    subject = _teacher(teacher_dir, data)
    scores: Importance | torch.Tensor
    if importance is None:
        ffns = find_ffns(subject.model)
        scores = random_scores(len(ffns), ffns[0].w1.out_features, seed=settings.seed)
    else:
        with naming("importance"):
            scores = Importance.load(importance)
    if settings.routing == "hash-affinity":
        _check_token_scores(scores, importance)
    rows = None if data is None else subject.encode(settings.max_length).train
    student = subject.cut(scores, settings, rows, progress=lambda done, total: progress("adapt", done, total))
    if settings.fit and rows is not None:
        subject.place()
        place(student)
        rows, _ = hold_out(rows, settings.seed)
        found, num_rows = subject.fit(
            student, rows, settings, progress=lambda done, total: progress("fit", done, total)
        )
        if say is not None:
            say(found.told(num_rows))
    subject.save(student, output_dir)
    return student


def distill_student(
    settings: CompressSettings,
    data: TaskData,
    student_dir: Path,
    teacher_dir: Path,
    output_dir: Path,
    *,
    progress: Progress,
    say: Callable[[str], None] | None = None,
) -> Distilled:
    """Distil a saved MoE from its teacher and save the result; see `distill`. Collective, as that is.

    If the MoE is fitted, some rows are held out of training: those that `split_teacher` held out of the fit,
    given the same data and seed. What is saved is never farther from the teacher on them than that MoE.

    Interrupted and called again with the same arguments, it goes on from its last checkpoint.

    Args:
        settings: those of training; None is filled in by whether the MoE is fitted.
        data: raw rows.
        student_dir: of the MoE, left as it is.
        teacher_dir: of the model it was made of.
        output_dir: of the distilled model; a new or an empty folder.
        progress: hears (stage, steps done, steps in all).
        say: hears sentences, as in `distill`.

    Raises:
        UserError: the folders' models do not fit each other or the data, or training diverged.
    """
    with naming("output_dir"):
        check_new_folder(output_dir)
        distributed.on_main(lambda: check_workroom(output_dir))
    distributed.rows_each(settings.batch_size)  # refuses what does not divide
    subject = _teacher(teacher_dir, data)
    with naming("student_dir"):
        student = subject.load(student_dir)
        if not is_moe(student.config):
            raise UserError(
                f"the model in {student_dir} has no experts: make a MoE of it with `moebert adapt`"
            )
    is_fitted = student.config.is_fitted
    how = settings.training(seed=settings.seed, is_fitted=is_fitted, hidden_size=student.config.hidden_size)
    answers = subject.data.task.answers
    made_from = fingerprint(
        model_fingerprint(student_dir),
        subject.fingerprint(),
        rows_fingerprint(subject.data.train),
        answers and answers.doc_stride,
        subject.row_length(settings.max_length),
        asdict(how),
    )
    rows, held_out = subject.encode(settings.max_length).train, None
    if is_fitted:
        rows, held_out = hold_out(rows, settings.seed)
    subject.place()
    with workroom(output_dir, made_from) as room:
        try:
            found = distill(
                student,
                subject.model,
                rows,
                subject.tokenizer,
                how,
                room,
                held_out=held_out,
                pooling=subject.pooling,
                progress=lambda done, total: progress("distill", done, total),
                say=say,
            )
        except ValueError as error:
            raise UserError(f"{student_dir} cannot be distilled from {teacher_dir}: {error}") from error
        distributed.on_main(lambda: subject.save(student, output_dir))
    return found


def evaluate_model(
    model_dir: Path,
    data: TaskData,
    *,
    teacher_dir: Path | None = None,
    max_length: int | None = None,
    progress: Progress,
) -> dict[str, float]:
    """Score a saved model, dense or MoE, on the validation rows.

    Args:
        model_dir: of the model and its tokenizer.
        data: raw rows. With labels the model is scored by the task's official metrics; without, against a
            teacher, and a model that embeds sentences by scored pairs of them too: see `subjects`.
        teacher_dir: of the teacher; for rows without labels alone.
        max_length: tokens a row is cut to; None as in `CompressSettings`.
        progress: hears (stage, rows done, rows in all).

    Raises:
        UserError: the folder holds no fine-tuned model, or one for another task, or there is nothing to
            score it by.
    """
    has_pairs = sentences.PAIRS in data.further_validation
    if teacher_dir is not None and data.has_labels:
        raise ArgumentError("teacher_dir", f"must not be given where rows have labels, as {data.task.name}'s")
    if teacher_dir is None and not (data.has_labels or has_pairs):
        raise ArgumentError(
            "teacher_dir",
            "must be given: rows without labels are scored against a teacher; for labelled rows, name a task",
        )
    with naming("model_dir" if teacher_dir is None else "teacher_dir"):
        subject = subject_of(teacher_dir or model_dir, data)
    encoded = subject.encode(max_length)
    if teacher_dir is None:
        model = subject.model
        if has_pairs:
            pairs = {sentences.PAIRS: encoded.validation_sets[sentences.PAIRS]}
            encoded = replace(encoded, validation_sets=pairs)
        subject.place()
    else:
        subject.place()
        with naming("model_dir"):
            model = subject.load(model_dir)
    return evaluate(
        model,
        encoded,
        subject.tokenizer,
        pooling=subject.pooling,
        progress=lambda done, total: progress("evaluate", done, total),
    )


def _teacher(folder: Path, data: TaskData | None) -> Subject:
    with naming("teacher_dir"):
        subject = model_alone(folder) if data is None else subject_of(folder, data)
        subject.check_can_be_cut()
    return subject


def check_scores_file(output: Path) -> None:
    """Raise a UserError unless `output` may be written: a .safetensors that is not there or holds scores."""
    with naming("output"):
        if output.suffix != ".safetensors":
            raise UserError(f"{output} must be named .safetensors")
        if output.exists():
            try:
                Importance.load(output)
            except UserError:
                raise UserError(
                    f"{output} exists and does not hold importance scores; give another output"
                ) from None


def _check_token_scores(scores: Importance | torch.Tensor, path: Path | None) -> None:
    if path is None or isinstance(scores, torch.Tensor):
        raise ArgumentError(
            "routing", "must not be hash-affinity in a split at random: that chooses experts by importance"
        )
    if scores.tokens is None:
        with naming("importance"):
            raise UserError(
                f"{path} has no scores of tokens, which hash-affinity needs: score the teacher again with "
                "`moebert importance --per-token`"
            )
