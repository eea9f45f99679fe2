"""The engine: bind, verify, then time, every entry of an operator in one run, and yield a row for each."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.environment import busy_cpus, describe_environment
from moebert_kernels.timing import Timer, spread

from .cases import Request
from .ceilings import Ceiling, ProbeSizes, measure_ceilings
from .registry import DidNotRun, Entry, Op, Thunk
from .results import Row, Run
from .timing import first_line, interleave, make_timer

_CACHES_TO_ROTATE_PAST = 3
_MOST_COPIES = 32
_ELEMENTS_OF_A_THREAD = 2**15  # torch starts no thread for fewer


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        request: the shapes.
        device: "cpu", "cuda" or "cuda:1".
        threads: of torch on the CPU, each on a processor of its own; None for all there are.
        passes: None for the operator's own choice.
        launches: None for eager, and graphs on CUDA.
        caches: None for warm, and cold on CUDA.
        rounds: samples of each entry.
        seconds: bound on the rounds of one case, pass, launch and cache.
        limit: seconds after which nothing more is started; what was measured by then is kept.
        peer_path: folder of peers' sources.
        only: names of entries to run; None for all.
        seed: of the data.
        probes: sizes of the ceilings' probes; None for the device's own.
    """

    request: Request = field(default_factory=Request)
    device: str = "cpu"
    threads: int | None = None
    passes: tuple[str, ...] | None = None
    launches: tuple[str, ...] | None = None
    caches: tuple[str, ...] | None = None
    rounds: int = 30
    seconds: float = 10.0
    limit: float | None = None
    peer_path: str | None = None
    only: tuple[str, ...] | None = None
    seed: int = 0
    probes: ProbeSizes | None = None


def start(op: Op, settings: Settings) -> tuple[Run, Iterator[Row]]:
    """Pin the threads, measure the ceilings; return the run with its rows, computed as they are asked for.

    Raises:
        ValueError: an entry, a pass or the device that was asked for does not exist.
    """
    device = _device(settings.device)
    cases = op.cases(settings.request, device.type)
    entries = _chosen("entry", [entry.name for entry in op.entries(settings.peer_path)], settings.only)
    passes = _chosen("pass", list(op.passes), settings.passes or op.default_passes or None)
    dtypes = tuple(dict.fromkeys(getattr(case, "dtype", "float32") for case in cases))
    run = describe_run(op.name, dtypes, device, settings)
    return run, _rows(op, cases, entries, passes, device, settings, run.ceilings)


def describe_run(name: str, dtypes: tuple[str, ...], device: torch.device, settings: Settings) -> Run:
    """Pin the threads and measure the ceilings of dtypes: the head of a result file."""
    busy = busy_cpus()
    cpus = pin_threads(settings.threads) if device.type == "cpu" else ()
    return Run(
        op=name,
        device_type=device.type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        cpus=cpus,
        settings=_recorded(settings),
        environment=asdict(describe_environment()),
        ceilings=measure_ceilings(dtypes, device, settings.probes),
        busy_cpus=busy,
    )


def _recorded(item: Any) -> dict[str, Any]:
    """A dataclass as a file holds it: where a user keeps texts and peers is nobody's business."""
    values = asdict(item)
    for holder in (values, values.get("request", {})):
        for name in ("text", "peer_path"):
            if holder.get(name):
                holder[name] = "/".join(Path(holder[name]).parts[-2:])
    return values


def pin_threads(threads: int | None) -> tuple[int, ...]:
    """Confine the process to as many processors as torch has threads, and return them.

    Where OMP_PROC_BIND is set, as `cpu.sh` does, OpenMP has done so when torch was loaded, each thread on a
    processor of its own; this thread's mask then holds no more than one, so the others are asked for theirs.
    """
    bound = os.environ.get("OMP_PROC_BIND", "false").lower() != "false"
    if bound or not hasattr(os, "sched_setaffinity"):
        torch.set_num_threads(threads or torch.get_num_threads())
        return _processors_of_threads()
    cpus = sorted(os.sched_getaffinity(0))
    cpus = cpus[: threads or len(cpus)]
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads or len(cpus))
    return tuple(cpus)


def _processors_of_threads() -> tuple[int, ...]:
    """Where the threads of this process may run, torch's among them; nothing if the system does not tell."""
    torch.ones(torch.get_num_threads() * _ELEMENTS_OF_A_THREAD).neg_()  # OpenMP starts them when first used
    masks = []
    try:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                masks.append(os.sched_getaffinity(int(thread)))
    except (OSError, AttributeError):
        return ()
    return tuple(sorted(set().union(*masks)))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device is {name!r}, but torch finds {count or 'no'} CUDA device{'s'[: count > 1]}"
            )
        torch.cuda.set_device(device.index or 0)
    return device


def _chosen(what: str, known: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    unknown = set(wanted or ()) - set(known)
    if unknown:
        raise ValueError(f"there is no {what} {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return [name for name in known if wanted is None or name in wanted]


def _rows(
    op: Op,
    cases: list[Any],
    names: list[str],
    passes: list[str],
    device: torch.device,
    settings: Settings,
    ceilings: dict[str, Ceiling],
) -> Iterator[Row]:
    launches = settings.launches or (("eager", "graph") if device.type == "cuda" else ("eager",))
    caches = settings.caches or (("warm", "cold") if device.type == "cuda" else ("warm",))
    entries = [entry for entry in op.entries(settings.peer_path) if entry.name in names]
    deadline = float("inf") if settings.limit is None else time.monotonic() + settings.limit
    for case in cases:
        if time.monotonic() > deadline:
            return
        copies = [op.make_inputs(case, device, settings.seed)]
        if "cold" in caches:
            wanted = copies_past_cache(op.footprint(copies[0]), device)
            copies += [op.make_inputs(case, device, settings.seed + index) for index in range(1, wanted)]
        ceiling = ceilings[getattr(case, "dtype", "float32")]
        for pass_ in passes:
            if time.monotonic() > deadline:
                return
            references: dict[str, dict[str, Tensor]] = {}
            checked = {entry.name: _verify(op, entry, copies[0], pass_, references) for entry in entries}
            del references
            for cache in caches:
                inputs = copies if cache == "cold" else copies[:1]
                for launch in launches:
                    if time.monotonic() > deadline:
                        return
                    mode = _Mode(case, pass_, launch, cache)
                    yield from _time(op, entries, checked, inputs, mode, device, settings, ceiling)
        del copies
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Mode:
    case: Any
    pass_: str
    launch: str
    cache: str


def _verify(
    op: Op, entry: Entry, inputs: Any, pass_: str, references: dict[str, dict[str, Tensor]]
) -> dict[str, float] | str:
    """The errors of an entry's outputs, or why it is not to be timed; references stay for the next entry."""
    try:
        outputs = entry.restore(entry.bind(inputs, pass_)())
        if entry.work not in references:
            references[entry.work] = op.reference(inputs, pass_, entry.work)
        return op.check(outputs, references[entry.work], inputs, entry.work)
    except DidNotRun as error:
        return str(error)
    except Exception as error:
        return first_line(error)


def _time(
    op: Op,
    entries: list[Entry],
    checked: dict[str, dict[str, float] | str],
    inputs: list[Any],
    mode: _Mode,
    device: torch.device,
    settings: Settings,
    ceiling: Ceiling,
) -> Iterator[Row]:
    timers: dict[str, Timer] = {}
    reasons = {name: reason for name, reason in checked.items() if isinstance(reason, str)}
    for entry in entries:
        if entry.name in reasons:
            continue
        try:
            thunks: list[Thunk] = [entry.bind(copy, mode.pass_) for copy in inputs]
            timers[entry.name] = make_timer(device, mode.launch, thunks)
        except DidNotRun as error:
            reasons[entry.name] = str(error)
        except Exception as error:
            reasons[entry.name] = first_line(error)
    samples, failed = interleave(timers, settings.rounds, settings.seconds)
    reasons |= failed
    for entry in entries:
        work = op.work(inputs[0], mode.pass_, entry.work)
        errors = checked[entry.name]
        yield Row(
            case=_recorded(mode.case),
            entry=entry.name,
            work=entry.work,
            pass_=mode.pass_,
            launch=mode.launch,
            cache=mode.cache,
            dispatch=entry.dispatch,
            seconds=spread(samples[entry.name]) if entry.name in samples else None,
            did_not_run=reasons.get(entry.name),
            errors=errors if isinstance(errors, dict) else {},
            flops=work.flops,
            bytes=work.bytes,
            floor_s=ceiling.floor(work),
            predicted_us=_predicted(op, entry, mode, device, ceiling),
        )
    del timers
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the graphs' pools


def _predicted(op: Op, entry: Entry, mode: _Mode, device: torch.device, ceiling: Ceiling) -> float | None:
    ours = entry.name == op.entries(None)[0].name
    if not ours or device.type != "cuda" or (mode.launch, mode.cache) != ("graph", "cold"):
        return None
    return op.predict(mode.case, mode.pass_, torch.cuda.get_device_name(device), ceiling)


def copies_past_cache(footprint: int, device: torch.device) -> int:
    """So many that one round of them is several times the last cache."""
    size = _cache_bytes(device)
    return min(_MOST_COPIES, max(2, -(-_CACHES_TO_ROTATE_PAST * size // max(1, footprint))))


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 2**25
    except (AttributeError, ValueError, OSError):
        return 2**25
