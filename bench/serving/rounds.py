"""Workers side by side, of which one at a time runs, in rounds that give each its turn."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .contenders import Contender

_ROOT = Path(__file__).resolve().parents[__package__.count(".") + 1]  # a checkout, or site-packages
_SETTLE_S = 0.01  # for threads of the worker before to go to sleep
LEAST_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Worker:
    """A process that has its model loaded and has answered every case once.

    Attributes:
        contender: what it runs.
        answers: its output for every case.
        process: it.
    """

    contender: Contender
    answers: dict[str, np.ndarray]
    process: subprocess.Popen[str]

    def time(self, case: str, seconds: float) -> float:
        """Seconds of a call.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{case} {seconds}\n")
            self.process.stdin.flush()
        except OSError:
            raise RuntimeError(_last_words(self.process)) from None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(_last_words(self.process))
        return float(line)


def _last_words(process: subprocess.Popen[str]) -> str:
    """Why a worker has ended, in a line."""
    process.wait()
    assert process.stderr is not None
    process.stderr.seek(0)
    lines = [line.strip() for line in process.stderr.read().splitlines() if line.strip()]
    return lines[-1] if lines else f"its process ended with status {process.returncode}"


@dataclass(frozen=True, eq=False)
class Workers:
    """The processes of a shape.

    Attributes:
        contenders: all of them.
        started: those that answered, by their contender's name.
        failed: why the others did not, or ended later.
    """

    contenders: Sequence[Contender]
    started: dict[str, Worker] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@contextmanager
def workers(
    contenders: Sequence[Contender],
    inputs: Path,
    threads: int,
    say: Callable[[str], None],
) -> Iterator[Workers]:
    """Start a process for each contender, one after the other, and end them all in the end.

    Args:
        contenders: what to run.
        inputs: of `worker`; its outputs are written beside it.
        threads: of every process.
        say: is told which is started.
    """
    running = Workers(contenders)
    processes: list[subprocess.Popen[str]] = []
    try:
        for index, contender in enumerate(contenders):
            say(f"starting {contender.name}")
            outputs = inputs.with_name(f"outputs-{index}.npz")
            process = _start(contender, inputs, outputs, threads)
            processes.append(process)
            assert process.stdout is not None
            if process.stdout.readline() == "ready\n":
                with np.load(outputs) as arrays:
                    answers = {name: arrays[name] for name in arrays.files}
                running.started[contender.name] = Worker(contender, answers, process)
            else:
                running.failed[contender.name] = _last_words(process)
            outputs.unlink(missing_ok=True)
        yield running
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with suppress(OSError):  # what was written to one that had ended
                        stream.close()


def _start(contender: Contender, inputs: Path, outputs: Path, threads: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"{__package__}.worker", contender.runtime, str(contender.path)]
    # As in cpu.sh: whether the allocator gives memory back between two layers is no matter of chance.
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
    }
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process's other streams
    process = subprocess.Popen(
        [*command, str(inputs), str(outputs), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
    )
    process.stderr = errors
    return process


def take_turns(
    workers: dict[str, Worker],
    case: str,
    rounds: int,
    seconds: float,
    deadline: float,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Sample a case in every worker, round after round.

    Args:
        workers: by name.
        case: one of those they have the inputs of.
        rounds: samples of each.
        seconds: of each sample, at least.
        deadline: of `time.monotonic`, after which, and after three rounds, no further round begins.

    Returns:
        Seconds of a call by name, and the error of each worker that ended.
    """
    samples: dict[str, list[float]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    order = list(workers)
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        for name in order:
            if name in failed:
                continue
            time.sleep(_SETTLE_S)
            try:
                samples[name].append(workers[name].time(case, seconds))
            except RuntimeError as error:
                failed[name] = str(error)
                del samples[name]
        order = order[1:] + order[:1]  # no one always follows the same one
    return samples, failed
