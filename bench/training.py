"""How to go on from a fitted student: trainings compared by how near they come to the teacher.

    python -m bench.training runs/demo --to bench/results/training.json

runs/demo is what `moebert demo` has left. Every training begins with the same fitted student; what it is
after each epoch is held against the teacher on rows that neither has seen.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from moebert_kernels.compress.data.batching import LABEL_COLUMNS
from moebert_kernels.compress.experts.adaptation import adapt, narrow
from moebert_kernels.compress.experts.layerwise import evaluating
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models import find_ffns
from moebert_kernels.models.families import DenseFFN

from .quality.remembered import RememberedTeacher
from .testbed import (
    ROWS,
    Folder,
    Label,
    Likeness,
    Only,
    Records,
    Testbed,
    TrainRows,
    Validation,
    testbed_of,
)


@dataclass(frozen=True)
class Training:
    """One way to go on.

    Attributes:
        student: of `STUDENTS`.
        learning_rate: of distillation; 0 for none.
        epochs: of it.
        warmup: as `DistillSettings` has it, as are the next three.
        dropout: too.
        bf16: too.
        distill_weight: too.
        labels: whether the rows have labels.
        rows: to fit to and train on.
        local_steps: of Adam for every expert by itself, on stored activations, before; and solved again.
    """

    student: str = "affinity-4"
    learning_rate: float = 1e-4
    epochs: float = 2.0
    warmup: float = 0.0
    dropout: bool = True
    bf16: bool = False
    distill_weight: float = 1.0
    labels: bool = True
    rows: int = ROWS
    local_steps: int = 0


class Fits:
    """Fitted students of a testbed, each made once."""

    def __init__(self, bed: Testbed):
        self.bed = bed
        self.fitted = lru_cache(maxsize=2)(self._fitted)

    def _fitted(self, name: str, rows: int) -> tuple[PreTrainedModel, Likeness]:
        bed = self.bed
        importance, counts_V = bed.importance(ROWS, 0), bed.counts_V(ROWS, 0)
        width = find_ffns(bed.teacher)[0].w1.out_features // 4
        if name == "narrow":
            student = narrow(bed.teacher, importance.scores_LF, width)
        else:
            student = adapt(
                bed.teacher,
                importance,
                num_experts=int(name.removeprefix("affinity-")),
                expert_size=width,
                routing="hash-affinity",
                token_counts_V=counts_V,
            )
        bed.fit(student, rows)
        return student, bed.likeness(student)


def train(bed: Testbed, fits: Fits, how: Training) -> dict[str, Any]:
    """Train as is said, and return what to tell of it."""
    fitted, before = fits.fitted(how.student, how.rows)
    student = copy.deepcopy(fitted)
    after: list[Likeness] = []
    found: dict[str, Any] = {"training": asdict(how), "fitted": told(before)}
    if how.local_steps:
        take_local_steps(bed, student, how.local_steps)
        bed.fit(student)
        local = bed.likeness(student)
        found["local"] = told(local)
        found["layer_error"] = [bed.layer_error(model) for model in (fitted, student)]
    if how.learning_rate:
        rows, held_out = bed.rows(how.rows, 0)
        if not how.labels:
            rows = rows.remove_columns("labels")
        teacher: Any = copy.deepcopy(bed.teacher)  # training freezes it
        if how.rows <= 2 * ROWS:
            teacher = RememberedTeacher(bed.teacher)
        settings = DistillSettings(
            how.epochs,
            how.learning_rate,
            how.distill_weight,
            warmup=how.warmup,
            dropout=how.dropout,
            bf16=how.bf16,
        )
        room = Path(tempfile.mkdtemp(prefix="bench-training-"))
        try:
            trained = distill(
                student,
                teacher,
                rows,
                bed.tokenizer,
                settings,
                room,
                held_out=held_out,
                callbacks=[_AfterEpochs(lambda: after.append(bed.likeness(student)))],
            )
        finally:
            shutil.rmtree(room)
        assert trained.nearest is not None
        found["held_out"], found["kept"] = trained.nearest
        saved = bed.likeness(student)
        found["saved"], found["saved_times"] = told(saved), saved.times(before)
        found["layer_losses"] = [trained.losses[0]["layer"], trained.losses[-1]["layer"]]
    else:
        after.append(local)
    found["epochs"] = [told(each) for each in after]
    found["divergence"] = after[-1].divergence
    found["agreement"], found["accuracy"] = after[-1].agreement, after[-1].accuracy
    found["times"] = after[-1].times(before)
    return found


def told(found: Likeness) -> list[float]:
    """Divergence, agreement and accuracy, to four places."""
    return [round(value, 4) for value in (found.divergence, found.agreement, found.accuracy)]


class _AfterEpochs(TrainerCallback):
    def __init__(self, look):
        self._look = look

    def on_epoch_end(self, args, state, control, **kwargs):
        self._look()


def take_local_steps(
    bed: Testbed, student: PreTrainedModel, steps: int, *, lr: float = 1e-3, batch: int = 1024
) -> None:
    """Train every expert by itself to put out, before the LayerNorm, what the teacher's layer does.

    All four of its tensors, by Adam with a falling learning rate, on the tokens that reach it in the student
    as it is; a tenth of the tokens say which weights to keep.
    """
    to_fit, _ = bed.to_fit(ROWS, 0)
    layers = list(
        zip(find_ffns(bed.teacher), [m for m in student.modules() if isinstance(m, MoEFFN)], strict=True)
    )
    Parts = list[list[Tensor]]  # by layer, by batch
    inputs_L: Parts = [[] for _ in layers]
    sums_L: Parts = [[] for _ in layers]
    experts_L: Parts = [[] for _ in layers]
    with evaluating(student, bed.teacher), _caught(layers) as caught:
        for rows in to_fit:
            features = {name: value for name, value in rows.items() if name not in LABEL_COLUMNS}
            real_T = rows["attention_mask"].flatten() != 0
            bed.teacher(**features)
            student(**features, pack=False)
            for layer, (s_BSD, x_BSD, expert_T) in enumerate(caught):
                sums_L[layer].append(s_BSD.flatten(0, -2)[real_T])
                inputs_L[layer].append(x_BSD.flatten(0, -2)[real_T])
                experts_L[layer].append(expert_T[real_T])
    for layer, (dense, part) in enumerate(layers):
        x_TD, s_TD, expert_T = (torch.cat(of[layer]) for of in (inputs_L, sums_L, experts_L))
        weight_T = 1 / (s_TD.var(1, correction=0) + dense.norm.eps)
        generator = torch.Generator().manual_seed(layer)
        for e in range(part.num_experts):
            mine = (expert_T == e).nonzero().squeeze(1)
            mine = mine[torch.randperm(len(mine), generator=generator)]
            _train_expert(part, e, x_TD, s_TD - x_TD, weight_T, mine, steps, lr, batch, generator)


def _train_expert(
    part: MoEFFN,
    e: int,
    x_TD: Tensor,
    wanted_TD: Tensor,
    weight_T: Tensor,
    mine: Tensor,
    steps: int,
    lr: float,
    batch: int,
    generator: torch.Generator,
) -> None:
    tensors = [part.w1_EFD, part.bias1_EF, part.w2_EDF, part.bias2_ED]
    weights = [tensor[e].detach().clone().requires_grad_() for tensor in tensors if tensor is not None]
    held_out, mine = mine[: len(mine) // 10], mine[len(mine) // 10 :]

    def loss(tokens: Tensor) -> Tensor:
        w1_FD, b1_F, w2_DF, b2_D = weights
        y_tD = F.linear(F.gelu(F.linear(x_TD[tokens], w1_FD, b1_F)), w2_DF, b2_D)
        return ((y_tD - wanted_TD[tokens]).square().mean(1) * weight_T[tokens]).mean()

    optimizer = torch.optim.Adam(weights, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    least, kept = float("inf"), weights
    for step in range(steps + 1):
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                now = float(loss(held_out))
            if now < least:
                least, kept = now, [weight.detach().clone() for weight in weights]
        tokens = mine[torch.randint(len(mine), (batch,), generator=generator)]
        optimizer.zero_grad()
        loss(tokens).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for tensor, weight in zip(tensors, kept, strict=True):
            assert tensor is not None
            tensor[e] = weight


@contextmanager
def _caught(layers: list[tuple[DenseFFN, MoEFFN]]) -> Iterator[list[list[Tensor]]]:
    """Of a pass of the teacher, then one of the student: by layer, the sum, the input, the experts."""
    caught: list[list[Tensor]] = [[] for _ in layers]

    def of_teacher(layer: int) -> Callable[..., None]:
        return lambda norm, args: caught[layer].__setitem__(slice(None), args)

    def of_student(layer: int) -> Callable[..., None]:
        def hook(part: nn.Module, args: tuple, options: dict[str, Any]) -> None:
            caught[layer] += [args[0], options["routing"].plan.expert_ids_TK[:, 0]]

        return hook

    with ExitStack() as hooks:
        for layer, (dense, part) in enumerate(layers):
            hooks.callback(dense.norm.register_forward_pre_hook(of_teacher(layer)).remove)
            hooks.callback(part.register_forward_pre_hook(of_student(layer), with_kwargs=True).remove)
        yield caught


TRAININGS = {
    "as from the cut": Training(),
    "no labels": Training(labels=False),
    "no labels, dropout off": Training(labels=False, dropout=False),
    "dropout off": Training(dropout=False),
    "no labels, dropout off, 3e-5": Training(labels=False, dropout=False, learning_rate=3e-5),
    "no labels, dropout off, 3e-4": Training(labels=False, dropout=False, learning_rate=3e-4),
    "no labels, dropout off, 3e-5, more text": Training(
        labels=False, dropout=False, learning_rate=3e-5, rows=1 << 30
    ),
    "no labels, dropout off, 3e-5, more text, warm-up": Training(
        labels=False, dropout=False, learning_rate=3e-5, rows=1 << 30, warmup=0.1
    ),
    "no labels, dropout off, warm-up": Training(labels=False, dropout=False, warmup=0.1),
    "no labels, dropout off, 3e-5, warm-up": Training(
        labels=False, dropout=False, learning_rate=3e-5, warmup=0.1
    ),
    "local steps": Training(learning_rate=0.0, local_steps=300),
    "narrow, no labels, dropout off, 3e-5": Training(
        labels=False, dropout=False, learning_rate=3e-5, student="narrow"
    ),
    "local steps, no labels, dropout off, 3e-5": Training(
        labels=False, dropout=False, learning_rate=3e-5, local_steps=300
    ),
    "no labels, dropout off, 1e-5": Training(labels=False, dropout=False, learning_rate=1e-5),
    "3e-5": Training(learning_rate=3e-5),
    "dropout off, lambda 5": Training(dropout=False, distill_weight=5.0),
    "no labels, dropout off, bfloat16": Training(labels=False, dropout=False, bf16=True),
    "no labels, dropout off, 3e-5, 5 epochs": Training(
        labels=False, dropout=False, learning_rate=3e-5, epochs=5.0
    ),
    "1e-5": Training(learning_rate=1e-5),
    "no labels, dropout off, 3e-6": Training(labels=False, dropout=False, learning_rate=3e-6),
}


def table(rows: list[dict[str, Any]]) -> str:
    """What was found, for a README: of each testbed a table."""
    drawn = []
    for bed in dict.fromkeys(row["subject"] for row in rows):
        mine = [row for row in rows if row["subject"] == bed]
        lines = [
            f"| {bed} | divergence, as fitted → after each epoch | times as fitted | agreement "
            "| accuracy | saved, by held-out rows | its divergence, times as fitted | seconds |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in sorted(mine, key=lambda row: list(TRAININGS).index(row["name"])):
            first, agreed, right = row["fitted"]
            found, low, high = row["times"]
            cells = [
                row["name"],
                f"{first:.4f} → {' → '.join(f'{divergence:.4f}' for divergence, _, _ in row['epochs'])}",
                f"{found:.2f} [{low:.2f}, {high:.2f}]",
                f"{agreed:.3f} → {row['agreement']:.3f}",
                f"{right:.3f} → {row['accuracy']:.3f}",
                *_saved(row),
                f"{row['seconds']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        commits = ", ".join(dict.fromkeys(row["environment"]["commit"] for row in mine))
        lines += [
            "",
            "*`python -m bench.training`: learning rate 1e-4, two epochs, lambda 1, labels and dropout, "
            f"unless a row says otherwise; {mine[0]['environment']['cpu']}, one thread, beside other work; "
            f"commit {commits}.*",
        ]
        drawn.append("\n".join(lines))
    return "\n\n".join(drawn)


def _saved(row: dict[str, Any]) -> tuple[str, str]:
    """Which student distillation saves, and how far it is on the rows that decide nothing."""
    kept = row.get("kept")
    if not kept:
        return ("–", "–") if kept is None else ("as fitted", "1.00")
    found, low, high = row.get("saved_times", row["times"])
    return f"epoch {kept}", f"{found:.2f} [{low:.2f}, {high:.2f}]"


app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def run(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="The json file to write, row by row.")] = Path(
        "bench/results/training.json"
    ),
    train_rows: TrainRows = None,
    validation: Validation = None,
    label: Label = "label",
    only: Only = None,
) -> None:
    """Compare, or go on with it."""
    bed = testbed_of(folder, train_rows, validation, label)
    records, fits = Records(to), Fits(bed)
    for name in only.split("|") if only else TRAININGS:
        records.row({"subject": bed.name, "name": name}, partial(train, bed, fits, TRAININGS[name]))
    typer.echo(table(records.rows))


if __name__ == "__main__":
    app()
