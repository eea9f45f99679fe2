"""The stages of `compress` one at a time, from files to files, for those who want to look in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress import processes
from moebert_kernels.compress.adapt import COUNTING_ROUTINGS, adapt, random_scores, token_counts
from moebert_kernels.compress.artifacts import (
    check_workroom,
    fingerprint,
    model_fingerprint,
    rows_fingerprint,
    workroom,
)
from moebert_kernels.compress.batching import hold_out, sample_rows
from moebert_kernels.compress.distill import Distilled, DistillSettings, distill
from moebert_kernels.compress.evaluate import batches, evaluate
from moebert_kernels.compress.fitting import fit_experts, rows_to_fit
from moebert_kernels.compress.importance import Importance, LossFunction, compute_importance
from moebert_kernels.compress.loading import (
    check_new_folder,
    compared_with_training,
    default_device,
    load_model,
    load_teacher,
    row_length,
    save_encoder,
)
from moebert_kernels.compress.precision import computing
from moebert_kernels.compress.settings import CompressSettings, resolve
from moebert_kernels.compress.stages import Progress
from moebert_kernels.compress.tasks import KINDS, EncodedData, TaskData, match_labels, texts, tokenize
from moebert_kernels.compress.teacher_loss import prediction_shift_loss
from moebert_kernels.compress.token_scores import token_groups
from moebert_kernels.compress.writing import check_writable
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
        data: raw rows. Without labels, by the teacher's own predictions: see `prediction_shift_loss`.
        teacher_dir: of the fine-tuned model.
        output: safetensors file to write.
        per_token: take token scores too, which "hash-affinity" needs.
        progress: hears (stage, rows done, rows in all).

    Raises:
        UserError: teacher, data and settings do not fit, or `output` is something else.
    """
    check_scores_file(output)
    with naming("teacher_dir"):
        teacher, tokenizer = load_teacher(teacher_dir)
    loss: str | LossFunction = "labels"
    if data.task.kind == texts.KIND:
        loss = prediction_shift_loss(teacher.config, seed=settings.seed)
    encoded = _encode(match_labels(data, teacher.config), teacher, tokenizer, settings.max_length)
    rows = sample_rows(encoded.train, settings.importance_rows, settings.seed)
    group_V = token_groups(teacher, token_counts(rows, teacher.config.vocab_size)) if per_token else None
    _place(teacher)
    processes.on_main(lambda: check_writable(output.parent))
    with computing(settings.bf16):
        importance = compute_importance(
            teacher,
            batches(rows, tokenizer, device=default_device()),
            loss=loss,
            task=data.task.name,
            model_name=teacher_dir.resolve().name,
            group_V=group_V,
            progress=lambda done: progress("importance", done, len(rows)),
        )
    processes.on_main(lambda: importance.save(output))
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
    """Make the MoE of a teacher and save it with the teacher's tokenizer; see `adapt` and `fit_experts`.

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
    with naming("teacher_dir"):
        teacher, tokenizer = load_teacher(teacher_dir)
    ffns = find_ffns(teacher)
    scores: Importance | torch.Tensor
    if importance is None:
        scores = random_scores(len(ffns), ffns[0].w1.out_features, seed=settings.seed)
    else:
        with naming("importance"):
            scores = Importance.load(importance)
    if settings.routing == "hash-affinity":
        _check_token_scores(scores, importance)
    counts_V = rows = None
    if data is not None:
        rows = _encode(data, teacher, tokenizer, settings.max_length).train
    if settings.routing in COUNTING_ROUTINGS:
        if rows is None:
            raise UserError(
                f"{settings.routing} counts the tokens of the training rows: name the task and its data"
            )
        counts_V = token_counts(rows, teacher.config.vocab_size)
    student = adapt(
        teacher,
        scores,
        num_experts=settings.num_experts,
        expert_size=settings.expert_size,
        num_shared=settings.num_shared,
        tie_shared=settings.tie_shared,
        routing=settings.routing,
        top_k=settings.top_k,
        seed=settings.seed,
        token_counts_V=counts_V,
        progress=lambda done, total: progress("adapt", done, total),
    )
    if settings.fit and rows is not None:
        _fit(settings, student, teacher, tokenizer, rows, progress, say)
    save_encoder(student, tokenizer, output_dir)
    return student


def _fit(
    settings: CompressSettings,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    progress: Progress,
    say: Callable[[str], None] | None,
) -> None:
    _place(student)
    _place(teacher)
    rows, _ = hold_out(rows, settings.seed)
    rows = rows_to_fit(rows, settings.fit_rows, settings.seed, teacher.config.hidden_size)
    with computing(settings.bf16):
        found = fit_experts(
            student,
            teacher,
            list(batches(rows, tokenizer)),
            progress=lambda done, total: progress("fit", done, total),
        )
    if say is not None:
        say(found.told(len(rows)))


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
        processes.on_main(lambda: check_workroom(output_dir))
    processes.rows_each(settings.batch_size)  # refuses what does not divide
    with naming("teacher_dir"):
        teacher, tokenizer = load_teacher(teacher_dir)
    with naming("student_dir"):
        student = load_model(student_dir)[0]
        if not is_moe(student.config):
            raise UserError(
                f"the model in {student_dir} has no experts: make a MoE of it with `moebert adapt`"
            )
    length = KINDS[data.task.kind].default_length
    settings = resolve(settings, teacher, tokenizer, num_rows=len(data.train), default_length=length)
    data = compared_with_training(teacher_dir, data)
    assert settings.max_length is not None
    how = DistillSettings.of(
        settings,
        seed=settings.seed,
        is_fitted=student.config.is_fitted,
        hidden_size=student.config.hidden_size,
    )
    data = match_labels(data, teacher.config)
    made_from = fingerprint(
        model_fingerprint(student_dir),
        model_fingerprint(teacher_dir),
        rows_fingerprint(data.train),
        data.task.answers and data.task.answers.doc_stride,
        settings.max_length,
        asdict(how),
    )
    rows, held_out = tokenize(data, tokenizer, settings.max_length).train, None
    if student.config.is_fitted:
        rows, held_out = hold_out(rows, settings.seed)
    _place(student)
    _place(teacher)
    with workroom(output_dir, made_from) as room:
        try:
            found = distill(
                student,
                teacher,
                rows,
                tokenizer,
                how,
                room,
                held_out=held_out,
                progress=lambda done, total: progress("distill", done, total),
                say=say,
            )
        except ValueError as error:
            raise UserError(f"{student_dir} cannot be distilled from {teacher_dir}: {error}") from error
        processes.on_main(lambda: save_encoder(student, tokenizer, output_dir))
    return found


def evaluate_model(
    model_dir: Path, data: TaskData, *, max_length: int | None = None, progress: Progress
) -> dict[str, float]:
    """Score a saved model, dense or MoE, on the validation rows by the task's official metrics.

    Args:
        model_dir: of the model and its tokenizer.
        data: raw rows.
        max_length: tokens a row is cut to; None as in `CompressSettings`.
        progress: hears (stage, rows done, rows in all).

    Raises:
        UserError: the folder holds no fine-tuned model, or one for another task.
    """
    with naming("model_dir"):
        model, tokenizer = load_model(model_dir)
    encoded = _encode(match_labels(data, model.config), model, tokenizer, max_length)
    _place(model)
    return evaluate(
        model,
        encoded,
        tokenizer,
        progress=lambda done, total: progress("evaluate", done, total),
    )


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


def _encode(
    data: TaskData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> EncodedData:
    default = KINDS[data.task.kind].default_length
    length = row_length(max_length, model.config, tokenizer, "max_length", default=default)
    return tokenize(data, tokenizer, length)


def _place(model: torch.nn.Module) -> None:
    model.to(default_device())
