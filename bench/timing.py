"""Timers: the host's clock, CUDA events round eager calls or round a graph. Rounds interleave the entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from moebert_kernels import timing
from moebert_kernels.timing import Key, Timer, on_cuda, on_host

from .registry import DidNotRun, Thunk

LAUNCHES = ("eager", "graph")
CACHES = ("warm", "cold")
_SHORTEST_SAMPLE_S = 1e-3
_LONGEST_BURST = 128
_LONG_CALL_S = 0.2


def make_timer(device: torch.device, launch: str, thunks: Sequence[Thunk]) -> Timer:
    """Time one call, averaged over a burst long enough for the clock to resolve; ready to run, warmed up.

    Args:
        device: where the thunks compute.
        launch: "eager" or "graph".
        thunks: the same call, each on data of its own; a burst takes them in turn. One for warm caches; for
            cold ones so many that none finds its data still cached.

    Raises:
        DidNotRun: there is no graph to be had: no CUDA device, or the call cannot be captured.
    """
    if launch == "graph":
        if device.type != "cuda":
            raise DidNotRun("CUDA graphs need a CUDA device")
        return _graph_timer(thunks)
    timer = _event_timer if device.type == "cuda" else _host_timer
    return timer(_burst(thunks, _warm_up(thunks, timer)))


def _warm_up(thunks: Sequence[Thunk], timer: Callable[[Sequence[Thunk]], Timer]) -> float:
    """Call until nothing is made on first use any more; the last call's seconds."""
    for thunk in thunks[:2]:
        thunk()
    seconds = timer(thunks[:1])()
    return seconds if seconds > _LONG_CALL_S else timer(thunks[:1])()


def _burst(thunks: Sequence[Thunk], seconds: float) -> list[Thunk]:
    calls = min(_LONGEST_BURST, max(1, round(_SHORTEST_SAMPLE_S / max(seconds, 1e-9))))
    calls = -(-calls // len(thunks)) * len(thunks)
    return [thunks[index % len(thunks)] for index in range(calls)]


def _per_call(timer: Timer, calls: int) -> Timer:
    return lambda: timer() / calls


def _host_timer(burst: Sequence[Thunk]) -> Timer:
    return _per_call(on_host(lambda: _call_all(burst)), len(burst))


def _event_timer(burst: Sequence[Thunk]) -> Timer:
    return _per_call(on_cuda(lambda: _call_all(burst)), len(burst))


def _call_all(burst: Sequence[Thunk]) -> None:
    for thunk in burst:
        thunk()


def _graph_timer(thunks: Sequence[Thunk]) -> Timer:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        estimate = _warm_up(thunks, _event_timer)
        _check_asynchronous(thunks[0])
    torch.cuda.current_stream().wait_stream(stream)
    burst = _burst(thunks, estimate)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for thunk in burst:
                thunk()
    except Exception as error:
        raise DidNotRun(f"cannot be captured in a CUDA graph: {first_line(error)}") from error
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer(_kept_alive: Sequence[Thunk] = burst) -> float:  # the graph reads what the thunks hold
        torch.cuda.synchronize()
        graph.replay()  # behind which what is timed is launched: a large graph's launch takes a millisecond
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return _per_call(timer, len(burst))


def _check_asynchronous(thunk: Thunk) -> None:
    """Refuse what waits for the device before a capture fails over it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        thunk()
    except RuntimeError as error:
        raise DidNotRun(f"cannot be captured in a CUDA graph: {first_line(error)}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def first_line(error: BaseException) -> str:
    """Name an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def interleave(
    timers: Mapping[Key, Timer], rounds: int, max_seconds: float
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """The samples of each entry, and the error of each that failed; see `moebert_kernels.timing`."""
    failed: dict[Key, str] = {}

    def note(key: Key, error: Exception) -> None:
        failed[key] = first_line(error)

    return timing.interleave(timers, rounds=rounds, max_seconds=max_seconds, failed=note), failed
