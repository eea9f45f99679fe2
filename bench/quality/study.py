"""A study: for each task a teacher, once, and of it each contender with each seed, distilled alike."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.adapt import token_counts
from moebert_kernels.compress.artifacts import Stage, fingerprint
from moebert_kernels.compress.batching import sample_rows
from moebert_kernels.compress.distill import DistillSettings, distill
from moebert_kernels.compress.evaluate import batches, evaluate, expert_load
from moebert_kernels.compress.finetune import finetune
from moebert_kernels.compress.importance import Importance, compute_importance
from moebert_kernels.compress.loading import load_teacher
from moebert_kernels.compress.minilm import find_base_model
from moebert_kernels.compress.tasks import EncodedData, TaskData, load_task, match_labels, tokenize
from moebert_kernels.compress.token_scores import token_groups
from moebert_kernels.environment import describe_environment
from moebert_kernels.models import encoder_flops_per_token, is_moe

from .contenders import CONTENDERS, FewerLayers, Materials
from .remembered import RememberedTeacher

FOLDERS = {"sst2": "SST-2", "cola": "CoLA", "mrpc": "MRPC", "stsb": "STS-B"}


@dataclass(frozen=True)
class TeacherBudget:
    """How teachers are made, and what is found out about them.

    Attributes:
        epochs: of fine-tuning on all training rows.
        learning_rate: of fine-tuning.
        batch_size: of fine-tuning.
        max_length: tokens that rows are cut to, for students too.
        importance_rows: training rows that importance is taken on.
        bf16: compute matrix products in bfloat16, for students too.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    max_length: int
    importance_rows: int
    bf16: bool


@dataclass(frozen=True)
class StudentBudget:
    """What every contender gets.

    Attributes:
        train_rows: of a task at most, drawn once.
        epochs: of distillation on them.
        learning_rate: of distillation.
        distill_weight: lambda.
        batch_size: of distillation.
    """

    train_rows: int
    epochs: float
    learning_rate: float
    distill_weight: float
    batch_size: int


class Task:
    """A task's teacher and its importance; made when first asked for, or loaded.

    Args:
        name: of GLUE.
        data: folder of GLUE.
        model: folder of a pre-trained model; None for the demonstration's.
        budget: of the teacher.
        out: folder of everything that is made.
    """

    def __init__(self, name: str, data: Path, model: Path | None, budget: TeacherBudget, out: Path):
        self.name, self.budget, self.out = name, budget, out
        self.model = model or find_base_model()
        self.raw: TaskData = load_task(name, data / FOLDERS[name])
        self.made_from = [name, str(self.model), asdict(budget)]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(self) -> None:
        """Make the teacher and its scores, or load them."""
        budget, folder = self.budget, self.out / "teachers" / self.name

        def teach() -> dict[str, float]:
            shutil.rmtree(folder, ignore_errors=True)
            return finetune(
                self.model,
                self.raw,
                folder,
                epochs=budget.epochs,
                lr=budget.learning_rate,
                batch_size=budget.batch_size,
                max_length=budget.max_length,
                bf16=budget.bf16,
                training_arguments={"disable_tqdm": True},
            )

        say(f"{self.name}: teacher")
        record = self.out / "teachers" / f"{self.name}.json"
        self.quality = Stage(record, fingerprint(self.made_from), (folder,)).run(teach)
        teacher, self.tokenizer = load_teacher(folder)
        torch.nn.Module.to(teacher, self.device)
        self.encoded: EncodedData = tokenize(
            match_labels(self.raw, teacher.config), self.tokenizer, budget.max_length
        )
        self.made_of = Materials(teacher, self._importance(teacher), self.counts_V(teacher))

    def _importance(self, teacher: PreTrainedModel) -> Importance:
        path = self.out / "teachers" / f"{self.name}.importance.safetensors"

        def score() -> None:
            rows = sample_rows(self.encoded.train, self.budget.importance_rows, seed=0)
            compute_importance(
                teacher,
                batches(rows, self.tokenizer, device=self.device),
                group_V=token_groups(teacher, token_counts(rows, teacher.config.vocab_size)),
            ).save(path)

        say(f"{self.name}: importance")
        Stage(path.with_suffix(".json"), fingerprint(self.made_from), (path,)).run(score)
        return Importance.load(path)

    def counts_V(self, teacher: PreTrainedModel) -> torch.Tensor:
        """How often each token id occurs in training."""
        return token_counts(self.encoded.train, teacher.config.vocab_size)

    @cached_property
    def remembered(self) -> Any:
        """The teacher, answering from memory."""
        return RememberedTeacher(self.made_of.teacher)

    made_of: Materials
    tokenizer: PreTrainedTokenizerBase
    quality: dict[str, float]


def run(study: str, task: Task, name: str, budget: StudentBudget, seed: int) -> None:
    """Cut, evaluate, distil, evaluate; or nothing, if that is done.

    The record is `records/<study>/<task>/<contender>-seed<seed>.json` in the task's folder.
    """
    contender, made_of = CONTENDERS[name], task.made_of
    record = task.out / "records" / study / task.name / f"{name}-seed{seed}.json"
    checkpoints = task.out / "checkpoints" / study / task.name / record.stem
    settings = DistillSettings(
        budget.epochs,
        budget.learning_rate,
        budget.distill_weight,
        budget.batch_size,
        seed=seed,
        bf16=task.budget.bf16,
    )

    def quality(model: PreTrainedModel) -> dict[str, float]:
        return evaluate(model, task.encoded, task.tokenizer)

    def work() -> dict[str, Any]:
        environment = describe_environment()
        student = contender.build(made_of, seed)
        before = quality(student)
        loads = None
        if is_moe(student.config):
            rows = batches(task.encoded.validation, task.tokenizer, device=task.device)
            loads = max(map(max, expert_load(student, rows))) * student.config.num_experts
        layer_map = contender.layer_map(made_of) if isinstance(contender, FewerLayers) else None
        rows = sample_rows(task.encoded.train, budget.train_rows, seed=0)
        distill(student, task.remembered, rows, task.tokenizer, settings, checkpoints, layer_map=layer_map)
        return {
            "study": study,
            "task": task.name,
            "contender": name,
            "seed": seed,
            "metric": task.raw.task.main_metric,
            "teacher": task.quality,
            "before": before,
            "after": quality(student),
            "largest_load": loads,
            "parameters_stored": contender.stored(made_of, student),
            "encoder_flops_per_token": encoder_flops_per_token(student),
            "train_rows": len(rows),
            "validation_rows": len(task.encoded.validation),
            "teacher_budget": asdict(task.budget),
            "budget": asdict(budget),
            "environment": {key: value for key, value in asdict(environment).items() if key != "backends"},
        }

    made_from = fingerprint(task.made_from, asdict(budget), repr(contender), seed)
    result = Stage(record, made_from).run(work)
    shutil.rmtree(checkpoints, ignore_errors=True)
    main = result["metric"]
    say(
        f"{study}, {task.name}, {record.stem}: {main} {result['before'][main]:.4f} before distillation, "
        f"{result['after'][main]:.4f} after"
    )


def say(text: str) -> None:
    """Print it with the time."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}")
