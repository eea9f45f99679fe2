"""The stages of a run: each done or reused, told and timed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from moebert_kernels import __version__
from moebert_kernels.compress import distributed
from moebert_kernels.compress.storage.artifacts import Stage, fingerprint
from moebert_kernels.compress.runs.subjects import Report


class Progress(Protocol):
    """What hears how far a stage is.

    A stage begins with (0, 1) and ends with done == total. Between, it counts in a unit of its own (rows,
    steps, rounds), with the total known from the first of these calls; distillation that goes on where it was
    starts at that step. A stage whose output of an earlier run is reused says so by the single call (0, 0).
    """

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note."""


class Stages:
    """Runs the stages of one output folder.

    Args:
        output_dir: of the run; the stages' records are in its work/stages.
        progress: hears how far they are; in the main process alone.

    Attributes:
        timings: how many seconds each stage took, in this process or an earlier one, in their order.
    """

    def __init__(self, output_dir: Path, progress: Progress | None):
        self._output_dir = output_dir
        self._progress = progress if distributed.is_main() else None
        self._said_anew = False
        self.timings: dict[str, float] = {}

    def run(
        self,
        name: str,
        made_from: str,
        work: Callable[[Report], Any],
        *outputs: Path,
        together: bool = False,
    ) -> Any:
        """Do a stage or reuse it; return its recorded result.

        Args:
            name: told to `progress`, and the record's with hyphens for spaces.
            made_from: fingerprint of everything the outcome depends on, but for this package's version.
            work: as for `Stage.run`.
            outputs: as for `Stage`.
            together: as for `Stage.run`.

        Raises:
            OutputError: the record cannot be written.
        """
        last = (0, 1)

        def report(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            if self._progress is not None:
                self._progress(name, done, total)

        def reported_work() -> Any:
            report(0, 1)
            result = work(report)
            if last[0] != last[1]:
                report(last[1], last[1])
            return result

        record = self._output_dir / "work" / "stages" / f"{name.replace(' ', '-')}.json"
        stage = Stage(record, fingerprint(__version__, made_from), outputs)
        if stage.is_done:
            report(0, 0)
        elif stage.is_outdated and outputs and not self._said_anew:
            self._said_anew = True
            warnings.warn(
                f"{self._output_dir} holds a run with other settings or data: what they change is made anew, "
                "and replaced",
                stacklevel=2,
            )
        result = stage.run(reported_work, together=together)
        self.timings[name] = stage.seconds
        return result
