"""Teacher and text in, student out: what cutting and fitting give without labels or training, and when.

    python -m bench.fit runs/demo --to bench/results/fit.json

runs/demo is what `moebert demo` has left: its teacher, and its snippets, of which the texts alone are read to
make students. Their labels serve to score what comes out. Besides, how long a model of BERT-base's size
takes in bfloat16: its weights are random, its texts the demonstration's words one after the other, in rows of
64 tokens.
"""

from __future__ import annotations

import csv
import itertools
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from moebert_kernels.compress.data.tasks import CsvOptions, TaskData, load_task, match_labels, tokenize
from moebert_kernels.compress.data.tasks.texts import load_texts
from moebert_kernels.compress.evaluation.likeness import prediction_likeness
from moebert_kernels.compress.evaluation.quality import predict
from moebert_kernels.compress.runs.pipeline import compress
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.storage.artifacts import write_json
from moebert_kernels.compress.storage.loading import load_model
from moebert_kernels.environment import OtherWork, describe_environment

LENGTH = 48  # of the demonstration
BERT_BASE_ROWS, BERT_BASE_LENGTH = 2048, 64
SETTINGS = CompressSettings(
    distill=False,
    measure=False,
    max_length=LENGTH,
    importance_rows=2000,
    fit_rows=2000,
    comparisons=("narrow",),
)
STUDENTS = {
    "affinity-4": SETTINGS,
    "affinity-4-bf16": replace(SETTINGS, bf16=True, comparisons=()),
    "affinity-4-tied": replace(SETTINGS, tie_shared=True, comparisons=()),
    "random-4": replace(SETTINGS, routing="hash-random", comparisons=()),
}


def measure(demo: Path, room: Path) -> dict[str, Any]:
    """Make every student in `room`, and score it cut and fitted.

    Returns:
        "models", by name: accuracy, and agreement with and divergence from the teacher, on the validation
        rows; "stages" of the first student, seconds and processor seconds of each; and what it took.
    """
    others = OtherWork()
    data = unlabelled(demo, room)
    folders = {"teacher": demo / "teacher"}
    stages: dict[str, dict[str, float]] = {}
    for name, settings in STUDENTS.items():
        clock = Clock()
        results = compress(settings, data, demo / "teacher", room / name, progress=clock)
        stages = stages or clock.stages(results)
        variants = {"student": name} | ({"narrow": "narrow"} if settings.comparisons else {})
        for folder, row in variants.items():
            for state in ("adapted", "fitted"):
                folders[f"{row} {state}"] = room / name / "work" / folder / state
    return {
        "environment": asdict(describe_environment()),
        "rows": {"train": len(data.train), "validation": len(data.validation)},
        "tokens": results["fitting"]["student"]["num_tokens"],
        "models": scores(demo, folders),
        "stages": stages,
        "busy_cpus": others.busy_cpus() or 0.0,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_bert_base(demo: Path, room: Path) -> dict[str, Any]:
    """Take the time of a student of a teacher of BERT-base's size; to be called in a process of its own.

    Returns:
        "rows", "tokens", "stages" as `measure` has them, and "peak_bytes" of this process.
    """
    others = OtherWork()
    with (demo / "data" / "train.csv").open(encoding="utf-8", newline="") as file:
        words = [word for row in csv.DictReader(file) for word in row["text"].split()]
    endless = itertools.cycle(words)
    rows = [" ".join(itertools.islice(endless, BERT_BASE_LENGTH)) for _ in range(BERT_BASE_ROWS + 64)]
    for name, part in (("train", rows[:-64]), ("validation", rows[-64:])):
        (room / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig()).save_pretrained(room / "teacher")
    AutoTokenizer.from_pretrained(demo / "teacher").save_pretrained(room / "teacher")
    data = load_texts(room / "train.txt", CsvOptions(validation_file=room / "validation.txt"))
    settings = replace(
        SETTINGS,
        max_length=BERT_BASE_LENGTH,
        importance_rows=BERT_BASE_ROWS,
        fit_rows=BERT_BASE_ROWS,
        comparisons=(),
        bf16=True,
    )
    clock = Clock()
    results = compress(settings, data, room / "teacher", room / "student", progress=clock)
    return {
        "rows": BERT_BASE_ROWS,
        "length": BERT_BASE_LENGTH,
        "dtype": ", bfloat16",
        "tokens": results["fitting"]["student"]["num_tokens"],
        "stages": clock.stages(results),
        "busy_cpus": others.busy_cpus() or 0.0,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def unlabelled(demo: Path, room: Path) -> TaskData:
    """The demonstration's snippets without their labels, by way of text files in `room`."""
    for name in ("train", "validation"):
        with (demo / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            texts = [" ".join(row["text"].split()) for row in csv.DictReader(file)]
        (room / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    return load_texts(room / "train.txt", CsvOptions(validation_file=room / "validation.txt"))


class Clock:
    """A `Progress` that notes the processor seconds of every stage, over all threads."""

    def __init__(self):
        self.spent: dict[str, float] = {}
        self._begun = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Begin or end a stage."""
        now = time.process_time()
        if stage not in self.spent:
            self._begun = now
        self.spent[stage] = now - self._begun

    def stages(self, results: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Seconds and processor seconds of every stage of these results."""
        return {
            stage: {"seconds": seconds, "processor_seconds": self.spent[stage]}
            for stage, seconds in results["timings_s"].items()
        }


def scores(demo: Path, folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Score saved models on the demonstration's validation rows, by their labels and against the teacher."""
    columns = CsvOptions(validation_file=demo / "data" / "validation.csv")
    data = load_task("csv", demo / "data" / "train.csv", csv=columns)
    found, theirs = {}, None
    for name, folder in folders.items():
        model, tokenizer = load_model(folder)
        rows = tokenize(match_labels(data, model.config), tokenizer, LENGTH).validation_sets[""]
        ours = predict(model, rows.rows, tokenizer)
        theirs = ours if theirs is None else theirs
        found[name] = rows.score(ours) | prediction_likeness("classification", ours, theirs)
    return found


def tables(found: dict[str, Any]) -> str:
    """What `measure` found, for a README."""
    models, environment = found["models"], found["environment"]
    lines = ["| | accuracy | agrees with the teacher | divergence |", "|---|--:|--:|--:|"]
    lines.append(f"| teacher | {models['teacher']['accuracy']:.3f} | | |")
    for name in ("narrow", *(name for name in STUDENTS if f"{name} fitted" in models)):
        cut, fitted = models[f"{name} adapted"], models[f"{name} fitted"]
        cells = [
            f"{cut[metric]:.3f} → **{fitted[metric]:.3f}**"
            for metric in ("accuracy", "agreement", "divergence")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    timed = {f"MiniLM, {found['rows']['train']:,} texts, {found['tokens']:,} tokens": found["stages"]}
    memory = f"{found['peak_bytes'] / 2**30:.1f} GiB at most"
    busy = f"{found['busy_cpus']:.1f}"
    if base := found.get("bert_base"):
        timed[f"BERT-base, {base['rows']:,} texts of {base['length']} tokens{base.get('dtype', '')}"] = base[
            "stages"
        ]
        memory += f", at BERT-base's size {base['peak_bytes'] / 2**30:.1f}"
        busy += f" and {base['busy_cpus']:.1f}"
    stages = [stage for stage in found["stages"] if "narrow" not in stage]
    lines += ["", f"| seconds | {' | '.join(timed)} |", "|---|" + "--:|" * len(timed)]
    for stage in stages:
        seconds = [f"{spent[stage]['seconds']:.1f}" for spent in timed.values()]
        lines.append(f"| {stage} | {' | '.join(seconds)} |")
    totals = [sum(spent[stage]["seconds"] for stage in stages) for spent in timed.values()]
    lines.append(f"| **all** | {' | '.join(f'**{total:.0f}**' for total in totals)} |")
    lines += [
        "",
        f"*`python -m bench.fit`: as cut → **as fitted**, {found['rows']['validation']:,} validation rows; "
        f"texts without labels to score and fit on; {memory}; {environment['cpu']}, {environment['threads']} "
        f"threads, {busy} processors busy otherwise; commit {environment['commit']}.*",
    ]
    return "\n".join(lines)


app = typer.Typer(help=__doc__, add_completion=False)


@app.command()
def run(
    demo: Annotated[Path, typer.Argument(help="Folder of a finished `moebert demo`.")],
    to: Annotated[Path, typer.Option(help="The json file to write.")] = Path("bench/results/fit.json"),
    bert_base: Annotated[bool, typer.Option(help="Take the times of BERT-base's size, minutes.")] = True,
    times_alone: Annotated[
        bool, typer.Option(help="Nothing but these times: of the demonstration, texts and tokenizer will do.")
    ] = False,
) -> None:
    """Measure, and write what was found."""
    room = Path(tempfile.mkdtemp(prefix="bench-fit-"))
    try:
        found = {"environment": asdict(describe_environment())} if times_alone else measure(demo, room)
        if bert_base or times_alone:
            (room / "bert-base").mkdir()
            with multiprocessing.get_context("spawn").Pool(1) as alone:  # its peak of memory is its own
                found["bert_base"] = alone.apply(measure_bert_base, (demo, room / "bert-base"))
    finally:
        shutil.rmtree(room)
    write_json(to, found)
    print(
        json.dumps(found["bert_base"]) if times_alone else tables(json.loads(to.read_text(encoding="utf-8")))
    )


if __name__ == "__main__":
    app()
