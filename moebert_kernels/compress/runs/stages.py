"""The stages of a run: each done once for given inputs, told and timed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moebert_kernels import __version__
from moebert_kernels.compress import distributed
from moebert_kernels.compress.runs.subjects import Report
from moebert_kernels.compress.storage.artifacts import fingerprint, is_whole, write_json
from moebert_kernels.errors import OutputError


@dataclass(frozen=True)
class Stage:
    """What a run does once for given inputs.

    Its record, a json file, holds the fingerprint of its inputs, the seconds it took (interrupted attempts
    included, unless the process was killed), a small result and the names of its files, which lie elsewhere.

    Attributes:
        record_path: of the record.
        fingerprint: of everything the stage's outcome depends on.
        outputs: files or folders it makes, which must be there for it to count as done.
    """

    record_path: Path
    fingerprint: str
    outputs: tuple[Path, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether `run` would do nothing but return the recorded result."""
        return self._was_done() and all(path.exists() for path in self.outputs)

    @property
    def is_outdated(self) -> bool:
        """Whether the record is of the stage done with other inputs."""
        return self._written().get("fingerprint", self.fingerprint) != self.fingerprint

    @property
    def damaged(self) -> Path | None:
        """A file of the stage that is gone from a folder, or no longer whole; None if there is none.

        What others have put beside it or written anew in the same form is no damage, nor is an output that
        is gone as a whole.
        """
        names = self._written().get("files")  # older records have none
        if not self.is_done or not isinstance(names, list) or len(names) != len(self.outputs):
            return None
        paths = (output / name for output, of_one in zip(self.outputs, names, strict=True) for name in of_one)
        return next((path for path in paths if not is_whole(path)), None)

    def run(self, work: Callable[[], Any], *, together: bool = False) -> Any:
        """Return the recorded result if the stage is done; otherwise do `work` and record what it returns.

        With several processes this is collective; the main one keeps the record, and all return its result.

        Args:
            work: makes the outputs and returns what json can write.
            together: all processes do it; otherwise, the main one while the others wait.

        Raises:
            OutputError: it is done, but its files are damaged.
        """
        if together and not distributed.on_main(lambda: self.is_done):
            result = self._run(work) if distributed.is_main() else work()
            return distributed.on_main(lambda: result)
        return distributed.on_main(lambda: self._run(work))

    def _run(self, work: Callable[[], Any]) -> Any:
        record = self._read()
        if record is not None and self.is_done:
            if (damaged := self.damaged) is not None:
                output = next(path for path in self.outputs if damaged.is_relative_to(path))
                raise OutputError(
                    f"{damaged} is damaged or gone: move {output} elsewhere, or delete it, and give the same "
                    "command again, which makes it anew"
                )
            return record["result"]
        seconds_before = 0.0 if record is None or record["done"] else record["seconds"]
        start = time.monotonic()
        self._write(False, seconds_before, None)
        try:
            result = work()
        except BaseException:
            with suppress(OutputError):  # of a full disk the other error tells
                self._write(False, seconds_before + time.monotonic() - start, None)
            raise
        self._write(True, seconds_before + time.monotonic() - start, result)
        return result

    @property
    def seconds(self) -> float:
        """How long the stage has taken; 0 if it has not begun."""
        record = self._read()
        return 0.0 if record is None else record["seconds"]

    def _written(self) -> dict[str, Any]:
        """The record, whatever it is of; empty if there is none that can be read."""
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) and {"done", "seconds", "result"} <= record.keys() else {}

    def _read(self) -> dict[str, Any] | None:
        record = self._written()
        return record if record.get("fingerprint") == self.fingerprint else None

    def _was_done(self) -> bool:
        record = self._read()
        return record is not None and record["done"]

    def _write(self, done: bool, seconds: float, result: Any) -> None:
        record = {"fingerprint": self.fingerprint, "done": done, "seconds": seconds, "result": result}
        if done:
            record["files"] = [_names(path) for path in self.outputs]
        write_json(self.record_path, record)


def _names(output: Path) -> list[str]:
    """Of all files in a folder, their paths in it; of a file none but its own, ""."""
    files = [output] if output.is_file() else sorted(path for path in output.rglob("*") if path.is_file())
    return [str(path.relative_to(output)) for path in files]


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
            if stage.damaged is None:  # `stage.run` says what to do about it
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
