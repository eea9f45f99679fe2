"""A study's tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import Interval, Resampled
from .records import Record, Rows, contenders_of, quality, row_name, select, tasks_of

BASE = "narrow"  # what the others are compared with


def table(records: Sequence[Record], rows: Rows | None = None) -> str:
    """One study's main table, and a sentence about how it was made.

    A cell is the task's main metric after each step, the mean over seeds times 100; of the student that is
    kept with the standard deviation, if there are several. On the right are means over tasks: of what is
    better than the teacher, and than "narrow", over the seeds that both have; with an interval, if what the
    models say of every row is known, otherwise with the standard error over seeds.
    """
    tasks = tasks_of(records)
    sure = rows and Contrasts(records, rows)
    teachers = {record["task"]: 100 * record["teacher"][record["metric"]] for record in records}
    lines = [
        f"| | {' | '.join(tasks)} | mean | against the teacher | against {BASE} | largest load | "
        "parameters stored | encoder FLOPs per token |",
        "|---|" + "--:|" * (len(tasks) + 6),
    ]
    shown = " | ".join(f"{teachers[task]:.1f}" for task in tasks)
    lines.append(f"| teacher | {shown} | {statistics.mean(teachers.values()):.2f} | | | | | |")
    for name in contenders_of(records):
        mine, theirs = ([r for r in records if r["contender"] == n] for n in (name, BASE))
        of_tasks = [select(mine, task, name) for task in tasks]
        cells = [_steps(of_task) for of_task in of_tasks]
        means = [statistics.mean(map(quality, of_task)) for of_task in of_tasks if of_task]
        mean = to_teacher = to_base = "–"
        if all(of_tasks):
            mean = f"{statistics.mean(means):.2f}"
            to_teacher = f"{statistics.mean(means) - statistics.mean(teachers.values()):+.2f}"
            if sure:
                to_teacher = sure.told(name, "teacher", tasks)
        if name != BASE:
            to_base = gain(mine, theirs, tasks)
            if sure and to_base != "–":
                to_base = sure.told(name, BASE, tasks)
        loads = [record["largest_load"] for record in mine if record["largest_load"] is not None]
        load = f"{max(loads):.2f}" if loads else "–"
        stored = max(record["parameters_stored"] for record in mine) / 1e6
        flops = mine[0]["encoder_flops_per_token"] / 1e6
        lines.append(
            f"| {name} | {' | '.join(cells)} | {mean} | {to_teacher} | {to_base} | {load} | {stored:.1f} M | "
            f"{flops:.2f} M |"
        )
    return "\n".join([*lines, "", _provenance(records, tasks, bool(rows))])


def likeness_table(records: Sequence[Record], rows: Rows) -> str:
    """How alike students and teacher are, which needs no labels, and what is better than "narrow" by task.

    Of each contender agreement and divergence on each task; then, over the seeds that it and "narrow" have,
    the gain in the main metric and in agreement, and how many times narrow's the divergence is, with
    intervals, on each task and as means over tasks, of ratios the geometric one.
    """
    tasks = tasks_of(records)
    sure = Contrasts(records, rows)
    head = f"| | {' | '.join(tasks)} | mean |\n|---|" + "--:|" * (len(tasks) + 1)
    alike, gains = [head], [head]
    for name in contenders_of(records):
        cells, means = [], []
        for task in tasks:
            found = [record["states"][record["kept"]] for record in select(records, task, name)]
            if not found:
                cells.append("–")
                continue
            agreement, divergence = (
                statistics.mean(metrics[measure] for metrics in found)
                for measure in ("agreement", "divergence")
            )
            means.append(100 * agreement)
            cells.append(f"{100 * agreement:.1f}, {divergence:.3g}")
        mean = f"{statistics.mean(means):.2f}" if len(means) == len(tasks) else "–"
        alike.append(f"| {name} | {' | '.join(cells)} | {mean} |")
        if name == BASE:
            continue
        done = [task for task in tasks if sure.has(name, BASE, [task])]
        groups = [[task] if task in done else [] for task in tasks] + [done if done == tasks else []]
        tellers = (("metric", sure.told), ("agreement", sure.agreement_told), ("divergence", sure.ratio_told))
        for what, tell in tellers:
            told = [tell(name, BASE, group) if group else "–" for group in groups]
            gains.append(f"| {name}, {what} | {' | '.join(told)} |")
    return "\n".join(
        [
            *alike,
            "",
            "*Agreement with the teacher, divergence from it.*",
            "",
            *gains,
            "",
            f"*Against {BASE}: points of the main metric and of agreement; divergence, times {BASE}'s.*",
        ]
    )


class Contrasts:
    """Differences between the students that are kept, with their intervals.

    Args:
        records: of a study.
        rows: of the same.
    """

    def __init__(self, records: Sequence[Record], rows: Rows):
        self._records, self._rows = records, rows
        self._resampled: dict[tuple[str, int], Resampled] = {}

    def has(self, ours: str, theirs: str, tasks: Iterable[str]) -> bool:
        """Whether both have run on all these tasks, with a seed in common."""
        return all(self._runs(task, ours, theirs)[0] for task in tasks)

    def told(self, ours: str, theirs: str, tasks: Sequence[str]) -> str:
        """By how much a contender's main metric, times 100, is larger than another's, or the teacher's."""

        return _signed(self.gain(Resampled.metric, ours, theirs, tasks))

    def agreement_told(self, ours: str, theirs: str, tasks: Sequence[str]) -> str:
        """By how much more often, in points, it says what the teacher says."""
        return _signed(self.gain(Resampled.agreement, ours, theirs, tasks))

    def ratio_told(self, ours: str, theirs: str, tasks: Sequence[str]) -> str:
        """What `ratio` gives, with its interval."""
        found = self.ratio(ours, theirs, tasks)
        return f"× {found.found:.2f} [{found.low:.2f}, {found.high:.2f}]"

    def gain(
        self,
        score: Callable[[Resampled, str, Sequence[np.ndarray]], np.ndarray],
        ours: str,
        theirs: str,
        tasks: Sequence[str],
    ) -> Interval:
        """By how much a contender's score, times 100, is larger than another's, or the teacher's.

        Args:
            score: `Resampled.metric` or `Resampled.agreement`.
            ours: the contender.
            theirs: another, or "teacher".
            tasks: to take the mean over.
        """
        parts = []
        for task in tasks:
            mine, others = self._runs(task, ours, theirs)
            resampled = self._of(task, len(mine))
            said = self._kept(others, "predictions") if others else [self._rows[f"{task}/teacher"]]
            name = mine[0]["metric"]
            parts.append(
                100 * (score(resampled, name, self._kept(mine, "predictions")) - score(resampled, name, said))
            )
        return Interval.of(np.mean(parts, axis=0))

    def ratio(self, ours: str, theirs: str, tasks: Sequence[str]) -> Interval:
        """How many times another contender's divergence ours is; over tasks, the geometric mean."""
        parts = []
        for task in tasks:
            mine, others = self._runs(task, ours, theirs)
            resampled = self._of(task, len(mine))
            values, base = (resampled.mean(self._kept(runs, "divergence")) for runs in (mine, others))
            parts.append(np.log(values / base))
        return Interval(*np.exp(Interval.of(np.mean(parts, axis=0))))

    def _runs(self, task: str, ours: str, theirs: str) -> tuple[list[Record], list[Record]]:
        """Those of the seeds that both have, in their order; of the teacher there are none."""
        mine = {record["seed"]: record for record in select(self._records, task, ours)}
        if theirs == "teacher":
            return [mine[seed] for seed in sorted(mine)], []
        others = {record["seed"]: record for record in select(self._records, task, theirs)}
        both = sorted(mine.keys() & others.keys())
        return [mine[seed] for seed in both], [others[seed] for seed in both]

    def _kept(self, runs: Sequence[Record], what: str) -> list[np.ndarray]:
        return [self._rows[row_name(record, record["kept"], what)] for record in runs]

    def _of(self, task: str, num_seeds: int) -> Resampled:
        key = task, num_seeds
        if key not in self._resampled:
            labels, teacher = (self._rows[f"{task}/{name}"] for name in ("labels", "teacher"))
            self._resampled[key] = Resampled(task, labels, teacher, num_seeds)
        return self._resampled[key]


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
    tasks = tasks_of(chosen[base])
    lines = [
        f"| study | | seeds | epochs | learning rate | lambda | {' | '.join(tasks)} | gain |",
        "|---|---|" + "--:|" * (len(tasks) + 5),
    ]
    for name in contenders_of(chosen[base]):
        theirs = [record for record in chosen[base] if record["contender"] == name]
        for study, records in chosen.items():
            mine = [record for record in records if record["contender"] == name]
            if not mine:
                continue
            epochs, learning_rate, distill_weight = _settings(mine[0])
            cells = [_spread([*map(quality, select(mine, task, name))]) for task in tasks]
            done = [task for task in tasks if select(mine, task, name)]
            told = "–" if study == base else gain(mine, theirs, done)
            lines.append(
                f"| {study} | {name} | {len({r['seed'] for r in mine})} | {epochs:g} | "
                f"{learning_rate:g} | {distill_weight:g} | {' | '.join(cells)} | {told} |"
            )
    return "\n".join(lines)


def gain(ours: Sequence[Record], theirs: Sequence[Record], tasks: Sequence[str]) -> str:
    """Over the pairs of the same task and seed; mean and standard error over seeds, tasks weighing alike."""
    gains = []
    for task in tasks:
        our_quality, their_quality = (
            {r["seed"]: quality(r) for r in records if r["task"] == task} for records in (ours, theirs)
        )
        both = sorted(our_quality.keys() & their_quality.keys())
        if not both:
            return "–"
        gains.append([our_quality[seed] - their_quality[seed] for seed in both])
    mean = statistics.mean(statistics.mean(g) for g in gains)
    variances = [statistics.variance(g) / len(g) for g in gains if len(g) > 1]
    error = f" ± {(sum(variances) ** 0.5) / len(gains):.2f}" if len(variances) == len(gains) else ""
    return f"{mean:+.2f}{error}"


def _run(record: Record) -> tuple[str, str, int, str]:
    teacher = json.dumps([record["teacher_budget"], record["teacher"]], sort_keys=True)
    fit = record["budget"]["cost"], record["budget"]["fit_rows"]
    return record["task"], record["contender"], record["seed"], f"{teacher} {fit}"


def _settings(record: Record) -> tuple[float, float, float]:
    training = record["budget"]["training"]
    if training is None:
        return 0, 0, 0
    return training["epochs"], training["learning_rate"], training["distill_weight"]


def _signed(interval: Interval) -> str:
    return f"{interval.found:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _steps(records: Sequence[Record]) -> str:
    """The metric after each step, up to the student that is kept."""
    if not records:
        return "–"
    states = [state for state in records[0]["states"]][:-1]
    before = [statistics.mean(quality(record, state) for record in records) for state in states]
    return " → ".join([*(f"{value:.1f}" for value in before), _spread([*map(quality, records)])])


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _provenance(records: Sequence[Record], tasks: Sequence[str], has_intervals: bool) -> str:
    parts = []
    for task in tasks:
        of_task = [record for record in records if record["task"] == task]
        record = of_task[0]
        counts = sorted({len(select(of_task, task, name)) for name in contenders_of(of_task)})
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        students = ""
        if record["training"] is not None:
            epochs, num_rows = record["budget"]["training"]["epochs"], record["training"]["rows"]
            students = f", students {epochs:g} on {num_rows:,} rows"
        parts.append(
            f"{task} ({record['metric']}): teacher {record['teacher_budget']['epochs']:g} epochs{students}, "
            f"{record['validation_rows']:,} to validate, {seeds} seed{'' if seeds == '1' else 's'}"
        )
    budget, environments = records[0]["budget"], [record["environment"] for record in records]
    how = []
    if budget["fit_rows"] is not None:
        how.append(f"Fitted to {budget['fit_rows']:,} training rows at most, without labels")
    if budget["training"] is not None:
        training = budget["training"]
        how.append(
            f"Distillation: learning rate {training['learning_rate']:g}, lambda "
            f"{training['distill_weight']:g}, {training['batch_size']} rows a step"
        )
    if has_intervals:
        how.append("Brackets: 95 % of resamples of rows and seeds together")
    precision = "bfloat16 autocast" if records[0]["teacher_budget"]["bf16"] else "float32"
    machines, torches, commits = (
        ", ".join(sorted({tell(environment) for environment in environments}))
        for tell in (_machine, lambda one: one["versions"]["torch"], lambda one: str(one["commit"]))
    )
    return (
        f"*{'; '.join(parts)}. {'. '.join(how)}. Training in {precision}; {machines}, torch {torches}, "
        f"commit {commits}.*"
    )


def _machine(environment: Mapping[str, Any]) -> str:
    """The GPU of a run, or its processor."""
    return next(iter(environment["devices"]), environment["cpu"])
