"""From a fine-tuned encoder to a distilled MoE and what it is worth, stage by stage.

Every stage's output is reused while its inputs are unchanged; distillation, the long one, also goes on from
its last checkpoint. In the output folder:

    student/                the student, to be loaded from there
    results.json            every figure (format 1)
    importance.safetensors  the scores the split was made by; for hash-affinity, those of token ids too
    work/NAME/adapted/      each model as it is cut
    work/NAME/fitted/       with its experts fitted
    work/NAME/distilled/    and trained
    work/NAME/seed-S/       the same of further seeds
    work/stages/*.json      what each stage was made from, how long it took, its small results

In results.json the load of experts is told twice, as shares of real tokens that add up to 1 in a layer:

    expert_load_LE          the student's on the validation rows: a list per layer, in it each expert's share
    training_load_NLE       while it was trained: by model, as in "losses", such a table for each of N epochs

How experts were fitted is told by model in "fitting": `Fitted`'s fields, and "divergence" from the teacher on
rows held out of the training rows, of the model as it was "cut", "fitted" and, if it was, "distilled": after
the epoch after which it was least. "kept" is the one of the last two that is nearer, and is what all else is
told of; "epochs" are the divergences after each epoch.

What speed was measured under is in "measuring": "dtype", and "busy_cpus", the processors that other work kept
busy meanwhile. Without measurement it is null, as are the models' "latency_ms" and "throughput_per_s".

What makes all this say less than it seems to is in "warnings", a sentence each: of the rows (empty texts, too
few to validate on, others than the teacher's), the models (no better than chance) and the measurement. The
report shows them first.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress import processes
from moebert_kernels.compress.adapt import token_counts
from moebert_kernels.compress.artifacts import (
    claim,
    discard_unfinished,
    exclusive,
    fingerprint,
    model_fingerprint,
    remove_folders,
    replace_whole,
    rows_fingerprint,
    write_json,
)
from moebert_kernels.compress.batching import hold_out, sample_rows
from moebert_kernels.compress.distill import Distilled, DistillSettings, distill
from moebert_kernels.compress.divergence import divergence
from moebert_kernels.compress.evaluate import batches, evaluate, expert_load
from moebert_kernels.compress.fitting import RARE, RIDGE, fit_experts, rows_to_fit
from moebert_kernels.compress.importance import Importance, compute_importance
from moebert_kernels.compress.loading import (
    check_no_model,
    compared_with_training,
    default_device,
    load_model,
    load_teacher,
    save_encoder,
)
from moebert_kernels.compress.losses import Pooling
from moebert_kernels.compress.measure import Speed, measure
from moebert_kernels.compress.nearest import Nearest
from moebert_kernels.compress.precision import computing
from moebert_kernels.compress.settings import CompressSettings, resolve
from moebert_kernels.compress.stages import Progress, Report, Stages
from moebert_kernels.compress.summary import warnings_of
from moebert_kernels.compress.tasks import (
    KINDS,
    EncodedData,
    TaskData,
    constant_score,
    match_labels,
    tokenize,
)
from moebert_kernels.compress.token_scores import token_groups
from moebert_kernels.compress.variants import STUDENT, Trial, over_seeds, trials
from moebert_kernels.environment import describe_environment
from moebert_kernels.errors import naming
from moebert_kernels.models import (
    count_parameters,
    encoder_flops_per_token,
    ffn_flops_per_token,
    parameters_used_per_token,
)

FORMAT = 1
_COSTS = {
    "parameters_stored": count_parameters,
    "parameters_used_per_token": parameters_used_per_token,
    "ffn_flops_per_token": ffn_flops_per_token,
    "encoder_flops_per_token": encoder_flops_per_token,
}
_NO_SPEED = {"latency_ms": None, "throughput_per_s": None}


def compress(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: str | Path,
    output_dir: str | Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compress a fine-tuned encoder into a MoE, and measure what that costs and brings.

    On the first CUDA device if there is one, otherwise on the CPU. The same seed gives the same student on
    the same machine. Several processes (torchrun) share importance and training; all return the results.
    Interrupted at any point and called again, it goes on where it was.

    Args:
        settings: what to make.
        data: raw rows, as `load_task` returns them.
        teacher_dir: of a BERT fine-tuned on the task, with its tokenizer.
        output_dir: made if need be; one run at a time.
        progress: hears about every stage of `stage_names`, in that order; in the main process alone.
        say: hears sentences about fit and distillation; in the main process alone.

    Returns:
        The content of results.json.

    Raises:
        UserError: teacher, data, settings or output folder do not fit, said before any long work; or
            distillation diverged.
        OutputError: the output folder cannot be written, for lack of room for instance.
    """
    settings, data, teacher, tokenizer = checked(settings, data, Path(teacher_dir))
    run = Run(settings, data, teacher, tokenizer, Path(teacher_dir), Path(output_dir), progress, say)
    return results_of(run)


def checked(
    settings: CompressSettings, data: TaskData, teacher_dir: Path
) -> tuple[CompressSettings, TaskData, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a run's teacher and make all three fit each other; return what a `Run` takes.

    Raises:
        UserError: they do not.
    """
    with naming("teacher_dir"):
        teacher, tokenizer = load_teacher(teacher_dir)
    length = KINDS[data.task.kind].default_length
    settings = resolve(settings, teacher, tokenizer, num_rows=len(data.train), default_length=length)
    data = match_labels(compared_with_training(teacher_dir, data), teacher.config)
    if settings.distill:
        processes.rows_each(settings.batch_size)  # refuses what does not divide
    return settings, data, teacher, tokenizer


def results_of(run: Run) -> dict[str, Any]:
    """Hold a run's output folder for this process, or those it works with, and do the run in it; collective.

    Raises:
        UserError: the folder is no such run's, or in use.
    """
    with naming("output_dir"):
        check_no_model(run.output_dir)
        # Before anything is put into a folder that is refused.
        processes.on_main(lambda: claim(run.output_dir))
    with exclusive(run.output_dir):
        processes.on_main(lambda: discard_unfinished(run.output_dir))
        return run.results()


def stage_names(settings: CompressSettings) -> list[str]:
    """The stages of `compress` in their order, as `Progress` and "timings_s" of the results name them."""
    made = [
        stage
        for of_seeds in trials(settings).values()
        for trial in of_seeds
        for stage in trial.stages(settings)
    ]
    return [
        "importance",
        "evaluate teacher",
        *made,
        "save student",
        "expert load",
        *(["measure"] if settings.measure else []),
    ]


def share_curves(importance: Importance, points: int = 101) -> list[list[float]]:
    """How much of a layer's importance its most important neurons hold.

    Returns:
        [L][points]: at index q the share held by the fraction q / (points - 1) of the neurons, from 0 to 1.
    """
    sorted_LF = importance.scores_LF.double().sort(dim=1, descending=True).values
    share_LF = sorted_LF.cumsum(1) / sorted_LF.sum(1, keepdim=True).clamp(min=1e-300)
    share_LF1 = torch.nn.functional.pad(share_LF, (1, 0))
    index_Q = torch.linspace(0, sorted_LF.shape[1], points).round().long()
    return share_LF1[:, index_Q].tolist()


class Model(NamedTuple):
    """A saved model, and the fingerprint of what it was made from."""

    folder: Path
    made_from: str


class Start(NamedTuple):
    """A model before it is distilled; "fitting" is for results.json, None if it was not fitted."""

    model: Model
    fitting: dict[str, Any] | None


class Tried(NamedTuple):
    """What a trial has given.

    Attributes:
        rows: by name in results.json, the saved models and their records.
        told: what else results.json is to tell of it, by the part that does.
    """

    rows: dict[str, tuple[Model, dict[str, Any]]]
    told: dict[str, Any]


class Run:
    """One call of `compress`, everything checked.

    Attributes:
        pooling: makes embeddings of the models' last hidden states; None for models with a head.
    """

    pooling: Pooling | None = None

    def __init__(
        self,
        settings: CompressSettings,
        data: TaskData,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher_dir: Path,
        output_dir: Path,
        progress: Progress | None,
        say: Callable[[str], None] | None,
    ):
        self.settings = settings
        self.raw = data
        self.tokenizer = tokenizer
        self.teacher_dir = teacher_dir
        self.output_dir = output_dir
        self.stages = Stages(output_dir, progress)
        self.say = say
        self.device = default_device()
        self.teacher = teacher
        nn.Module.to(teacher, self.device)  # transformers' own `to` does not say what it takes
        self.student_flops = 0

        self.teacher_print = self.print_teacher()
        answers = data.task.answers
        doc_stride = answers and answers.doc_stride
        self.train_print = fingerprint(rows_fingerprint(data.train), settings.max_length, doc_stride)
        self.validation_print = fingerprint(
            [rows_fingerprint(rows) for rows in data.validation_sets.values()],
            settings.max_length,
            answers and asdict(answers),
        )
        self.importance_print: str = fingerprint(
            self.teacher_print,
            self.train_print,
            settings.importance_rows,
            settings.seed,
            settings.routing == "hash-affinity",
            settings.bf16,
        )

    def print_teacher(self) -> str:
        """The fingerprint of the teacher's files."""
        return model_fingerprint(self.teacher_dir)

    @cached_property
    def data(self) -> EncodedData:
        """The rows as token ids, made when a stage first needs them."""
        assert self.settings.max_length is not None  # resolved
        return tokenize(self.raw, self.tokenizer, self.settings.max_length)

    @cached_property
    def rows(self) -> tuple[Dataset, Dataset]:
        """The rows to fit and train on; and those held out of them, to choose by, if models are fitted."""
        if not self.settings.fit:
            return self.data.train, self.data.train.select([])
        return hold_out(self.data.train, self.settings.seed)

    def results(self) -> dict[str, Any]:
        """Run all stages, in the order of `stage_names`."""
        _ = self.importance
        models = {"teacher": self.evaluated("teacher", Model(self.teacher_dir, self.teacher_print))}
        saved = {"teacher": Model(self.teacher_dir, self.teacher_print)}
        told: dict[str, dict[str, Any]] = {"fitting": {}, "losses": {}, "training_load_NLE": {}}
        for variant, of_seeds in trials(self.settings).items():
            name, records = variant.name, defaultdict(list)
            start = None
            for trial in of_seeds:
                start, found = self.tried(trial, start)
                for row, (model, record) in found.rows.items():
                    records[row].append(record)
                    if trial.is_first:
                        saved[row] = model
                if trial.is_first:
                    for part, value in found.told.items():
                        if value:
                            told[part][name] = value
            seeds = [trial.seed for trial in of_seeds]
            for row, of_row in records.items():
                models[row] = over_seeds(of_row, seeds[: len(of_row)]) | _layers(variant.kept_layers(self))
        self.save_student(saved["student"])
        load = self.expert_load(saved["student"])
        speed = self.speed(saved) if self.settings.measure else None
        timings = dict.fromkeys(models, _NO_SPEED) if speed is None else speed.models
        task = self.raw.task
        results: dict[str, Any] = {
            "format": FORMAT,
            "environment": asdict(describe_environment()),
            "task": {
                "name": task.name,
                "kind": task.kind,
                "main_metric": task.main_metric,
                "train_rows": len(self.raw.train),
                "validation_rows": len(self.raw.validation),
                "constant_score": constant_score(self.raw),
            },
            "settings": asdict(self.settings) | self._training_settings(),
            "models": [{"name": name, **models[name], **timings[name]} for name in models],
            "measuring": speed and {"dtype": speed.dtype, "busy_cpus": speed.busy_cpus},
            "importance": {
                "model": self.importance.model,
                "task": self.importance.task,
                "num_samples": self.importance.num_samples,
                "share_curve_LQ": share_curves(self.importance),
            },
            "expert_load_LE": load,
            **told,
            "timings_s": self.stages.timings,
        }
        of_rows = [*self.raw.oddities, self.raw.scarcity]
        results["warnings"] = [sentence for sentence in of_rows if sentence] + warnings_of(results)
        processes.on_main(lambda: write_json(self.output_dir / "results.json", results))
        return results

    def _training_settings(self) -> dict[str, Any]:
        """What settings leave open of the student's training."""
        if not self.settings.distill:
            return {}
        how = self.training(Trial(STUDENT, self.settings.seed, True))
        return {name: getattr(how, name) for name in ("learning_rate", "dropout", "labels")}

    def tried(self, trial: Trial, start: Start | None) -> tuple[Start, Tried]:
        """Make a trial's model, and evaluate it before it is distilled and after.

        Args:
            trial: which.
            start: what its variant's first seed began with, if that is for all seeds.

        Returns:
            What it began with; and what is to be told of it.
        """
        name, found = trial.variant.name, Tried({}, {})
        if trial.is_adapted or start is None:
            start = Start(self.adapted(trial), None)
            if trial.is_fitted(self.settings):
                start = self.fitted(trial, start.model)
            row = f"{name} before distillation" if self.settings.distill else name
            stage = f"{trial.name} before distillation" if self.settings.distill else trial.name
            record = self.evaluated(stage, start.model)
            found.rows[row] = start.model, record
            if trial.is_first and trial.variant is STUDENT:
                self.student_flops = record["encoder_flops_per_token"]
        fitting = start.fitting
        if self.settings.distill:
            model, training = self.distilled(trial, start.model)
            if fitting is not None and training.nearest is not None:
                _, *after = training.nearest.distances
                fitting = fitting | {
                    "divergence": {**fitting["divergence"], "distilled": min(after)},
                    "kept": "distilled" if training.nearest.kept else "fitted",
                    "epochs": after,
                }
                if not training.nearest.kept:
                    model = start.model
            found.rows[name] = model, self.evaluated(trial.name, model)
            found.told.update(losses=training.losses, training_load_NLE=training.load_NLE)
        found.told["fitting"] = fitting
        return start, found

    @cached_property
    def importance(self) -> Importance:
        """Of the teacher's neurons; taken, or read if it has been."""
        path = self.output_dir / "importance.safetensors"

        def work(report: Report) -> None:
            rows = sample_rows(self.data.train, self.settings.importance_rows, self.settings.seed)
            group_V = None
            if self.settings.routing == "hash-affinity":
                group_V = token_groups(self.teacher, token_counts(rows, self.teacher.config.vocab_size))
            with computing(self.settings.bf16):
                importance = self.scores(rows, group_V, lambda done: report(done, len(rows)))
            processes.on_main(lambda: importance.save(path))

        self.stages.run("importance", self.importance_print, work, path, together=True)
        return Importance.load(path)

    def scores(self, rows: Dataset, group_V: Tensor | None, progress: Callable[[int], None]) -> Importance:
        """Score the teacher's neurons on these rows."""
        return compute_importance(
            self.teacher,
            batches(rows, self.tokenizer, device=self.device),
            task=self.raw.task.name,
            model_name=self.teacher_dir.resolve().name,
            group_V=group_V,
            progress=progress,
        )

    def token_counts(self) -> Tensor:
        """How often each token id occurs in the training rows."""
        return token_counts(self.data.train, self.teacher.config.vocab_size)

    def adapted(self, trial: Trial) -> Model:
        """Cut a trial's model."""
        variant, folder = trial.variant, self.output_dir / "work" / trial.folder / "adapted"
        made_from = fingerprint(variant.folder, variant.made_from(self, trial.seed))

        def work(report: Report) -> None:
            self.save(variant.build(self, trial.seed, report), folder)

        self.stages.run(f"adapt {trial.name}", made_from, work, folder)
        return Model(folder, made_from)

    def fitted(self, trial: Trial, made: Model) -> Start:
        """Fit it."""
        s, (adapted, made_from) = self.settings, made
        folder = self.output_dir / "work" / trial.folder / "fitted"
        made_from = fingerprint(
            made_from, self.teacher_print, self.train_print, s.fit_rows, s.seed, RIDGE, RARE, s.bf16
        )

        def work(report: Report) -> dict[str, Any]:
            rows, held_out = self.rows
            student = self.load(adapted)

            def distance() -> float:
                return divergence(student, self.teacher, held_out, self.tokenizer, pooling=self.pooling)

            cut = processes.on_main(distance)
            rows = rows_to_fit(rows, s.fit_rows, s.seed, self.teacher.config.hidden_size)
            with computing(s.bf16):
                found = fit_experts(
                    student, self.teacher, list(batches(rows, self.tokenizer)), progress=report
                )
            processes.on_main(lambda: self.save(student, folder))
            distances = {"cut": cut, "fitted": processes.on_main(distance)}
            self._tell(
                f"fit {trial.name}: {found.told(len(rows))}; divergence from the teacher on "
                f"{len(held_out):,} held-out rows {distances['fitted']:.4g}, after {cut:.4g}"
            )
            return {"rows": len(rows), **found._asdict(), "divergence": distances}

        found = self.stages.run(f"fit {trial.name}", made_from, work, folder, together=True)
        return Start(Model(folder, made_from), found)

    def distilled(self, trial: Trial, made: Model) -> tuple[Model, Distilled]:
        """Distil it; return it, and what is known of the training."""
        s, room = self.settings, self.output_dir / "work" / trial.folder
        (adapted, made_from), folder = made, room / "distilled"
        how = self.training(trial)
        made_from = fingerprint(made_from, self.teacher_print, self.train_print, s.fit, asdict(how))
        checkpoints = room / f"checkpoints-{made_from[:16]}"
        name, say = f"distill {trial.name}", self.say

        def work(report: Report) -> dict[str, Any]:
            processes.on_main(lambda: remove_folders(room.glob("checkpoints-*"), keep=checkpoints))
            student = self.load(adapted)
            rows, held_out = self.rows
            found = distill(
                student,
                self.teacher,
                rows,
                self.tokenizer,
                how,
                checkpoints,
                held_out=held_out if len(held_out) else None,
                layer_map=trial.variant.kept_layers(self),
                pooling=self.pooling,
                progress=report,
                say=say and (lambda sentence: say(f"{name}, {sentence}")),
            )
            processes.on_main(lambda: self.save(student, folder))
            return found._asdict() | {"nearest": found.nearest and found.nearest._asdict()}

        recorded = fingerprint(made_from, Distilled._fields)
        found = self.stages.run(name, recorded, work, folder, together=True)
        processes.on_main(lambda: remove_folders(room.glob("checkpoints-*")))
        nearest = found["nearest"] and Nearest(**found["nearest"])
        return Model(folder, made_from), Distilled(**found | {"nearest": nearest})

    def training(self, trial: Trial) -> DistillSettings:
        """How its model is distilled."""
        return DistillSettings.of(
            self.settings,
            seed=trial.seed,
            is_fitted=trial.is_fitted(self.settings),
            hidden_size=self.teacher.config.hidden_size,
        )

    def _tell(self, sentence: str) -> None:
        if self.say is not None and processes.is_main():
            self.say(sentence)

    def save_student(self, student: Model) -> None:
        """Put it where it is looked for."""
        folder = self.output_dir / "student"

        def work(report: Report) -> None:
            with replace_whole(folder) as fresh:
                shutil.copytree(student.folder, fresh)

        self.stages.run("save student", student.made_from, work, folder)

    def evaluated(self, name: str, saved: Model) -> dict[str, Any]:
        """Return a saved model's quality and costs."""

        def work(report: Report) -> dict[str, Any]:
            model = self.load(saved.folder)
            quality = evaluate(model, self.data, self.tokenizer, pooling=self.pooling, progress=report)
            return {"quality": quality, **{name: cost(model) for name, cost in _COSTS.items()}}

        made_from = fingerprint(saved.made_from, self.validation_print, list(_COSTS))
        return self.stages.run(f"evaluate {name}", made_from, work)

    def expert_load(self, student: Model) -> list[list[float]]:
        """Return the load on the validation rows."""

        def work(report: Report) -> list[list[float]]:
            rows = self.data.validation
            inputs = batches(rows, self.tokenizer, device=self.device, progress=report)
            return expert_load(self.load(student.folder), inputs)

        made_from = fingerprint(student.made_from, self.validation_print)
        return self.stages.run("expert load", made_from, work)

    def speed(self, saved: dict[str, Model]) -> Speed:
        """Return latency and throughput by model, and what they were measured under."""
        environment = describe_environment()
        machine = [environment.cpu, environment.threads, environment.devices]
        length = self.settings.measure_length
        prints = {name: model.made_from for name, model in saved.items()}
        made_from = fingerprint(prints, self.validation_print, length, machine, Speed._fields)

        def work(report: Report) -> dict[str, Any]:
            models = {name: self.load(model.folder) for name, model in saved.items()}
            assert length is not None  # resolved
            rows = self.data.validation["input_ids"]
            return measure(models, rows, sequence_length=length, progress=report)._asdict()

        return Speed(**self.stages.run("measure", made_from, work))

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Save a model where `read` finds it; what was in the folder is replaced."""
        save_encoder(model, self.tokenizer, folder)

    def read(self, folder: Path) -> PreTrainedModel:
        """Read a saved model, onto the CPU."""
        return load_model(folder)[0]

    def load(self, folder: Path) -> PreTrainedModel:
        """Read a saved model, onto the device of the run."""
        model = self.read(folder)
        nn.Module.to(model, self.device)
        return model


def _layers(kept: list[int] | None) -> dict[str, Any]:
    """For results.json, where layers are counted from 1 as in the report."""
    return {} if kept is None else {"kept_layers": [layer + 1 for layer in kept]}
