"""How to cut and fit a student: choices compared before any training, by how near it comes to the teacher.

    python -m bench.choices runs/demo --to bench/results/choices.json

runs/demo is what `moebert demo` has left. Students are made without labels, on the first 2,000 of its
docstrings if nothing else is said, and held against the teacher on docstrings that neither has seen.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.compress.experts.adaptation import split_neurons
from moebert_kernels.compress.experts.affinity import split_by_affinity
from moebert_kernels.compress.experts.fitting import RIDGE
from moebert_kernels.models import count_parameters, find_ffns, narrow_ffns, to_moe
from moebert_kernels.routing import hash_random_tables

from . import alternatives
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

ALL = 1 << 30


@dataclass(frozen=True)
class Choice:
    """A student.

    Attributes:
        experts: E; 0 is one dense network.
        shared: part of an expert's neurons that all have.
        tables: "affinity"; "random"; "error", affinity's changed by the fitted experts' errors; "oracle", for
            every token the expert that errs least.
        neurons: "importance"; "greedy", those that add most to the fitted output; "own greedy", of which the
            shared ones are by importance.
        fit: "least squares", the product's; "means", biases alone, by the mean of what was cut; "none".
        rows: made on.
        ridge: of the fit.
    """

    experts: int = 4
    shared: float = 2 / 3
    tables: str = "affinity"
    neurons: str = "importance"
    fit: str = "least squares"
    rows: int = ROWS
    ridge: float = RIDGE


BASE = Choice()
NARROW = Choice(experts=0, tables="")
# Shared neurons that are stored once and fitted jointly: a row as soon as a student can be made so.
CHOICES = {
    "4 experts": BASE,
    "narrow": NARROW,
    "8 experts": Choice(8),
    "16 experts": Choice(16),
    "random tables": Choice(tables="random"),
    "1/3 shared": Choice(shared=1 / 3),
    "none shared": Choice(shared=0.0),
    "ridge 0.01": Choice(ridge=0.01),
    "ridge 0.1": Choice(ridge=0.1),
    "500 rows": Choice(rows=500),
    "narrow, 500 rows": Choice(experts=0, tables="", rows=500),
    "all rows": Choice(rows=ALL),
    "narrow, all rows": Choice(experts=0, tables="", rows=ALL),
    "8 experts, all rows": Choice(8, rows=ALL),
    "16 experts, all rows": Choice(16, rows=ALL),
    "as cut": Choice(fit="none"),
    "means of the cut": Choice(fit="means"),
    "narrow, as cut": Choice(experts=0, tables="", fit="none"),
    "narrow, means of the cut": Choice(experts=0, tables="", fit="means"),
    "greedy neurons": Choice(neurons="greedy"),
    "greedy own neurons": Choice(neurons="own greedy"),
    "narrow, greedy neurons": Choice(experts=0, tables="", neurons="greedy"),
    "tables by error": Choice(tables="error"),
    "oracle": Choice(tables="oracle"),
    "16 experts, 1/3 shared": Choice(16, shared=1 / 3),
    "16 experts, random tables": Choice(16, shared=4 / 5, tables="random"),
}


class Maker:
    """Makes students of a testbed.

    Args:
        bed: of whom.
        seed: of what is drawn.
    """

    def __init__(self, bed: Testbed, seed: int):
        self.bed, self.seed = bed, seed
        self.ffns = find_ffns(bed.teacher)
        self.width = self.ffns[0].w1.out_features // 4

    def judged(self, choice: Choice) -> tuple[dict[str, float], Likeness]:
        """Make the student; how near it is to the teacher on validation rows."""
        bed = self.bed
        student, index_LEF, tables_LV = self._cut(choice)
        if choice.fit == "means":
            alternatives.means_of_cut(
                student, index_LEF, lambda layer: self._products(choice, layer, tables_LV), bed.teacher
            )
        elif choice.fit == "least squares":
            self._fit(student, choice)
        if choice.tables == "error":
            assert tables_LV is not None
            for _ in range(2):
                tables_LV = alternatives.tables_by_error(
                    student,
                    bed.teacher,
                    bed.to_fit(choice.rows, self.seed)[0],
                    self._groups(choice),
                    tables_LV,
                )
                student = self._moe(choice, index_LEF, tables_LV)
                self._fit(student, choice)
        told = {"parameters_stored": float(count_parameters(student))}
        if choice.tables == "oracle":
            oracle: Any = alternatives.Oracle(student, bed.teacher)
            likeness = bed.likeness(oracle)
            return {"layer_error": float(np.mean(oracle.error_L))} | told, likeness
        return {"layer_error": bed.layer_error(student)} | told, bed.likeness(student)

    def _fit(self, student: PreTrainedModel, choice: Choice) -> None:
        self.bed.fit(student, choice.rows, self.seed, ridge=choice.ridge)

    def _groups(self, choice: Choice) -> Tensor:
        tokens = self.bed.importance(min(choice.rows, ROWS), self.seed).tokens
        assert tokens is not None
        return tokens.group_V

    def _cut(self, choice: Choice) -> tuple[PreTrainedModel, Tensor, Tensor | None]:
        """The student before it is fitted, its neurons [L, E, F] and tables [L, V]."""
        importance = self.bed.importance(min(choice.rows, ROWS), self.seed)
        shared = math.ceil(choice.shared * self.width - 1e-9)
        tables_LV = None
        if not choice.experts:
            order_LF = importance.scores_LF.argsort(dim=1, descending=True, stable=True)
            index_LEF = order_LF[:, None, : self.width]
        elif choice.tables == "random":
            vocabulary = self.bed.teacher.config.vocab_size
            tables_LV = hash_random_tables(len(self.ffns), vocabulary, choice.experts, seed=self.seed)
            index_LEF = split_neurons(importance.scores_LF, choice.experts, self.width, shared)
        else:
            split = split_by_affinity(
                importance,
                self.bed.counts_V(min(choice.rows, ROWS), self.seed),
                num_experts=choice.experts,
                expert_size=self.width,
                num_shared=shared,
                seed=self.seed,
            )
            index_LEF, tables_LV = split.index_LEF, split.tables_LV
        if choice.neurons != "importance":
            first = importance.scores_LF.argsort(dim=1, descending=True, stable=True)[:, :shared]
            layers = []
            for layer, dense in enumerate(self.ffns):
                products_EGG = self._products(choice, layer, tables_LV)
                if choice.neurons == "greedy" and choice.experts:
                    given = alternatives.greedy_neurons(products_EGG.sum(0), dense, shared)
                else:
                    given = first[layer] if choice.experts else first[layer, :0]
                layers.append(
                    torch.stack(
                        [
                            alternatives.greedy_neurons(products_GG, dense, self.width, given)
                            for products_GG in products_EGG
                        ]
                    )
                )
            index_LEF = torch.stack(layers)
        if tables_LV is None:
            return narrow_ffns(self.bed.teacher, index_LEF[:, 0]), index_LEF, None
        return self._moe(choice, index_LEF, tables_LV), index_LEF, tables_LV

    def _moe(self, choice: Choice, index_LEF: Tensor, tables_LV: Tensor) -> PreTrainedModel:
        return to_moe(
            self.bed.teacher,
            index_LEF,
            num_shared_neurons=0,
            routing="hash-random" if choice.tables == "random" else "hash-affinity",
            tables_LV=tables_LV,
        )

    def _products(self, choice: Choice, layer: int, tables_LV: Tensor | None) -> Tensor:
        seen = self._seen(choice)[layer]
        expert_T = torch.zeros_like(seen.ids_T) if tables_LV is None else tables_LV[layer].long()[seen.ids_T]
        return alternatives.products(seen, self.ffns[layer], expert_T, max(choice.experts, 1))

    def _seen(self, choice: Choice) -> list[alternatives.Seen]:
        if not hasattr(self, "_of_teacher"):
            batches, _ = self.bed.to_fit(choice.rows, self.seed)
            self._of_teacher = alternatives.layers_see(self.bed.teacher, batches)
        return self._of_teacher


def compare(bed: Testbed, records: Records, seeds: int, wanted: list[str]) -> None:
    """Make every row that is not there: all with one seed, then with the next."""
    for seed in range(seeds):
        maker = Maker(bed, seed)
        for name in wanted:
            choice = CHOICES[name]

            def make(maker: Maker = maker, choice: Choice = choice, seed: int = seed) -> dict[str, Any]:
                found, likeness = maker.judged(choice)
                told = {
                    "divergence": likeness.divergence,
                    "agreement": likeness.agreement,
                    "accuracy": likeness.accuracy,
                    "choice": asdict(choice),
                    "rows_judged": len(bed.validation),
                    "rows": len(bed.rows(choice.rows, seed)[0]),
                }
                if choice == BASE:
                    return found | told | {"row_by_row": likeness.written()}
                return found | told | {"times": likeness.times(base())}

            def base(seed: int = seed) -> Likeness:
                row = records.find({"subject": bed.name, "name": "4 experts", "seed": seed})
                if row is None:
                    raise typer.BadParameter("the row '4 experts' is what others are compared with: make it")
                return Likeness.read(row)

            records.row({"subject": bed.name, "name": name, "seed": seed}, make)


def table(rows: list[dict[str, Any]]) -> str:
    """What was found, for a README: of each testbed a table."""
    drawn = []
    for bed in dict.fromkeys(row["subject"] for row in rows):
        mine = [row for row in rows if row["subject"] == bed]
        lines = [
            f"| {bed} | rows | layer error | divergence | times that of the first | agreement | accuracy "
            "| parameters stored | seconds |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for name in [name for name in CHOICES if any(row["name"] == name for row in mine)]:
            seeds = [row for row in mine if row["name"] == name]
            first, *others = seeds
            mean = {key: float(np.mean([row[key] for row in seeds])) for key in _MEASURED}
            times = "–"
            if "times" in first:
                found, low, high = first["times"]
                times = f"{found:.2f} [{low:.2f}, {high:.2f}]"
                times += "".join(f"; {row['times'][0]:.2f}" for row in others)
            cells = [
                name,
                f"{first['rows']:,}",
                f"{mean['layer_error']:.3f}",
                f"{mean['divergence']:.4f}",
                times,
                f"{mean['agreement']:.3f}",
                f"{mean['accuracy']:.3f}",
                f"{first['parameters_stored'] / 1e6:.1f} M",
                f"{first['seconds']:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        commits = ", ".join(dict.fromkeys(row["environment"]["commit"] for row in mine))
        lines += [
            "",
            f"*`python -m bench.choices`: judged on {mine[0]['rows_judged']:,} rows that neither student nor "
            f"teacher has seen; {mine[0]['environment']['cpu']}, one thread, beside other work; commit "
            f"{commits}.*",
        ]
        drawn.append("\n".join(lines))
    return "\n\n".join(drawn)


_MEASURED = ("layer_error", "divergence", "agreement", "accuracy")

app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def run(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="The json file to write, row by row.")] = Path(
        "bench/results/choices.json"
    ),
    train_rows: TrainRows = None,
    validation: Validation = None,
    label: Label = "label",
    seeds: Annotated[int, typer.Option(min=1, help="Of all that is drawn.")] = 1,
    only: Only = None,
) -> None:
    """Compare, or go on with it."""
    bed = testbed_of(folder, train_rows, validation, label)
    compare(bed, Records(to), seeds, only.split("|") if only else list(CHOICES))
    typer.echo(table(Records(to).rows))


if __name__ == "__main__":
    app()
