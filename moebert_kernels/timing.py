"""Timing things beside each other: clocks of devices, rounds in turn, and what to say of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Timer = Callable[[], float]
Key = TypeVar("Key")


@dataclass(frozen=True)
class Spread:
    """Of `samples` measurements the median, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float
    samples: int


def spread(values: Sequence[float]) -> Spread:
    """Summarise what was measured of one entry."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1], len(values))


def timer_of(device: torch.device) -> Callable[[Callable[[], object]], Timer]:
    """What makes a timer of a call: on CUDA by events with the device idle before, elsewhere by the clock."""
    return on_cuda if device.type == "cuda" else on_host


def on_host(call: Callable[[], object]) -> Timer:
    """Seconds of a call by the host's clock."""

    def timer() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timer


def on_cuda(call: Callable[[], object]) -> Timer:
    """Seconds between the device's begin of a call and its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timer() -> float:
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return timer


def interleave(
    timers: Mapping[Key, Timer],
    *,
    rounds: int,
    max_seconds: float,
    progress: Callable[[int, int], None] | None = None,
    failed: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, list[float]]:
    """Sample each timer in turn, round after round, so that a slow spell of the machine meets all alike.

    Args:
        timers: by entry.
        rounds: samples of each.
        max_seconds: stop early, after three rounds at least, when the rounds have taken longer than this.
        progress: called with (rounds done, rounds in all).
        failed: hears of a timer's error, and the other entries go on without it; if None, it is raised.

    Returns:
        The samples of each entry that did not fail.
    """
    samples: dict[Key, list[float]] = {key: [] for key in timers}
    order = list(timers)
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > max_seconds:
            break
        for key in list(order):
            try:
                samples[key].append(timers[key]())
            except Exception as error:
                if failed is None:
                    raise
                failed(key, error)
                del samples[key]
                order.remove(key)
        order = order[1:] + order[:1]  # no entry always follows the same one
        if progress is not None:
            progress(done + 1, rounds)
    return samples
