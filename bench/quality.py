"""Quality: routings compared on real tasks, before and after distillation, with one budget for all.

    python -m bench.quality run --data GLUE --out runs/quality
    python -m bench.quality table runs/quality

GLUE is a folder that holds SST-2, CoLA, MRPC and STS-B in their original layout. For every task a teacher is
fine-tuned once and scored once; then each contender is cut from it, evaluated, distilled and evaluated again,
for every seed. Each of these writes a json record when it is done: the same command given again goes on where
it was, in the middle of a distillation too. `--limit` starts nothing more after so many seconds.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.adapt import adapt, token_counts
from moebert_kernels.compress.artifacts import Stage, exclusive, fingerprint
from moebert_kernels.compress.batching import sample_rows
from moebert_kernels.compress.demo import find_base_model
from moebert_kernels.compress.distill import DistillSettings, distill
from moebert_kernels.compress.evaluate import batches, evaluate, expert_load
from moebert_kernels.compress.finetune import finetune
from moebert_kernels.compress.importance import Importance, compute_importance
from moebert_kernels.compress.loading import load_teacher
from moebert_kernels.compress.tasks import TaskData, load_task, match_labels, tokenize
from moebert_kernels.compress.token_scores import token_groups
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models import count_parameters, ffn_flops_per_token, find_ffns

FOLDERS = {"sst2": "SST-2", "cola": "CoLA", "mrpc": "MRPC", "stsb": "STS-B"}
SMALL_TASKS = ("cola", "mrpc", "stsb")


@dataclass(frozen=True)
class Contender:
    """One way to make experts, all of the same size and so of the same cost per token.

    Attributes:
        routing: as `adapt` takes it.
        num_experts: E; 1 is one dense feed-forward network of F neurons.
        shared: neurons in every expert, as a part of F. The paper's split needs the more the more experts
            there are: E (F - s) + s must not exceed the dense width.
        tied: whether shared neurons stay the same in all experts while they are trained.
    """

    routing: str
    num_experts: int
    shared: float
    tied: bool = False


CONTENDERS = {
    "dense": Contender("hash-random", 1, 0.0),
    "random-4": Contender("hash-random", 4, 2 / 3),
    "balance-4": Contender("hash-balance", 4, 2 / 3),
    "affinity-4": Contender("hash-affinity", 4, 2 / 3),
    "affinity-4-half": Contender("hash-affinity", 4, 1 / 2),
    "affinity-4-third": Contender("hash-affinity", 4, 1 / 3),
    "affinity-4-tied": Contender("hash-affinity", 4, 2 / 3, tied=True),
    "random-4-tied": Contender("hash-random", 4, 2 / 3, tied=True),
    "random-8": Contender("hash-random", 8, 4 / 7),
    "affinity-8": Contender("hash-affinity", 8, 2 / 3),
    "affinity-8-third": Contender("hash-affinity", 8, 1 / 3),
    "random-16": Contender("hash-random", 16, 4 / 5),
    "affinity-16": Contender("hash-affinity", 16, 2 / 3),
    "affinity-16-third": Contender("hash-affinity", 16, 1 / 3),
}


@dataclass(frozen=True)
class Budget:
    """What every contender gets.

    Attributes:
        train_rows: of a task at most, drawn once.
        max_length: tokens a row is cut to.
        teacher_epochs: of fine-tuning.
        epochs: of distillation.
        learning_rate: of both.
        batch_size: of both.
        importance_rows: training rows that importance is taken on.
    """

    train_rows: int
    max_length: int
    teacher_epochs: float
    epochs: float
    learning_rate: float
    batch_size: int
    importance_rows: int


def tie_shared(student: PreTrainedModel, num_shared: int) -> None:
    """Keep the first `num_shared` neurons of all experts of a layer alike while they are trained.

    They begin alike and get the sum of their gradients, so every step of the optimizer is the same for all of
    them: what one stored copy would learn.
    """

    def share(gradient: torch.Tensor, neuron_dim: int) -> torch.Tensor:
        gradient = gradient.clone()
        shared = gradient.narrow(neuron_dim, 0, num_shared)
        shared.copy_(shared.sum(0, keepdim=True).expand_as(shared))
        return gradient

    for module in student.modules():
        if isinstance(module, MoEFFN):
            module.w1_EFD.register_hook(lambda gradient: share(gradient, 1))
            module.w2_EDF.register_hook(lambda gradient: share(gradient, 2))
            if module.b1_EF is not None:
                module.b1_EF.register_hook(lambda gradient: share(gradient, 1))


def _tied_parameters(student: PreTrainedModel, num_shared: int) -> int:
    """How many parameters are stored if shared neurons are stored once."""
    copies = 0
    for module in student.modules():
        if isinstance(module, MoEFFN):
            num_experts, _, hidden = module.w1_EFD.shape
            copies += (num_experts - 1) * num_shared * (2 * hidden + (module.b1_EF is not None))
    return count_parameters(student) - copies


def _say(text: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}")


class _Task:
    """A task's teacher, its scores, and the contenders made of them."""

    def __init__(self, name: str, raw: TaskData, model: Path, budget: Budget, out: Path, device: str):
        order = torch.randperm(len(raw.train), generator=torch.Generator().manual_seed(0))
        rows = raw.train.select(order[: budget.train_rows].sort().values.tolist())
        self.raw = TaskData(raw.task, rows, raw.validation)
        self.name, self.model, self.budget, self.out, self.device = name, model, budget, out, device
        how = asdict(budget)
        epochs, importance_rows = how.pop("epochs"), how.pop("importance_rows")
        self.teacher_from = [name, str(model), how]
        self.scores_from = [self.teacher_from, importance_rows]
        self.students_from = [self.scores_from, epochs]

    def prepare(self) -> None:
        """Make the teacher and its scores, or load them."""
        budget, folder = self.budget, self.out / "teachers" / self.name

        def teach() -> dict[str, float]:
            shutil.rmtree(folder, ignore_errors=True)
            return finetune(
                self.model,
                self.raw,
                folder,
                epochs=budget.teacher_epochs,
                lr=budget.learning_rate,
                batch_size=budget.batch_size,
                max_length=budget.max_length,
                training_arguments={"disable_tqdm": True},
            )

        _say(f"{self.name}: teacher")
        self.stage("teacher", self.teacher_from, teach, folder)
        self.teacher, self.tokenizer = load_teacher(folder)
        torch.nn.Module.to(self.teacher, self.device)
        self.data = tokenize(match_labels(self.raw, self.teacher.config), self.tokenizer, budget.max_length)
        self.width = find_ffns(self.teacher)[0].w1.out_features
        vocab_size = self.teacher.config.vocab_size
        self.counts_V = token_counts(self.data.train, vocab_size)
        scores = self.out / "teachers" / f"{self.name}.importance.safetensors"

        def score() -> None:
            rows = sample_rows(self.data.train, budget.importance_rows, seed=0)
            compute_importance(
                self.teacher,
                batches(rows, self.tokenizer, device=self.device),
                group_V=token_groups(self.teacher, token_counts(rows, vocab_size)),
            ).save(scores)

        _say(f"{self.name}: importance")
        self.stage("importance", self.scores_from, score, scores)
        self.importance = Importance.load(scores)

    def run(self, name: str, contender: Contender, seed: int) -> None:
        """Cut, evaluate, distil, evaluate; or nothing, if that is done."""
        run_name = f"{name}-seed{seed}"
        checkpoints = self.out / "checkpoints" / self.name / run_name
        budget = self.budget
        expert_size = self.width // 4
        num_shared = math.ceil(contender.shared * expert_size - 1e-9)

        def work() -> dict[str, Any]:
            student = adapt(
                self.teacher,
                self.importance,
                num_experts=contender.num_experts,
                expert_size=expert_size,
                num_shared=num_shared,
                routing=contender.routing,
                seed=seed,
                token_counts_V=self.counts_V,
            )
            before = self.quality(student)
            load_LE = expert_load(student, batches(self.data.validation, self.tokenizer, device=self.device))
            if contender.tied:
                tie_shared(student, num_shared)
            settings = DistillSettings(budget.epochs, budget.learning_rate, 1.0, budget.batch_size, 0.0, seed)
            distill(student, self.teacher, self.data.train, self.tokenizer, settings, checkpoints)
            return {
                "task": self.name,
                "metric": self.raw.task.main_metric,
                "contender": name,
                "seed": seed,
                "before": before,
                "after": self.quality(student),
                "largest_load": max(max(load_E) for load_E in load_LE) * contender.num_experts,
                "parameters_stored": (
                    _tied_parameters(student, num_shared) if contender.tied else count_parameters(student)
                ),
                "ffn_flops_per_token": ffn_flops_per_token(student),
            }

        record = self.stage(run_name, [self.students_from, asdict(contender), seed], work)
        shutil.rmtree(checkpoints, ignore_errors=True)
        main = record["metric"]
        _say(
            f"{self.name} {run_name}: {main} {record['before'][main]:.4f} before distillation,"
            f" {record['after'][main]:.4f} after; largest load {record['largest_load']:.2f} times the mean"
        )

    def quality(self, model: PreTrainedModel) -> dict[str, float]:
        return evaluate(model, self.data, self.tokenizer)

    def stage(self, name: str, made_from: Any, work, *outputs: Path) -> Any:
        record = self.out / "records" / self.name / f"{name}.json"
        return Stage(record, fingerprint(made_from), outputs).run(work)

    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder of SST-2, CoLA, MRPC and STS-B.")],
    out: Annotated[Path, typer.Option(help="Folder for teachers, scores, checkpoints and records.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a pre-trained BERT; default: the demonstration's MiniLM.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(FOLDERS),
    contenders: Annotated[str, typer.Option(help="With commas between them.")] = ",".join(CONTENDERS),
    seeds: Annotated[int, typer.Option(min=1, help="Of CoLA, MRPC and STS-B.")] = 3,
    sst2_seeds: Annotated[int, typer.Option(min=1, help="Of SST-2.")] = 1,
    train_rows: Annotated[int, typer.Option(min=1, help="Of a task at most.")] = 20_000,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 64,
    teacher_epochs: Annotated[float, typer.Option(help="Of fine-tuning.")] = 3.0,
    epochs: Annotated[float, typer.Option(help="Of distillation.")] = 2.0,
    lr: Annotated[float, typer.Option(help="Of both.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Of both.")] = 32,
    importance_rows: Annotated[int, typer.Option(min=1, help="Training rows to score neurons on.")] = 4096,
    limit: Annotated[float | None, typer.Option(help="Start nothing more after so many seconds.")] = None,
) -> None:
    """Make teachers and contenders, or go on with them."""
    unknown = [name for name in tasks.split(",") if name not in FOLDERS]
    unknown += [name for name in contenders.split(",") if name not in CONTENDERS]
    if unknown:
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; tasks are {', '.join(FOLDERS)}, contenders "
            f"{', '.join(CONTENDERS)}"
        )
    started = time.monotonic()
    budget = Budget(train_rows, max_length, teacher_epochs, epochs, lr, batch_size, importance_rows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with exclusive(out):
        for task_name in tasks.split(","):
            raw = load_task(task_name, data / FOLDERS[task_name])
            task = _Task(task_name, raw, model or find_base_model(), budget, out, device)
            if limit is not None and time.monotonic() - started > limit:
                return
            task.prepare()
            for seed in range(seeds if task_name in SMALL_TASKS else sst2_seeds):
                for name in contenders.split(","):
                    if limit is not None and time.monotonic() - started > limit:
                        _say("time is up; the same command goes on from here")
                        return
                    task.run(name, CONTENDERS[name], seed)


@app.command()
def table(out: Annotated[Path, typer.Argument(help="Folder of `run`.")]) -> None:
    """Print what there is: main metrics as mean and standard deviation over seeds, times 100."""
    typer.echo(markdown(out))


def markdown(out: Path) -> str:
    """A table of the records in `out`: a row for each contender, two columns for each task."""
    runs: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    teachers = {}
    for path in sorted((out / "records").glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record["done"]:
            continue
        if path.stem == "teacher":
            teachers[path.parent.name] = record["result"]
        elif path.stem != "importance":
            runs[record["result"]["contender"]][path.parent.name].append(record["result"])
    tasks = [task for task in FOLDERS if task in teachers]
    heads = [f"{task} before | {task} after" for task in tasks]
    lines = [
        f"| | {' | '.join(heads)} | mean after | largest load | parameters |",
        "|---|" + "---|" * (2 * len(tasks) + 3),
    ]
    metrics = {
        result["task"]: result["metric"]
        for by_task in runs.values()
        for results in by_task.values()
        for result in results
    }
    cells = [f"| {100 * teachers[task][metrics[task]]:.1f}" if task in metrics else "|" for task in tasks]
    lines.append("| teacher " + " ".join(f"| {cell}" for cell in cells) + " | | | |")
    for name in [name for name in CONTENDERS if name in runs]:
        cells, means, results = [], [], []
        for task in tasks:
            done = runs[name][task]
            for when in ("before", "after"):
                cells.append(_spread([100 * r[when][r["metric"]] for r in done]))
            if done:
                means.append(statistics.mean(100 * r["after"][r["metric"]] for r in done))
            results += done
        mean = f"{statistics.mean(means):.2f}" if len(means) == len(tasks) else "-"
        load = max(r["largest_load"] for r in results)
        stored = max(r["parameters_stored"] for r in results) / 1e6
        lines.append(f"| {name} | {' | '.join(cells)} | {mean} | {load:.2f} | {stored:.1f} M |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    app()
