"""A quarter of an hour on a GPU, in two calls; `bash bench/gpu.sh --help` says what there is.

Each call goes through parts in order. A part has a share of the call's seconds and is cut off when its share
and what earlier parts left over have passed; whatever becomes of it, the next one runs, but nothing runs on a
layer that the smoke test finds wrong. Every part appends its figures to their final files as it has them, so
that a call killed at any second has lost none but the one in progress. gpu.log has what all of them printed,
session.jsonl what became of each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

MOST_FILES, MOST_BYTES = 8, 2**24  # what may come back from a machine that is lent
RESERVE_S = 10  # of a call, for what is said at its end
NO_DEVICE = 3  # exit status of a part that finds no GPU: nothing else would
LOG, SESSION = "gpu.log", "session.jsonl"
ALWAYS = (LOG, SESSION)


@dataclass(frozen=True)
class Part:
    """One step of a call.

    Attributes:
        name: as --only takes it.
        seconds: its share of the call.
        about: what it does.
        files: patterns of what it leaves in the folder, beside the log.
        stops: whether nothing may run once it has failed; being cut off proves nothing wrong.
        grace_s: of its share, from being told to stop to being killed.
        always: whether it runs whatever --only names: each call finds a bare machine.
    """

    name: str
    seconds: int
    about: str
    files: tuple[str, ...] = ()
    stops: bool = False
    grace_s: int = 4
    always: bool = False


_MACHINE = Part(
    "machine", 60, "versions, the card, its ceilings; kernels and extension are made ready", always=True
)
FIRST = (
    _MACHINE,
    Part("smoke", 60, "forward and backward against float64, twice, in graphs", ("smoke.jsonl",), stops=True),
    Part("ffn", 95, "the layer beside its peers, in a graph, on cold caches", ("ffn-*.jsonl",)),
    Part("kernels", 45, "the time of each kernel, alone and in place", ("kernels-*.jsonl",)),
    Part("tests", 150, "pytest -m gpu by twelve workers", ("tests.xml",), grace_s=15),
    Part("tiles", 60, "candidates for the table of tile shapes", ("tiles.jsonl",)),
)
SECOND = (
    _MACHINE,
    Part("smoke", 30, "as in the first call", ("smoke.jsonl",), stops=True),
    Part("tests", 60, "pytest -m gpu, or what --tests names", ("tests.xml",), grace_s=15),
    Part("memcheck", 60, "compute-sanitizer's memcheck over small cases"),
    Part("counters", 50, "Nsight Compute over each kernel at T=16384", ("counters.csv",)),
    Part("ffn", 60, "as in the first call", ("ffn-*.jsonl",)),
    Part("columns", 60, "the layer's other columns: eager, warm, skewed", ("ffn-*.jsonl",)),
    Part("kernels", 30, "as in the first call", ("kernels-*.jsonl",)),
    Part("dispatch", 20, "from token ids to every layer's order", ("dispatch-*.jsonl",)),
    Part("model", 50, "whole encoders", ("model-*.jsonl",)),
    Part("peers", 40, "triton_kernels and scattermoe, from --peer-path", ("peers/ffn-*.jsonl",)),
    Part("tiles", 60, "as in the first call", ("tiles.jsonl",)),
)
CALLS = {"first": (FIRST, 480), "second": (SECOND, 240)}
# It takes 60 GiB: no test may run beside it.
DESELECTED = ("--deselect", "tests/kernels/test_gpu.py::test_elements_past_two_to_the_31")
KERNELS = Path(__file__).resolve().parents[1] / "build" / "kernels-sm_90.zip"
_BENCHMARKS = ("machine", "ffn", "columns", "peers", "dispatch", "model")


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        part: its name.
        became: "ok", "failed (CODE)", "cut off", or why it did not run.
        began_s, ended_s: since the call began.
    """

    part: str
    became: str
    began_s: float
    ended_s: float


class Machine(Protocol):
    """Where parts run, and by whose clock."""

    def now(self) -> float:
        """Seconds since the call began."""

    def run(self, part: Part, seconds: float) -> int | None:
        """Run a part for so long at most; its exit status, or None if it was cut off."""


def chosen(call: str, only: Sequence[str]) -> tuple[Part, ...]:
    """The parts of a call, all or those named, in the call's order.

    Raises:
        ValueError: a part does not exist, or they would leave more files than may come back.
    """
    parts, _ = CALLS[call]
    names = [part.name for part in parts]
    for name in only:
        if name not in names:
            raise ValueError(f"the {call} call has no part {name!r}; it has {', '.join(names)}")
    found = tuple(part for part in parts if not only or part.always or part.name in only)
    files = files_of(found)
    if len(files) > MOST_FILES:
        raise ValueError(
            f"these parts leave {len(files)} files, at most {MOST_FILES} come back: choose by --only"
        )
    if "ffn" in only and "columns" in only:
        raise ValueError("ffn and columns write the same file: choose one of them by --only")
    return found


def files_of(parts: Sequence[Part]) -> tuple[str, ...]:
    """The files that parts leave, log and session among them."""
    return tuple(dict.fromkeys([*ALWAYS, *(file for part in parts for file in part.files)]))


def go_through(parts: Sequence[Part], limit: float, machine: Machine) -> Iterator[Outcome]:
    """Run the parts one after the other; what one leaves of its share is the next ones'."""
    usable = limit - RESERVE_S
    shares = min(1.0, usable / sum(part.seconds for part in parts))
    end, stopped = 0.0, ""
    for number, part in enumerate(parts, 1):
        end = usable if number == len(parts) else end + shares * part.seconds
        began = machine.now()
        if stopped or end - began < part.grace_s + 1:
            yield Outcome(part.name, stopped or "no time left", began, began)
            continue
        code = machine.run(part, end - began - part.grace_s)
        became = "cut off" if code is None else "ok" if code == 0 else f"failed ({code})"
        if (part.stops and code) or code == NO_DEVICE:
            stopped = f"not run, since {part.name} {became}"
        yield Outcome(part.name, became, began, machine.now())


class StandIn:
    """A clock that stands in for a machine on which every part takes all it may and must be killed."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """See `Machine`."""
        return self._now

    def run(self, part: Part, seconds: float) -> int | None:
        """See `Machine`; a part that stops the others passes at its last second."""
        self._now += seconds if part.stops else seconds + part.grace_s
        return 0 if part.stops else None


class Host:
    """This machine: parts run as processes, what they print goes to the terminal and the log at once."""

    def __init__(self, options: argparse.Namespace, log: IO[bytes]) -> None:
        self._options, self._log = options, log
        self._begin = time.monotonic()

    def now(self) -> float:
        """See `Machine`."""
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        """A line for the terminal and the log."""
        self._write(f"{text}\n".encode())

    def _write(self, data: bytes) -> None:
        self._log.write(data)
        self._log.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def run(self, part: Part, seconds: float) -> int | None:
        """See `Machine`."""
        command = command_of(part, seconds, self._options)
        self.say(f"=== {part.name} ({seconds:.0f} s): {part.about}")
        deadline = time.monotonic() + seconds
        environment = os.environ | environment_of(part, self._options)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        pump = threading.Thread(target=self._pump, args=(process.stdout,), daemon=True)
        pump.start()
        code: int | None = None
        try:
            code = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(part.grace_s - 1)
        finally:
            _kill_group(process)
            pump.join(1)
        return code

    def _pump(self, stream: IO[bytes]) -> None:
        for data in stream:
            self._write(data)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
        process.wait(3)


def environment_of(part: Part, options: argparse.Namespace) -> dict[str, str]:
    """What a part's process gets beside this one's variables."""
    variables = {"PYTHONUNBUFFERED": "1"}
    if part.name == "tests":
        variables["OMP_NUM_THREADS"] = "1"  # twelve workers compute references on the CPU
    else:
        variables["PYTHONWARNINGS"] = "ignore"
    if part.name == "memcheck":
        variables["PYTHONPATH"] = "."
    if options.dry_run:
        variables |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    return variables


def command_of(part: Part, seconds: float, options: argparse.Namespace) -> list[str]:
    """How a part is run within so many seconds."""
    python, out, toy = sys.executable, Path(options.out), ["--toy"] * options.dry_run
    module = [python, "-m"]
    commit = ["--commit", options.commit] if options.commit else []
    if part.name in _BENCHMARKS:
        peers = ["--peer-path", options.peer_path] if options.peer_path else []
        if part.name == "machine" and options.kernels:
            peers += ["--kernels", options.kernels]
        chosen = [part.name, "--out", str(out), "--seconds", f"{seconds:.0f}"]
        return [*module, "bench.gpu_parts", *chosen, *peers, *commit, *toy]
    if part.name == "smoke":
        return [*module, "bench.smoke", "--out", str(out / "smoke.jsonl"), *toy]
    if part.name == "kernels":
        return [*module, "bench.kernel_times", "--out", str(out), *commit, *toy]
    if part.name == "tests":
        report = [f"--junit-xml={out / 'tests.xml'}", "-rfE", "--tb=short", "--continue-on-collection-errors"]
        workers = ["--collect-only", "-q"] if options.dry_run else ["-n", "12", "--dist", "worksteal", "-v"]
        which = shlex.split(options.tests) if options.tests else ["-m", "gpu", *DESELECTED]
        return [*module, "pytest", *report, *workers, *which]
    if part.name == "memcheck":
        return [
            python,
            "tests/kernels/sanitize.py",
            *(["--cases", "--interpreted"] if options.dry_run else ["memcheck"]),
        ]
    if part.name == "counters":
        launched = [*module, "bench.kernel_times", "--once"]
        if options.dry_run:
            return [*launched, "--toy"]
        kernels = ["--kernel-name", "regex:gather|scatter|weight_grad|join|sum_tiles"]
        ncu = ["ncu", "--set", "full", "--clock-control", "none", "--csv", "--page", "raw", *kernels]
        return [*ncu, "--log-file", str(out / "counters.csv"), *launched, "--tokens", "16384"]
    tiles = ["--limit", f"{seconds:.0f}", "--out", str(out / "tiles.jsonl")]
    return [*module, "bench.tune", *tiles, *commit, *toy]


def rehearse(parts: Sequence[Part], limit: float) -> list[Outcome]:
    """The call by a stand-in clock, every part at its slowest.

    Raises:
        RuntimeError: it would take longer than it may.
    """
    outcomes = list(go_through(parts, limit, StandIn()))
    if outcomes[-1].ended_s > limit:
        raise RuntimeError(f"the parts may take {outcomes[-1].ended_s:.0f} s, the call has {limit:.0f}")
    return outcomes


def forget_this_machine(out: Path) -> None:
    """pytest's report names this machine and where the checkout lies on it: neither is to be kept."""
    report = out / "tests.xml"
    if report.is_file():
        text = report.read_text(encoding="utf-8").replace(
            f"{Path(__file__).resolve().parents[1]}{os.sep}", ""
        )
        report.write_text(re.sub(r' hostname="[^"]*"', "", text), encoding="utf-8")


def check_folder(out: Path) -> list[str]:
    """A line for each file that was left, and what could not come back."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    lines = []
    for path in files:
        size, name = path.stat().st_size, path.relative_to(out)
        count = f", {len(path.read_bytes().splitlines())} lines" if path.suffix == ".jsonl" else ""
        lines.append(f"{name}: {size / 1024:.0f} KiB{count}")
        if size > MOST_BYTES:
            lines.append(f"{name} is larger than {MOST_BYTES // 2**20} MiB: it does not come back")
    if len(files) > MOST_FILES:
        lines.append(f"{len(files)} files: no more than {MOST_FILES} come back")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    listed = "\n".join(
        f"{call}, {limit} s:\n"
        + "\n".join(
            f"{'*' if part.always else ' '} {part.name:10} {part.seconds:4} s  {part.about}" for part in parts
        )
        for call, (parts, limit) in CALLS.items()
    )
    parser = argparse.ArgumentParser(
        prog="bash bench/gpu.sh",
        description="What a machine with a GPU is needed for, a quarter of an hour in two calls.",
        epilog=f"parts of a call and their shares of its time; * always runs:\n{listed}\n\n"
        "Nothing runs after a smoke test that fails. PYTHON chooses the interpreter.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "call",
        choices=list(CALLS),
        help="first: all its parts, in their order; second: what the first one's results ask for, by --only",
    )
    parser.add_argument("--from", dest="caller", default=".", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="parts, with commas; those marked * run all the same")
    parser.add_argument("--out", help="new or empty folder for what is kept")
    parser.add_argument("--limit", type=int, help="seconds for the whole call (default 480, 240)")
    parser.add_argument("--tests", help="what pytest is to run in place of -m gpu")
    parser.add_argument("--peer-path", help="folder with the sources of triton_kernels and scattermoe")
    parser.add_argument("--commit", help="of the checkout, to be recorded where there is no git")
    parser.add_argument(
        "--kernels",
        help="file of kernels compiled before (default build/kernels-sm_90.zip, if it is there)",
    )
    parser.add_argument("--dry-run", action="store_true", help="needs no GPU: tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    only = [name for name in options.only.split(",") if name]
    if options.call == "second" and not only:
        parser.error("the second call needs --only: read the first one's results, then choose")
    try:
        options.parts = chosen(options.call, only)
    except ValueError as error:
        parser.error(str(error))
    options.limit = CALLS[options.call][1] if options.limit is None else options.limit
    least = RESERVE_S + sum(part.grace_s + 2 for part in options.parts)
    if options.limit < least:
        parser.error(f"--limit must be at least {least} s for these parts, got {options.limit}")
    if options.out is None:
        if not options.dry_run:
            parser.error("--out is needed: the folder for everything that is kept")
        options.out = tempfile.mkdtemp()
    for name in ("out", "peer_path", "kernels"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, os.path.join(options.caller, path))
    if options.kernels is None and KERNELS.exists():
        options.kernels = str(KERNELS)
    if options.kernels is not None and not Path(options.kernels).is_file():
        parser.error(f"--kernels must be a file, there is none at {options.kernels}")
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        parser.error(f"--out must be a folder, {out} is none")
    if out.is_dir() and any(out.iterdir()):
        parser.error(f"--out must be a new or an empty folder, {out} has files")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a call; 0 if every part was right."""
    options = parse(arguments)
    out = Path(options.out)
    planned = rehearse(options.parts, options.limit)
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs, and theirs, ignore it
    with (out / LOG).open("ab") as log, (out / SESSION).open("a", encoding="utf-8") as session:
        host = Host(options, log)
        for outcome in planned:
            host.say(f"{outcome.part:10} ends by {outcome.ended_s:4.0f} of {options.limit} s")
        outcomes = []
        for outcome in go_through(options.parts, options.limit, host):
            outcomes.append(outcome)
            session.write(json.dumps(asdict(outcome)) + "\n")
            session.flush()
            host.say(f"=== {outcome.part}: {outcome.became}, {outcome.ended_s - outcome.began_s:.0f} s")
        forget_this_machine(out)
        host.say(f"=== {out}, after {host.now():.0f} s")
        for outcome in outcomes:
            host.say(f"{outcome.part}: {outcome.became}, {outcome.ended_s - outcome.began_s:.0f} s")
        for line in check_folder(out):
            host.say(line)
    return 0 if all(outcome.became == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
