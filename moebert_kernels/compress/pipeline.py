"""From a fine-tuned encoder to a distilled MoE and what it is worth, stage by stage.

Every stage's output is reused while its inputs are unchanged; distillation, the long one, also goes on from
its last checkpoint. In the output folder:

    student/                the distilled model, to be loaded from there
    results.json            every figure (format 1)
    importance.safetensors  the scores the split was made by; for hash-affinity, those of token ids too
    work/NAME/adapted/      each model before distillation
    work/NAME/distilled/    the comparison models after it
    work/NAME/seed-S/       the same of further seeds
    work/stages/*.json      what each stage was made from, how long it took, its small results
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels import __version__
from moebert_kernels.compress import processes
from moebert_kernels.compress.adapt import token_counts
from moebert_kernels.compress.artifacts import (
    Stage,
    claim,
    discard_unfinished,
    exclusive,
    fingerprint,
    model_fingerprint,
    remove_folders,
    rows_fingerprint,
    write_json,
)
from moebert_kernels.compress.batching import sample_rows
from moebert_kernels.compress.distill import DistillSettings, distill
from moebert_kernels.compress.evaluate import batches, evaluate, expert_load
from moebert_kernels.compress.importance import Importance, compute_importance
from moebert_kernels.compress.loading import (
    check_no_model,
    default_device,
    load_model,
    load_teacher,
    save_encoder,
    warn_of_other_rows,
)
from moebert_kernels.compress.measure import measure
from moebert_kernels.compress.settings import CompressSettings, resolve
from moebert_kernels.compress.tasks import EncodedData, TaskData, match_labels, tokenize
from moebert_kernels.compress.token_scores import token_groups
from moebert_kernels.compress.variants import STUDENT, Report, Trial, over_seeds, trials
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


class Progress(Protocol):
    """What hears how far a stage is.

    A stage begins with (0, 1) and ends with done == total. Between, it counts in a unit of its own (rows,
    steps, rounds), with the total known from the first of these calls; distillation that goes on where it was
    starts at that step. A stage whose output of an earlier run is reused says so by the single call (0, 0).
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note."""


def compress(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: str | Path,
    output_dir: str | Path,
    *,
    progress: Progress | None = None,
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

    Returns:
        The content of results.json.

    Raises:
        UserError: teacher, data, settings or output folder do not fit, said before any long work; or
            distillation diverged.
        OutputError: the output folder cannot be written, for lack of room for instance.
    """
    teacher_dir, output_dir = Path(teacher_dir), Path(output_dir)
    teacher, tokenizer = load_teacher(teacher_dir)
    settings = resolve(settings, teacher, tokenizer, data)
    warn_of_other_rows(teacher_dir, data)
    data = match_labels(data, teacher.config)
    processes.rows_each(settings.batch_size)  # refuses what does not divide
    check_no_model(output_dir)
    processes.on_main(lambda: claim(output_dir))
    with exclusive(output_dir):
        processes.on_main(lambda: discard_unfinished(output_dir))
        return _Run(settings, data, teacher, tokenizer, teacher_dir, output_dir, progress).results()


def stage_names(settings: CompressSettings) -> list[str]:
    """The stages of `compress` in their order, as `Progress` and "timings_s" of the results name them."""
    made = [stage for of_seeds in trials(settings).values() for trial in of_seeds for stage in trial.stages]
    return ["importance", "evaluate teacher", *made, "expert load", "measure"]


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


class _Run:
    """One call of `compress`, everything checked."""

    def __init__(
        self,
        settings: CompressSettings,
        data: TaskData,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher_dir: Path,
        output_dir: Path,
        progress: Progress | None,
    ):
        self.settings = settings
        self.raw = data
        self.tokenizer = tokenizer
        self.teacher_dir = teacher_dir
        self.output_dir = output_dir
        self.progress = progress if processes.is_main() else None
        self.device = default_device()
        self.teacher = teacher
        nn.Module.to(teacher, self.device)  # transformers' own `to` does not say what it takes
        self.timings: dict[str, float] = {}
        self.student_flops = 0
        self.said_anew = False

        self.teacher_print = model_fingerprint(teacher_dir)
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
        )

    @cached_property
    def data(self) -> EncodedData:
        """The rows as token ids, made when a stage first needs them."""
        assert self.settings.max_length is not None  # resolved
        return tokenize(self.raw, self.tokenizer, self.settings.max_length)

    def results(self) -> dict[str, Any]:
        """Run all stages, in the order of `stage_names`."""
        _ = self.importance
        models = {"teacher": self.evaluated("teacher", self.teacher_dir, self.teacher_print)}
        folders, prints = {"teacher": self.teacher_dir}, {"teacher": self.teacher_print}
        losses: dict[str, list] = {}
        for variant, of_seeds in trials(self.settings).items():
            name, before = variant.name, f"{variant.name} before distillation"
            before_records, records = [], []
            for trial in of_seeds:
                if trial.is_adapted:
                    adapted, made_from = self.adapted(trial)
                    record = self.evaluated(f"{trial.name} before distillation", adapted, made_from)
                    before_records.append(record)
                    if trial.is_first and variant is STUDENT:
                        self.student_flops = record["encoder_flops_per_token"]
                distilled, distilled_from, log = self.distilled(trial, adapted, made_from)
                records.append(self.evaluated(trial.name, distilled, distilled_from))
                if trial.is_first:
                    folders |= {before: adapted, name: distilled}
                    prints |= {before: made_from, name: distilled_from}
                    losses[name] = log
            seeds = [trial.seed for trial in of_seeds]
            for row, found in ((before, before_records), (name, records)):
                models[row] = over_seeds(found, seeds[: len(found)]) | _layers(variant.kept_layers(self))
        load = self.expert_load(folders["student"], prints["student"])
        speed = self.speed(folders, prints)
        task = self.raw.task
        results = {
            "format": FORMAT,
            "environment": asdict(describe_environment()),
            "task": {
                "name": task.name,
                "kind": task.kind,
                "main_metric": task.main_metric,
                "train_rows": len(self.raw.train),
                "validation_rows": len(self.raw.validation),
            },
            "settings": asdict(self.settings),
            "models": [{"name": name, **models[name], **speed[name]} for name in models],
            "importance": {
                "model": self.importance.model,
                "task": self.importance.task,
                "num_samples": self.importance.num_samples,
                "share_curve_LQ": share_curves(self.importance),
            },
            "expert_load_LE": load,
            "losses": losses,
            "timings_s": self.timings,
        }
        processes.on_main(lambda: write_json(self.output_dir / "results.json", results))
        return results

    @cached_property
    def importance(self) -> Importance:
        path = self.output_dir / "importance.safetensors"

        def work(report: Report) -> None:
            rows = sample_rows(self.data.train, self.settings.importance_rows, self.settings.seed)
            group_V = None
            if self.settings.routing == "hash-affinity":
                group_V = token_groups(self.teacher, token_counts(rows, self.teacher.config.vocab_size))
            importance = compute_importance(
                self.teacher,
                batches(rows, self.tokenizer, device=self.device),
                task=self.raw.task.name,
                model_name=self.teacher_dir.resolve().name,
                group_V=group_V,
                progress=lambda done: report(done, len(rows)),
            )
            processes.on_main(lambda: importance.save(path))

        self.stage("importance", self.importance_print, work, path, together=True)
        return Importance.load(path)

    def token_counts(self) -> Tensor:
        """How often each token id occurs in the training rows."""
        return token_counts(self.data.train, self.teacher.config.vocab_size)

    def adapted(self, trial: Trial) -> tuple[Path, str]:
        variant, folder = trial.variant, self.output_dir / "work" / trial.folder / "adapted"
        made_from = fingerprint(variant.folder, variant.made_from(self, trial.seed))

        def work(report: Report) -> None:
            save_encoder(variant.build(self, trial.seed, report), self.tokenizer, folder)

        self.stage(f"adapt {trial.name}", made_from, work, folder)
        return folder, made_from

    def distilled(self, trial: Trial, adapted: Path, made_from: str) -> tuple[Path, str, list]:
        s, room = self.settings, self.output_dir / "work" / trial.folder
        is_student = trial.variant is STUDENT and trial.is_first
        folder = self.output_dir / "student" if is_student else room / "distilled"
        assert s.learning_rate is not None  # resolved
        how = DistillSettings(
            s.epochs, s.learning_rate, s.distill_weight, s.batch_size, s.weight_decay, trial.seed
        )
        made_from = fingerprint(made_from, self.teacher_print, self.train_print, asdict(how))
        checkpoints = room / f"checkpoints-{made_from[:16]}"

        def work(report: Report) -> list[dict[str, float]]:
            processes.on_main(lambda: remove_folders(room.glob("checkpoints-*"), keep=checkpoints))
            student = self.load(adapted)
            log = distill(
                student,
                self.teacher,
                self.data.train,
                self.tokenizer,
                how,
                checkpoints,
                layer_map=trial.variant.kept_layers(self),
                progress=report,
            )
            processes.on_main(lambda: save_encoder(student, self.tokenizer, folder))
            return log

        log = self.stage(f"distill {trial.name}", made_from, work, folder, together=True)
        processes.on_main(lambda: remove_folders(room.glob("checkpoints-*")))
        return folder, made_from, log

    def evaluated(self, name: str, folder: Path, made_from: str) -> dict[str, Any]:
        def work(report: Report) -> dict[str, Any]:
            model = self.load(folder)
            quality = evaluate(model, self.data, self.tokenizer, progress=report)
            return {"quality": quality, **{name: cost(model) for name, cost in _COSTS.items()}}

        made_from = fingerprint(made_from, self.validation_print, list(_COSTS))
        return self.stage(f"evaluate {name}", made_from, work)

    def expert_load(self, student: Path, made_from: str) -> list[list[float]]:
        def work(report: Report) -> list[list[float]]:
            rows = self.data.validation
            inputs = batches(rows, self.tokenizer, device=self.device, progress=report)
            return expert_load(self.load(student), inputs)

        return self.stage("expert load", fingerprint(made_from, self.validation_print), work)

    def speed(self, folders: dict[str, Path], prints: dict[str, str]) -> dict[str, Any]:
        environment = describe_environment()
        machine = [environment.cpu, environment.threads, environment.devices]
        length = self.settings.measure_length
        made_from = fingerprint(prints, self.validation_print, length, machine)

        def work(report: Report) -> dict[str, Any]:
            models = {name: self.load(folder) for name, folder in folders.items()}
            assert length is not None  # resolved
            rows = self.data.validation["input_ids"]
            return measure(models, rows, sequence_length=length, progress=report)

        return self.stage("measure", made_from, work)

    def stage(
        self,
        name: str,
        made_from: str,
        work: Callable[[Report], Any],
        *outputs: Path,
        together: bool = False,
    ) -> Any:
        """Do a stage or reuse it; tell progress and note the time it took. See `Stage.run` for `together`."""

        last = (0, 1)

        def report(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            if self.progress is not None:
                self.progress(name, done, total)

        def reported_work() -> Any:
            report(0, 1)
            result = work(report)
            if last[0] != last[1]:
                report(last[1], last[1])
            return result

        record = self.output_dir / "work" / "stages" / f"{name.replace(' ', '-')}.json"
        stage = Stage(record, fingerprint(__version__, made_from), outputs)
        if stage.is_done:
            report(0, 0)
        elif stage.is_outdated and outputs and not self.said_anew:
            self.said_anew = True
            warnings.warn(
                f"{self.output_dir} holds a run with other settings or data: what they change is made anew, "
                "and replaced",
                stacklevel=2,
            )
        result = stage.run(reported_work, together=together)
        self.timings[name] = stage.seconds
        return result

    def load(self, folder: Path) -> PreTrainedModel:
        model = load_model(folder)[0]
        nn.Module.to(model, self.device)
        return model


def _layers(kept: list[int] | None) -> dict[str, Any]:
    """For results.json, where layers are counted from 1 as in the report."""
    return {} if kept is None else {"kept_layers": [layer + 1 for layer in kept]}
