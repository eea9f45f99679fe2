"""What graphs answer: the demonstration's teacher, narrow model and student, in 32 and in 8 bits.

    python -m bench serve --quality runs/demo --out bench/results

runs/demo is what `moebert demo` has left. The student and the narrow model are made and fitted without labels
or training, as `bench.fit` makes them, under runs/demo/serve; what an earlier run has left there is taken up.
int8 is throughout, as in what is timed: `moebert export` leaves a layer in 32 bits where that answers too
differently. ONNX Runtime scores all on the validation rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moebert_kernels.compress.data.tasks import CsvOptions, load_task, match_labels, tokenize
from moebert_kernels.compress.evaluation.likeness import prediction_likeness
from moebert_kernels.compress.evaluation.quality import predict
from moebert_kernels.compress.runs.pipeline import compress
from moebert_kernels.compress.storage.artifacts import write_json
from moebert_kernels.compress.storage.loading import load_model
from moebert_kernels.environment import describe_environment
from moebert_kernels.export.exporting import export
from moebert_kernels.export.folder import GRAPH, QUANTIZED
from moebert_kernels.export.runtime import GraphModel

from ..fit import LENGTH, SETTINGS, unlabelled
from .contenders import quantize_all

FILE = "serve-quality.json"
_GRAPHS = {"fp32": GRAPH, "int8": QUANTIZED}


def measure_quality(demo: Path, out: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Make students where there are none yet, export and score; with `out`, write a file there.

    Args:
        demo: folder of a finished `moebert demo`.
        out: folder for `FILE`.
        say: is told the table, and what is being done.

    Returns:
        "models": by name and precision "accuracy" on the labels, "agreement" with and "divergence" from the
        teacher in PyTorch; "rows" validated, "environment".
    """
    room = demo / "serve"
    room.mkdir(exist_ok=True)
    students = room / SETTINGS.routing
    compress(SETTINGS, unlabelled(demo, room), demo / "teacher", students, say=say)
    folders = {
        "teacher": demo / "teacher",
        "narrow": students / "work" / "narrow" / "fitted",
        "ours": students / "student",
    }
    columns = CsvOptions(validation_file=demo / "data" / "validation.csv")
    data = load_task("csv", demo / "data" / "train.csv", csv=columns)
    teacher, tokenizer = load_model(demo / "teacher")
    rows = tokenize(match_labels(data, teacher.config), tokenizer, LENGTH).validation_sets[""]
    theirs = predict(teacher, rows.rows, tokenizer)
    models: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        served = room / "exported" / name
        shutil.rmtree(served, ignore_errors=True)
        export(folder, served)
        quantize_all(served)
        config = load_model(folder)[0].config
        models[name] = {}
        for precision, graph in _GRAPHS.items():
            model: Any = GraphModel(served / graph, config)
            answers = predict(model, rows.rows, tokenizer)
            scores = rows.score(answers) | prediction_likeness("classification", answers, theirs)
            models[name][precision] = {key: float(value) for key, value in scores.items()}
    found = {"models": models, "rows": len(rows.rows), "environment": asdict(describe_environment())}
    if out is not None:
        write_json(out / FILE, found)
    say(table(found))
    return found


def table(found: dict[str, Any]) -> str:
    """What `measure_quality` found, as markdown."""
    metrics = ("accuracy", "agreement", "divergence")
    lines = ["| | accuracy | agrees with the teacher | divergence |", "|---|--:|--:|--:|"]
    for name, model in found["models"].items():
        for precision in _GRAPHS:
            cells = " | ".join(f"{model[precision][metric]:.3f}" for metric in metrics)
            lines.append(f"| {name} {precision} | {cells} |")
    source = (
        f"*`python -m bench serve --quality`: ONNX Runtime, {found['rows']:,} validation rows of the "
        f"demonstration, int8 throughout, students fitted without labels or training; the teacher is that "
        f"in PyTorch; commit {found['environment']['commit']}.*"
    )
    return "\n".join([*lines, "", source])
