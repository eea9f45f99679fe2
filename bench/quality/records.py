"""Records of finished runs: collected in a file for each study, and as a table."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .contenders import CONTENDERS
from .study import TASKS

Record = dict[str, Any]


def collect(folders: Iterable[Path], to: Path) -> dict[Path, int]:
    """Write the records of finished runs as json lines, a file `<study>.jsonl` for each study.

    Returns:
        The files, and how many records each has.
    """
    studies: dict[str, list[Record]] = defaultdict(list)
    for folder in folders:
        for path in sorted((folder / "records").glob("*/*/*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["done"]:
                studies[record["result"]["study"]].append(record["result"])
    files = {}
    for study, records in studies.items():
        records.sort(key=lambda record: (*_place(record), record["seed"]))
        file = to / f"{study}.jsonl"
        _write("".join(json.dumps(record) + "\n" for record in records), file)
        files[file] = len(records)
    return files


def _write(text: str, file: Path) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def read(file: Path) -> list[Record]:
    """Read a file that `collect` wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(records: Sequence[Record]) -> str:
    """One study's table, and a sentence about how it was made.

    A cell is the mean of the task's main metric over seeds, times 100, and the standard deviation if there
    are several. "gain" is the mean over tasks of what is better than "narrow" after distillation, over the
    seeds that both have.
    """
    tasks = sorted({record["task"] for record in records}, key=list(TASKS).index)
    names = sorted({record["contender"] for record in records}, key=list(CONTENDERS).index)
    metrics = {record["task"]: record["metric"] for record in records}
    teachers = {record["task"]: record["teacher"] for record in records}
    heads = [f"{task}: before | after" for task in tasks]
    lines = [
        f"| | {' | '.join(heads)} | mean after | gain on narrow | largest load | parameters stored | "
        "encoder FLOPs per token |",
        "|---|" + "--:|" * (2 * len(tasks) + 5),
    ]
    qualities = [100 * teachers[task][metrics[task]] for task in tasks]
    shown = " | ".join(f" | {quality:.1f}" for quality in qualities)
    lines.append(f"| teacher |{shown} | {statistics.mean(qualities):.2f} | | | | |")
    for name in names:
        cells: list[str] = []
        means = []
        for task in tasks:
            done = _of(records, task, name)
            for when in ("before", "after"):
                cells.append(_spread([100 * record[when][record["metric"]] for record in done]))
            if done:
                means.append(statistics.mean(map(_after, done)))
        mean = f"{statistics.mean(means):.2f}" if len(means) == len(tasks) else "–"
        mine, narrow = ([r for r in records if r["contender"] == n] for n in (name, "narrow"))
        gain = "–" if name == "narrow" else _gain(mine, narrow, tasks)
        loads = [record["largest_load"] for record in mine if record["largest_load"] is not None]
        load = f"{max(loads):.2f}" if loads else "–"
        stored = max(record["parameters_stored"] for record in mine) / 1e6
        flops = mine[0]["encoder_flops_per_token"] / 1e6
        lines.append(
            f"| {name} | {' | '.join(cells)} | {mean} | {gain} | {load} | {stored:.1f} M | {flops:.2f} M |"
        )
    return "\n".join([*lines, "", _provenance(records, tasks)])


def settings_table(studies: Mapping[str, Sequence[Record]], base: str = "main") -> str:
    """How else to train: studies that repeat a part of the base study's runs, each with a budget of its own.

    A cell is the mean of the task's main metric over seeds after distillation, times 100. Runs count that
    both studies have, of the same teacher with other epochs, learning rate or lambda. "gain" is the mean over
    tasks of what is better than in the base study, paired by seed.
    """
    known = {_run(record): _settings(record) for record in studies.get(base, ())}
    others = {
        name: [
            record for record in records if known.get(_run(record), _settings(record)) != _settings(record)
        ]
        for name, records in studies.items()
        if name != base
    }
    repeated = {_run(record) for records in others.values() for record in records}
    chosen = {base: [record for record in studies.get(base, ()) if _run(record) in repeated], **others}
    tasks = sorted({record["task"] for record in chosen[base]}, key=list(TASKS).index)
    lines = [
        f"| study | | seeds | epochs | learning rate | lambda | {' | '.join(tasks)} | gain |",
        "|---|---|" + "--:|" * (len(tasks) + 5),
    ]
    for name in sorted({record["contender"] for record in chosen[base]}, key=list(CONTENDERS).index):
        theirs = [record for record in chosen[base] if record["contender"] == name]
        for study, records in chosen.items():
            mine = [record for record in records if record["contender"] == name]
            if not mine:
                continue
            epochs, learning_rate, distill_weight = _settings(mine[0])
            cells = [_spread([*map(_after, _of(mine, task, name))]) for task in tasks]
            done = [task for task in tasks if _of(mine, task, name)]
            gain = "–" if study == base else _gain(mine, theirs, done)
            lines.append(
                f"| {study} | {name} | {len({r['seed'] for r in mine})} | {epochs:g} | "
                f"{learning_rate:g} | {distill_weight:g} | {' | '.join(cells)} | {gain} |"
            )
    return "\n".join(lines)


def _run(record: Record) -> tuple[str, str, int, str]:
    teacher = json.dumps([record["teacher_budget"], record["teacher"]], sort_keys=True)
    return record["task"], record["contender"], record["seed"], teacher


def _settings(record: Record) -> tuple[float, float, float]:
    budget = record["budget"]
    return budget["epochs"], budget["learning_rate"], budget["distill_weight"]


def _place(record: Record) -> tuple[int, int]:
    return list(TASKS).index(record["task"]), list(CONTENDERS).index(record["contender"])


def _of(records: Iterable[Record], task: str, contender: str) -> list[Record]:
    return [r for r in records if (r["task"], r["contender"]) == (task, contender)]


def _gain(ours: Sequence[Record], theirs: Sequence[Record], tasks: Sequence[str]) -> str:
    """Over the pairs of the same task and seed; mean and standard error over seeds, tasks weighing alike."""
    gains = []
    for task in tasks:
        our_after, their_after = (
            {r["seed"]: _after(r) for r in records if r["task"] == task} for records in (ours, theirs)
        )
        both = sorted(our_after.keys() & their_after.keys())
        if not both:
            return "–"
        gains.append([our_after[seed] - their_after[seed] for seed in both])
    mean = statistics.mean(statistics.mean(g) for g in gains)
    variances = [statistics.variance(g) / len(g) for g in gains if len(g) > 1]
    error = f" ± {(sum(variances) ** 0.5) / len(gains):.2f}" if len(variances) == len(gains) else ""
    return f"{mean:+.2f}{error}"


def _after(record: Record) -> float:
    """The task's main metric after distillation, times 100."""
    return 100 * record["after"][record["metric"]]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _provenance(records: Sequence[Record], tasks: Sequence[str]) -> str:
    parts = []
    for task in tasks:
        record = next(r for r in records if r["task"] == task)
        budget, teacher = record["budget"], record["teacher_budget"]
        seeds = len({r["seed"] for r in records if r["task"] == task})
        parts.append(
            f"{task} ({record['metric']}): teacher {teacher['epochs']:g} epochs, students "
            f"{budget['epochs']:g} on {record['train_rows']:,} rows, "
            f"{record['validation_rows']:,} to validate, {seeds} seed{'s' if seeds > 1 else ''}"
        )
    budget, environment = records[0]["budget"], records[0]["environment"]
    precision = "bfloat16 autocast" if records[0]["teacher_budget"]["bf16"] else "float32"
    commits = ", ".join(sorted({str(r["environment"]["commit"]) for r in records}))
    return (
        f"*{'; '.join(parts)}. Distillation: learning rate "
        f"{budget['learning_rate']:g}, lambda {budget['distill_weight']:g}, {budget['batch_size']} rows a "
        f"step, {precision}; {environment['cpu']}, torch {environment['versions']['torch']}, "
        f"commit {commits}.*"
    )
