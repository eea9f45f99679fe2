"""What the commands show in a terminal: how far the stages are, and the table of results."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from moebert_kernels.compress.report.summary import has_speed
from moebert_kernels.compress.report.units import short_count
from moebert_kernels.compress.training.progress import ReportSteps
from moebert_kernels.environment import Environment

_SECONDS_OF_SILENCE = 60.0  # at most, where lines stand for bars


class StageBars:
    """A bar per stage, fed by the calls of `stages.Progress`; where there is no terminal, a line a minute.

    A bar moves only when work is done. A stage whose output is reused has none, but a line that says so.
    """

    def __init__(self, console: Console):
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._stage: str | None = None
        self._task = TaskID(0)
        self._started = 0.0
        self._last_line = 0.0

    def __enter__(self) -> StageBars:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._close_stage()
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `stage` has done `done` of `total` units; a total of 0 means that it was reused."""
        if stage != self._stage:
            self._close_stage()
            if total == 0:
                self._console.print(f"{stage}: reused")
                return
            self._stage = stage
            self._started = self._last_line = time.monotonic()
            self._task = self._bars.add_task(stage, total=None)
            if not self._console.is_terminal:
                self._console.print(f"{stage} ...")
        if not self._console.is_terminal and time.monotonic() - self._last_line >= _SECONDS_OF_SILENCE:
            self._last_line = time.monotonic()
            self._console.print(f"{stage}: {done:,} of {total:,}")
        # A stage that is said to be at (0, 1) has begun and does not yet know how much it has to do.
        self._bars.update(self._task, completed=done, total=None if (done, total) == (0, 1) else total)

    def of_training(self, stage: str) -> ReportSteps:
        """Return a Trainer's callback that moves the bar of `stage`."""
        return ReportSteps(
            lambda done, total: self(stage, done, total),
            lambda sentence: self._console.print(f"{stage}: {sentence}"),
        )

    def _close_stage(self) -> None:
        if self._stage is not None:
            self._bars.remove_task(self._task)
            self._console.print(f"{self._stage}: {time.monotonic() - self._started:.1f} s")
            self._stage = None


def results_table(results: dict[str, Any]) -> Table:
    """The models of results.json, a row each."""
    main = results["task"]["main_metric"]
    title = f"{results['task']['name']}, {results['task']['validation_rows']:,} validation rows"
    # Narrow enough for 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\n\nmodel", no_wrap=True)
    # Fewer layers cost what the student does in attention and feed-forward networks together.
    part = "encoder" if any("kept_layers" in model for model in results["models"]) else "ffn"
    measured = has_speed(results["models"])
    metric = main.replace("_", " " if len(main) <= 10 else "\n")
    # Agreement says little of a teacher that says nearly always the same.
    beside = all("divergence" in model["quality"] for model in results["models"]) and main == "agreement"
    headings = (
        "\n" * (2 - metric.count("\n")) + metric,
        *(["\n\ndivergence"] if beside else []),
        "\nparams\nstored",
        "params\nused\n/token",
        f"{'FFN' if part == 'ffn' else part}\nFLOPs\n/token",
        *(_speed_headings(results["models"]) if measured else ()),
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in results["models"]:
        speed = (_median(model["latency_ms"], 2), _median(model["throughput_per_s"], 0)) if measured else ()
        table.add_row(
            model["name"].replace(" before", "\n  before"),
            f"{model['quality'][main]:.3f}"
            + (f" ± {model['spread'][main]:.3f}" if "spread" in model else ""),
            *([f"{model['quality']['divergence']:.3g}"] if beside else []),
            *(
                short_count(model[key])
                for key in ("parameters_stored", "parameters_used_per_token", f"{part}_flops_per_token")
            ),
            *speed,
            style="bold" if model["name"] == "student" else None,
        )
    return table


def _speed_headings(models: list[dict[str, Any]]) -> tuple[str, str]:
    latency = next((model["latency_ms"] for model in models if model["latency_ms"]), None)
    throughput = next((model["throughput_per_s"] for model in models if model["throughput_per_s"]), None)
    return (
        f"\nms at\nbatch {latency['batch_size']}" if latency else "\n\nms",
        f"texts/s\nat batch\n{throughput['batch_size']}" if throughput else "\n\ntexts/s",
    )


def _median(timing: dict[str, Any] | None, digits: int) -> str:
    return f"{timing['median']:,.{digits}f}" if timing else "-"


def environment_table(environment: Environment) -> Table:
    """What `describe_environment` found, a row each."""
    table = Table.grid(padding=(0, 2))
    table.add_row("python", environment.python)
    for name, version in environment.versions.items():
        table.add_row(name, version or "not installed")
    table.add_row("commit", environment.commit or "not a git checkout")
    table.add_row("platform", environment.platform)
    table.add_row("cpu", f"{environment.cpu}, {environment.cpu_count} usable, {environment.threads} threads")
    table.add_row("devices", ", ".join(environment.devices) or "no accelerator")
    for backend in environment.backends:
        verdict = "[green]yes[/green]" if backend.usable else "[yellow]no[/yellow]"
        table.add_row(backend.name, f"{verdict}: {escape(backend.detail)}")
    return table
