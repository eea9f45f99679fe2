"""What the commands show in a terminal: how far the stages are, and the table of results."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
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


class StageBars:
    """A bar per stage, fed by the calls of `pipeline.Progress`; lines instead where there is no terminal.

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
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> StageBars:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `stage` has done `done` of `total` units; a total of 0 means that it was reused."""
        if total == 0:
            self._console.print(f"{stage}: reused", highlight=False)
            return
        if stage not in self._tasks:
            self._started[stage] = time.monotonic()
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done)
            if not self._console.is_terminal:
                self._console.print(f"{stage} ...", highlight=False)
        self._bars.update(self._tasks[stage], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(stage))
            seconds = time.monotonic() - self._started[stage]
            self._console.print(f"{stage}: done in {seconds:.1f} s", highlight=False)


def results_table(results: dict[str, Any]) -> Table:
    """The models of results.json, a row each."""
    main = results["task"]["main_metric"]
    table = Table(title=f"{results['task']['name']}, {results['task']['validation_rows']:,} validation rows")
    table.add_column("model")
    headings = (main.replace("_", " "), "parameters\nstored", "used\nper token", "FFN FLOPs\nper token")
    for heading in (*headings, *_speed_headings(results["models"])):
        table.add_column(heading, justify="right")
    for model in results["models"]:
        table.add_row(
            model["name"],
            f"{model['quality'][main]:.3f}",
            *(
                f"{model[key] / 1e6:.2f} M"
                for key in ("parameters_stored", "parameters_used_per_token", "ffn_flops_per_token")
            ),
            _median(model["latency_ms"], 2),
            _median(model["throughput_per_s"], 0),
            style="bold" if model["name"] == "student" else None,
        )
    return table


def _speed_headings(models: list[dict[str, Any]]) -> tuple[str, str]:
    latency = next((model["latency_ms"] for model in models if model["latency_ms"]), None)
    throughput = next((model["throughput_per_s"] for model in models if model["throughput_per_s"]), None)
    return (
        f"latency ms\nbatch {latency['batch_size']}" if latency else "latency ms",
        f"sequences/s\nbatch {throughput['batch_size']}" if throughput else "sequences/s",
    )


def _median(timing: dict[str, Any] | None, digits: int) -> str:
    return f"{timing['median']:,.{digits}f}" if timing else "-"
