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

In results.json the load of experts is told twice, as shares of real tokens that add up to 1 in a layer:

    expert_load_LE          the student's on the validation rows: a list per layer, in it each expert's share
    training_load_NLE       while it was trained: by model, as in "losses", such a table for each of N epochs

What speed was measured under is in "measuring": "dtype", and "busy_cpus", the processors that other work kept
busy meanwhile. Without measurement it is null, as are the models' "latency_ms" and "throughput_per_s".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

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
    rows_fingerprint,
    write_json,
)
from moebert_kernels.compress.batching import sample_rows
from moebert_kernels.compress.distill import Distilled, DistillSettings, distill
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
from moebert_kernels.compress.losses import Pooling
from moebert_kernels.compress.measure import Speed, measure
from moebert_kernels.compress.settings import CompressSettings, resolve
from moebert_kernels.compress.stages import Progress, Report, Stages
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
        say: hears sentences about distillation, as `distill` says them; in the main process alone.

    Returns:
        The content of results.json.

    Raises:
        UserError: teacher, data, settings or output folder do not fit, said before any long work; or
            distillation diverged.
        OutputError: the output folder cannot be written, for lack of room for instance.
    """
    teacher_dir, output_dir = Path(teacher_dir), Path(output_dir)
    with naming("teacher_dir"):
        teacher, tokenizer = load_teacher(teacher_dir)
    length = KINDS[data.task.kind].default_length
    settings = resolve(settings, teacher, tokenizer, num_rows=len(data.train), default_length=length)
    warn_of_other_rows(teacher_dir, data)
    data = match_labels(data, teacher.config)
    processes.rows_each(settings.batch_size)  # refuses what does not divide
    run = Run(settings, data, teacher, tokenizer, teacher_dir, output_dir, progress, say)
    return results_of(run)


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
    made = [stage for of_seeds in trials(settings).values() for trial in of_seeds for stage in trial.stages]
    return [
        "importance",
        "evaluate teacher",
        *made,
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
        )

    def print_teacher(self) -> str:
        """The fingerprint of the teacher's files."""
        return model_fingerprint(self.teacher_dir)

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
        training_load: dict[str, list] = {}
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
                distilled, distilled_from, found = self.distilled(trial, adapted, made_from)
                records.append(self.evaluated(trial.name, distilled, distilled_from))
                if trial.is_first:
                    folders |= {before: adapted, name: distilled}
                    prints |= {before: made_from, name: distilled_from}
                    losses[name] = found.losses
                    if found.load_NLE:
                        training_load[name] = found.load_NLE
            seeds = [trial.seed for trial in of_seeds]
            for row, of_row in ((before, before_records), (name, records)):
                models[row] = over_seeds(of_row, seeds[: len(of_row)]) | _layers(variant.kept_layers(self))
        load = self.expert_load(folders["student"], prints["student"])
        speed = self.speed(folders, prints) if self.settings.measure else None
        timings = dict.fromkeys(models, _NO_SPEED) if speed is None else speed.models
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
                "constant_score": constant_score(self.raw),
            },
            "settings": asdict(self.settings),
            "models": [{"name": name, **models[name], **timings[name]} for name in models],
            "measuring": speed and {"dtype": speed.dtype, "busy_cpus": speed.busy_cpus},
            "importance": {
                "model": self.importance.model,
                "task": self.importance.task,
                "num_samples": self.importance.num_samples,
                "share_curve_LQ": share_curves(self.importance),
            },
            "expert_load_LE": load,
            "training_load_NLE": training_load,
            "losses": losses,
            "timings_s": self.stages.timings,
        }
        processes.on_main(lambda: write_json(self.output_dir / "results.json", results))
        return results

    @cached_property
    def importance(self) -> Importance:
        """Of the teacher's neurons; taken, or read if it has been."""
        path = self.output_dir / "importance.safetensors"

        def work(report: Report) -> None:
            rows = sample_rows(self.data.train, self.settings.importance_rows, self.settings.seed)
            group_V = None
            if self.settings.routing == "hash-affinity":
                group_V = token_groups(self.teacher, token_counts(rows, self.teacher.config.vocab_size))
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

    def adapted(self, trial: Trial) -> tuple[Path, str]:
        """Make a trial's model; return its folder and the fingerprint of what it was made from."""
        variant, folder = trial.variant, self.output_dir / "work" / trial.folder / "adapted"
        made_from = fingerprint(variant.folder, variant.made_from(self, trial.seed))

        def work(report: Report) -> None:
            self.save(variant.build(self, trial.seed, report), folder)

        self.stages.run(f"adapt {trial.name}", made_from, work, folder)
        return folder, made_from

    def distilled(self, trial: Trial, adapted: Path, made_from: str) -> tuple[Path, str, Distilled]:
        """Distil it; return folder, fingerprint, and what is known of the training."""
        s, room = self.settings, self.output_dir / "work" / trial.folder
        is_student = trial.variant is STUDENT and trial.is_first
        folder = self.output_dir / "student" if is_student else room / "distilled"
        assert s.learning_rate is not None  # resolved
        how = DistillSettings(
            s.epochs, s.learning_rate, s.distill_weight, s.batch_size, s.weight_decay, trial.seed, s.bf16
        )
        made_from = fingerprint(made_from, self.teacher_print, self.train_print, asdict(how))
        checkpoints = room / f"checkpoints-{made_from[:16]}"
        name, say = f"distill {trial.name}", self.say

        def work(report: Report) -> dict[str, Any]:
            processes.on_main(lambda: remove_folders(room.glob("checkpoints-*"), keep=checkpoints))
            student = self.load(adapted)
            found = distill(
                student,
                self.teacher,
                self.data.train,
                self.tokenizer,
                how,
                checkpoints,
                layer_map=trial.variant.kept_layers(self),
                pooling=self.pooling,
                progress=report,
                say=say and (lambda sentence: say(f"{name}, {sentence}")),
            )
            processes.on_main(lambda: self.save(student, folder))
            return found._asdict()

        recorded = fingerprint(made_from, Distilled._fields)
        found = self.stages.run(name, recorded, work, folder, together=True)
        processes.on_main(lambda: remove_folders(room.glob("checkpoints-*")))
        return folder, made_from, Distilled(**found)

    def evaluated(self, name: str, folder: Path, made_from: str) -> dict[str, Any]:
        """Return a saved model's quality and costs."""

        def work(report: Report) -> dict[str, Any]:
            model = self.load(folder)
            quality = evaluate(model, self.data, self.tokenizer, pooling=self.pooling, progress=report)
            return {"quality": quality, **{name: cost(model) for name, cost in _COSTS.items()}}

        made_from = fingerprint(made_from, self.validation_print, list(_COSTS))
        return self.stages.run(f"evaluate {name}", made_from, work)

    def expert_load(self, student: Path, made_from: str) -> list[list[float]]:
        """Return the load on the validation rows."""

        def work(report: Report) -> list[list[float]]:
            rows = self.data.validation
            inputs = batches(rows, self.tokenizer, device=self.device, progress=report)
            return expert_load(self.load(student), inputs)

        return self.stages.run("expert load", fingerprint(made_from, self.validation_print), work)

    def speed(self, folders: dict[str, Path], prints: dict[str, str]) -> Speed:
        """Return latency and throughput by model, and what they were measured under."""
        environment = describe_environment()
        machine = [environment.cpu, environment.threads, environment.devices]
        length = self.settings.measure_length
        made_from = fingerprint(prints, self.validation_print, length, machine, Speed._fields)

        def work(report: Report) -> dict[str, Any]:
            models = {name: self.load(folder) for name, folder in folders.items()}
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
