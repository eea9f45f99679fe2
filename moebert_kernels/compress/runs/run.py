"""One run of `compress`: its stages, each done or reused, and what they found."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.batching import hold_out
from moebert_kernels.compress.data.tasks import EncodedData, constant_score
from moebert_kernels.compress.evaluation.quality import batches, evaluate, expert_load
from moebert_kernels.compress.evaluation.speed import Speed, measure
from moebert_kernels.compress.experts.fitting import RARE, RIDGE
from moebert_kernels.compress.report.summary import warnings_of
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.runs.stages import Progress, Stages
from moebert_kernels.compress.runs.subjects import Report, Subject
from moebert_kernels.compress.runs.variants import STUDENT, Trial, over_seeds, trials
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.storage.artifacts import (
    fingerprint,
    remove_folders,
    replace_whole,
    rows_fingerprint,
    write_json,
)
from moebert_kernels.compress.training.distillation import Distilled, DistillSettings, distill
from moebert_kernels.compress.training.divergence import divergence
from moebert_kernels.compress.training.nearest import Nearest
from moebert_kernels.environment import describe_environment
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
    """One call of `compress`, everything checked."""

    def __init__(
        self,
        settings: CompressSettings,
        subject: Subject,
        output_dir: Path,
        progress: Progress | None,
        say: Callable[[str], None] | None,
    ):
        self.settings = settings
        self.subject = subject
        self.output_dir = output_dir
        self.stages = Stages(output_dir, progress)
        self.say = say
        self.student_flops = 0

        subject.place()
        self.teacher_print = subject.fingerprint()
        answers = subject.data.task.answers
        doc_stride = answers and answers.doc_stride
        self.train_print = fingerprint(rows_fingerprint(subject.data.train), settings.max_length, doc_stride)
        self.validation_print = fingerprint(
            [rows_fingerprint(rows) for rows in subject.data.validation_sets.values()],
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

    @cached_property
    def data(self) -> EncodedData:
        """The rows as token ids, made when a stage first needs them."""
        return self.subject.encode(self.settings.max_length)

    @cached_property
    def rows(self) -> tuple[Dataset, Dataset]:
        """The rows to fit and train on; and those held out of them, to choose by, if models are fitted."""
        if not self.settings.fit:
            return self.data.train, self.data.train.select([])
        return hold_out(self.data.train, self.settings.seed)

    def results(self) -> dict[str, Any]:
        """Run all stages, in the order of `stage_names`."""
        _ = self.importance
        saved = {"teacher": Model(self.subject.folder, self.teacher_print)}
        models = {"teacher": self.evaluated("teacher", saved["teacher"])}
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
        raw, task = self.subject.data, self.subject.data.task
        results: dict[str, Any] = {
            "format": FORMAT,
            "environment": asdict(describe_environment()),
            "task": {
                "name": task.name,
                "kind": task.kind,
                "main_metric": task.main_metric,
                "train_rows": len(raw.train),
                "validation_rows": len(raw.validation),
                "constant_score": constant_score(raw),
            },
            "settings": asdict(self.settings) | self._training_settings(),
            "models": [{"name": name, **models[name], **timings[name]} for name in models],
            "measuring": speed and {"dtype": speed.dtype, "busy_cpus": speed.busy_cpus},
            "importance": {
                "model": self.importance.model,
                "task": self.importance.task,
                "num_samples": self.importance.num_samples,
                "share_curve_LQ": self.importance.share_curve_LQ(),
            },
            "expert_load_LE": load,
            **told,
            "timings_s": self.stages.timings,
        }
        of_rows = [*raw.oddities, raw.scarcity]
        results["warnings"] = [sentence for sentence in of_rows if sentence] + warnings_of(results)
        distributed.on_main(lambda: write_json(self.output_dir / "results.json", results))
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
            importance = self.subject.importance(
                self.data.train,
                self.settings,
                per_token=self.settings.routing == "hash-affinity",
                progress=report,
            )
            distributed.on_main(lambda: importance.save(path))

        self.stages.run("importance", self.importance_print, work, path, together=True)
        return Importance.load(path)

    def cut(self, scores: Importance | Tensor, settings: CompressSettings, report: Report) -> PreTrainedModel:
        """Make a MoE of the teacher; see `Subject.cut`."""
        return self.subject.cut(scores, settings, self.data.train, report)

    def adapted(self, trial: Trial) -> Model:
        """Cut a trial's model."""
        variant, folder = trial.variant, self.output_dir / "work" / trial.folder / "adapted"
        made_from = fingerprint(variant.folder, variant.made_from(self, trial.seed))

        def work(report: Report) -> None:
            self.subject.save(variant.build(self, trial.seed, report), folder)

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
            student, of = self.subject.load(adapted), self.subject

            def distance() -> float:
                return divergence(student, of.model, held_out, of.tokenizer, pooling=of.pooling)

            cut = distributed.on_main(distance)
            found, num_rows = of.fit(student, rows, s, report)
            distributed.on_main(lambda: of.save(student, folder))
            distances = {"cut": cut, "fitted": distributed.on_main(distance)}
            self._tell(
                f"fit {trial.name}: {found.told(num_rows)}; divergence from the teacher on "
                f"{len(held_out):,} held-out rows {cut:.4g} as cut, {distances['fitted']:.4g} as fitted"
            )
            return {"rows": num_rows, **found._asdict(), "divergence": distances}

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
            distributed.on_main(lambda: remove_folders(room.glob("checkpoints-*"), keep=checkpoints))
            student, of = self.subject.load(adapted), self.subject
            rows, held_out = self.rows
            found = distill(
                student,
                of.model,
                rows,
                of.tokenizer,
                how,
                checkpoints,
                held_out=held_out if len(held_out) else None,
                layer_map=trial.variant.kept_layers(self),
                pooling=of.pooling,
                progress=report,
                say=say and (lambda sentence: say(f"{name}, {sentence}")),
            )
            distributed.on_main(lambda: of.save(student, folder))
            return found._asdict() | {"nearest": found.nearest and found.nearest._asdict()}

        recorded = fingerprint(made_from, Distilled._fields)
        found = self.stages.run(name, recorded, work, folder, together=True)
        distributed.on_main(lambda: remove_folders(room.glob("checkpoints-*")))
        nearest = found["nearest"] and Nearest(**found["nearest"])
        return Model(folder, made_from), Distilled(**found | {"nearest": nearest})

    def training(self, trial: Trial) -> DistillSettings:
        """How its model is distilled."""
        hidden_size = self.subject.model.config.hidden_size
        is_fitted = trial.is_fitted(self.settings)
        return self.settings.training(seed=trial.seed, is_fitted=is_fitted, hidden_size=hidden_size)

    def _tell(self, sentence: str) -> None:
        if self.say is not None and distributed.is_main():
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
            model, of = self.subject.load(saved.folder), self.subject
            quality = evaluate(model, self.data, of.tokenizer, pooling=of.pooling, progress=report)
            return {"quality": quality, **{name: cost(model) for name, cost in _COSTS.items()}}

        made_from = fingerprint(saved.made_from, self.validation_print, list(_COSTS))
        return self.stages.run(f"evaluate {name}", made_from, work)

    def expert_load(self, student: Model) -> list[list[float]]:
        """Return the load on the validation rows."""

        def work(report: Report) -> list[list[float]]:
            rows = self.data.validation
            model = self.subject.load(student.folder)
            inputs = batches(rows, self.subject.tokenizer, device=model.device, progress=report)
            return expert_load(model, inputs)

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
            models = {name: self.subject.load(model.folder) for name, model in saved.items()}
            assert length is not None  # resolved
            rows = self.data.validation["input_ids"]
            return measure(models, rows, sequence_length=length, progress=report)._asdict()

        return Speed(**self.stages.run("measure", made_from, work))


def _layers(kept: list[int] | None) -> dict[str, Any]:
    """For results.json, where layers are counted from 1 as in the report."""
    return {} if kept is None else {"kept_layers": [layer + 1 for layer in kept]}
