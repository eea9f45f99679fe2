"""A study: for each task a teacher, once, and of it each contender with each seed, all treated alike."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.data.batching import hold_out, sample_rows
from moebert_kernels.compress.data.tasks import (
    CsvOptions,
    EncodedData,
    TaskData,
    load_task,
)
from moebert_kernels.compress.evaluation.likeness import prediction_likeness
from moebert_kernels.compress.evaluation.quality import batches, predict
from moebert_kernels.compress.experts.adaptation import token_counts
from moebert_kernels.compress.experts.fitting import Fitted, fit, rows_to_fit
from moebert_kernels.compress.minilm import find_base_model
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.runs.stages import Stage
from moebert_kernels.compress.runs.subjects import subject_of
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.storage.artifacts import fingerprint
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.compress.training.finetuning import finetune
from moebert_kernels.environment import describe_environment
from moebert_kernels.models import count_parameters, encoder_flops_per_token, is_moe

from .contenders import CONTENDERS, FewerLayers, Materials
from .outcomes import Outcomes, outcomes, predictions
from .remembered import RememberedLayers, RememberedTeacher


def _banking77(folder: Path) -> TaskData:
    options = CsvOptions(label="category", validation_file=folder / "test.csv")
    return load_task("csv", folder / "train.csv", csv=options)


@dataclass(frozen=True)
class Source:
    """Where a task's rows are, and how its teacher is fine-tuned on all of them.

    Attributes:
        folder: in the folder of data.
        epochs: of fine-tuning.
        learning_rate: of fine-tuning.
        load: of a folder that is not GLUE's.
    """

    folder: str
    epochs: float = 3.0
    learning_rate: float = 1e-4
    load: Callable[[Path], TaskData] | None = None


TASKS = {
    "banking77": Source("Banking77", epochs=5.0, learning_rate=2e-4, load=_banking77),
    "sst2": Source("SST-2", epochs=1.0),
    "cola": Source("CoLA"),
    "mrpc": Source("MRPC"),
    "stsb": Source("STS-B"),
}


@dataclass(frozen=True)
class TeacherBudget:
    """How teachers are made, and what is found out about them.

    Attributes:
        epochs: of fine-tuning on all training rows; None for the task's own.
        learning_rate: of fine-tuning; None for the task's own.
        batch_size: of fine-tuning.
        max_length: tokens that rows are cut to, for students too.
        importance_rows: training rows that importance is taken on.
        bf16: compute matrix products in bfloat16, for students too.
    """

    epochs: float | None
    learning_rate: float | None
    batch_size: int
    max_length: int
    importance_rows: int
    bf16: bool


@dataclass(frozen=True)
class TrainingBudget:
    """How every contender is distilled.

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


@dataclass(frozen=True)
class StudentBudget:
    """What every contender gets.

    Attributes:
        cost: a token meets the dense width divided by this.
        fit_rows: training rows that experts are fitted to; None for no fit.
        training: None for no distillation.
    """

    cost: int
    fit_rows: int | None
    training: TrainingBudget | None


class Task:
    """A task's teacher and what is found out about it; made when first asked for, or loaded.

    Args:
        name: in `TASKS`.
        data: folder of the tasks' folders.
        model: folder of a pre-trained model; None for the demonstration's.
        budget: of the teacher.
        out: folder of everything that is made.
    """

    def __init__(self, name: str, data: Path, model: Path | None, budget: TeacherBudget, out: Path):
        source = TASKS[name]
        self.name, self.out = name, out
        self.budget = TeacherBudget(
            **asdict(budget)
            | {
                "epochs": source.epochs if budget.epochs is None else budget.epochs,
                "learning_rate": source.learning_rate
                if budget.learning_rate is None
                else budget.learning_rate,
            }
        )
        self.model = model or find_base_model()
        folder = data / source.folder
        self.raw: TaskData = source.load(folder) if source.load else load_task(name, folder)
        self.made_from = [name, str(self.model), asdict(self.budget)]
        # Of one seed at a time: contender after contender asks for the same.
        self.importance = lru_cache(maxsize=1)(self._importance)
        self.to_fit = lru_cache(maxsize=1)(self._to_fit)

    def prepare(self) -> None:
        """Make the teacher, or load it, and ask it about the validation rows."""
        budget, folder = self.budget, self.out / "teachers" / self.name

        def teach() -> dict[str, float]:
            shutil.rmtree(folder, ignore_errors=True)
            assert budget.epochs is not None
            assert budget.learning_rate is not None
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
        self.subject = subject_of(folder, self.raw)
        self.subject.place()
        self.teacher, self.tokenizer = self.subject.model, self.subject.tokenizer
        self.encoded: EncodedData = self.subject.encode(budget.max_length)
        self.kind = self.raw.task.kind
        self.theirs = predict(self.teacher, self.encoded.validation, self.tokenizer)
        say(f"{self.name}: {self.quality}")

        def keep() -> dict[str, list[Any]]:
            labels = np.asarray(self.encoded.validation["labels"]).tolist()
            return {"labels": labels, "teacher": predictions(self.kind, self.theirs)}

        Stage(self.out / "rows" / f"{self.name}.json", fingerprint(self.made_from)).run(keep)

    def _importance(self, seed: int) -> Importance:
        path = self.out / "teachers" / f"{self.name}.importance-seed{seed}.safetensors"

        def score() -> None:
            settings = CompressSettings(importance_rows=self.budget.importance_rows, seed=seed)
            self.subject.importance(self.encoded.train, settings, per_token=True).save(path)

        say(f"{self.name}: importance, seed {seed}")
        Stage(path.with_suffix(".json"), fingerprint(self.made_from), (path,)).run(score)
        return Importance.load(path)

    def materials(self, seed: int, cost: int) -> Materials:
        """What contenders are made of."""
        return Materials(self.teacher, self.importance(seed), self.counts_V, cost)

    def _to_fit(self, seed: int, count: int) -> tuple[int, list[dict[str, torch.Tensor]], RememberedLayers]:
        """How many rows there are to fit to, their batches, and the teacher's memory of them."""
        rows, _ = hold_out(self.encoded.train, seed)
        rows = rows_to_fit(rows, count, seed, self.teacher.config.hidden_size)
        return len(rows), list(batches(rows, self.tokenizer)), RememberedLayers(self.teacher)

    def fit(self, student: PreTrainedModel, seed: int, count: int) -> dict[str, Any]:
        """Fit a student to so many rows at most; return what is to be told of it."""
        num_rows, batches_to_fit, remembered = self.to_fit(seed, count)
        with remembered.answering():
            found: Fitted = fit(student, self.teacher, batches_to_fit)
        return {"rows": num_rows, **found._asdict()}

    @cached_property
    def counts_V(self) -> torch.Tensor:
        """How often each token id occurs in training."""
        return token_counts(self.encoded.train, self.teacher.config.vocab_size)

    @cached_property
    def remembered(self) -> Any:
        """The teacher, answering from memory."""
        return RememberedTeacher(self.teacher)

    def measured(self, model: PreTrainedModel) -> tuple[dict[str, float], Outcomes]:
        """The task's metrics, likeness to the teacher, and outcomes, of a model on the validation rows."""
        ours = predict(model, self.encoded.validation, self.tokenizer)
        metrics = self.encoded.validation_sets[""].score(ours)
        alike = prediction_likeness(self.kind, ours, self.theirs)
        if "pearson" in alike:  # the task has a metric of that name
            alike["agreement"] = alike.pop("pearson")
        return metrics | alike, outcomes(self.kind, ours, self.theirs)

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    quality: dict[str, float]
    kind: str
    theirs: list[np.ndarray]


def run(study: str, task: Task, name: str, budget: StudentBudget, seed: int) -> None:
    """Cut, fit and distil, as far as that is asked for, and evaluate after each; nothing, if that is done.

    All that is drawn is drawn by the seed: rows to take importance on and to fit to, hash tables, random
    scores, and the order of rows while training. The record is
    `records/<study>/<task>/<contender>-seed<seed>.json` in the task's folder.
    """
    contender = CONTENDERS[name]
    record = task.out / "records" / study / task.name / f"{name}-seed{seed}.json"
    checkpoints = task.out / "checkpoints" / study / task.name / record.stem

    def work() -> dict[str, Any]:
        environment = describe_environment()
        made_of = task.materials(seed, budget.cost)
        student = contender.build(made_of, seed)
        measured = {"cut": task.measured(student)}
        fitting = None
        if budget.fit_rows is not None and contender.can_be_fitted:
            fitting = task.fit(student, seed, budget.fit_rows)
            measured["fitted"] = task.measured(student)
        training, kept = None, list(measured)[-1]
        if budget.training is not None:
            training = _distil(student, is_fitted=fitting is not None)
            measured["distilled"] = task.measured(student)
            kept = "distilled"
        return {
            "study": study,
            "task": task.name,
            "contender": name,
            "seed": seed,
            "metric": task.raw.task.main_metric,
            "teacher": task.quality,
            "states": {state: metrics for state, (metrics, _) in measured.items()},
            "kept": kept,
            "fitting": fitting,
            "training": training,
            "largest_load": largest_load(student, task.encoded.validation),
            "parameters_stored": count_parameters(student),
            "encoder_flops_per_token": encoder_flops_per_token(student),
            "validation_rows": len(task.encoded.validation),
            "teacher_budget": asdict(task.budget),
            "budget": asdict(budget),
            "environment": {key: value for key, value in asdict(environment).items() if key != "backends"},
            "rows": {state: found for state, (_, found) in measured.items()},
        }

    def _distil(student: PreTrainedModel, *, is_fitted: bool) -> dict[str, Any]:
        """As `compress` does: a fitted student learns from its teacher alone, without dropout."""
        assert budget.training is not None
        how = budget.training
        settings = DistillSettings(
            how.epochs,
            how.learning_rate,
            how.distill_weight,
            how.batch_size,
            seed=seed,
            bf16=task.budget.bf16,
            dropout=not is_fitted,
            labels=not is_fitted,
        )
        layer_map = None
        if isinstance(contender, FewerLayers):
            layer_map = contender.layer_map(task.materials(seed, budget.cost))
        rows, held_out = hold_out(task.encoded.train, seed)
        rows = sample_rows(rows, how.train_rows, seed=0)
        found = distill(
            student,
            task.remembered,
            rows,
            task.tokenizer,
            settings,
            checkpoints,
            held_out=held_out,
            layer_map=layer_map,
        )
        assert found.nearest is not None
        return {"rows": len(rows), "held_out": found.nearest.distances, "kept_epoch": found.nearest.kept}

    made_from = fingerprint(task.made_from, asdict(budget), repr(contender), seed)
    result = Stage(record, made_from).run(work)
    shutil.rmtree(checkpoints, ignore_errors=True)
    main = result["metric"]
    steps = " → ".join(
        f"{state} {100 * metrics[main]:.1f}, divergence {metrics['divergence']:.4g}"
        for state, metrics in result["states"].items()
    )
    say(f"{study}, {task.name}, {record.stem}: {main} {steps}")


def largest_load(student: PreTrainedModel, rows: Dataset) -> float | None:
    """How full the fullest expert of any layer is with some rows' tokens, in units of the mean.

    Of a student with hash tables, which need no pass of it; None of one without experts.
    """
    if not is_moe(student.config):
        return None
    tables_LV = next(buffer for name, buffer in student.named_buffers() if name.endswith("tables_LV")).cpu()
    counts_V = token_counts(rows, student.config.vocab_size)
    loads_LE = torch.zeros(len(tables_LV), student.config.num_experts, dtype=torch.int64)
    loads_LE.scatter_add_(1, tables_LV.long(), counts_V.expand(len(tables_LV), -1))
    return int(loads_LE.max()) * student.config.num_experts / int(counts_V.sum())


def say(text: str) -> None:
    """Print it with the time."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}")
