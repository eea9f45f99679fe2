"""Latency and throughput of models on the device at hand, measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moebert_kernels.environment import OtherWork
from moebert_kernels.timing import interleave, spread, timer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Timing = dict[str, float]


class Speed(NamedTuple):
    """How fast models are, and what that was measured under.

    Attributes:
        models: by name, "latency_ms" (milliseconds per pass) and "throughput_per_s" (sequences per second),
            each with "median", "low" and "high" (the 10th and 90th percentile), "batch_size" and
            "sequence_length".
        dtype: of the weights, such as "float32".
        busy_cpus: processors that other work kept busy meanwhile; None where that is not known.
    """

    models: dict[str, dict[str, Timing]]
    dtype: str
    busy_cpus: float | None


def packed_inputs(rows: Sequence[Sequence[int]], batch_size: int, sequence_length: int) -> dict[str, Tensor]:
    """Cut a task's token ids into full sequences without padding.

    Where a token goes depends on its id, so drawn ids would measure another load than the task's.

    Args:
        rows: token ids of each row, at least one of them; repeated as often as needed.
        batch_size: B.
        sequence_length: S.

    Returns:
        "input_ids" and "attention_mask", int64 [B, S].

    Raises:
        ValueError: there are no token ids.
    """
    if not any(len(row) for row in rows):
        raise ValueError("rows hold no token ids")
    stream = islice(chain.from_iterable(cycle(rows)), batch_size * sequence_length)
    input_ids = torch.tensor(list(stream)).view(batch_size, sequence_length)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@torch.no_grad()
def time_models(
    models: Mapping[str, PreTrainedModel],
    inputs: dict[str, Tensor],
    *,
    rounds: int = 20,
    warmup: int = 2,
    max_seconds: float = 20.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Time one forward pass of each model in turn, over and over: a slow spell of the machine meets all.

    On CUDA by events, with the device idle before each pass; elsewhere by the wall clock, with torch's
    current number of threads.

    Args:
        models: by name, all on one device; put into eval mode.
        inputs: of every model; moved to that device.
        rounds: passes of each model.
        warmup: further passes of each before, not counted.
        max_seconds: stop early, after no fewer than 3 rounds, when the rounds take longer than this.
        progress: called with (rounds done, rounds in all).

    Returns:
        Seconds of every pass, by model.
    """
    for model in models.values():
        model.eval()
    device = next(iter(models.values())).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    as_timer = timer_of(device)
    timers = {name: as_timer(partial(model, **inputs)) for name, model in models.items()}
    for timer in timers.values():
        for _ in range(warmup):
            timer()
    return interleave(timers, rounds=rounds, max_seconds=max_seconds, progress=progress)


def measure(
    models: Mapping[str, PreTrainedModel],
    rows: Sequence[Sequence[int]],
    *,
    sequence_length: int = 128,
    throughput_batch_size: int = 32,
    rounds: int = 20,
    max_seconds: float = 20.0,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Measure latency at batch size 1 and throughput at a larger one, the models interleaved.

    Args:
        models: by name, all on one device.
        rows: token ids of the task's rows, see `packed_inputs`.
        sequence_length: tokens of every sequence, none of them padding.
        throughput_batch_size: sequences at once for throughput.
        rounds: passes of each model and batch size.
        max_seconds: bound on each of the two measurements, see `time_models`.
        progress: called with (rounds done, rounds in all), over both.
    """
    others = OtherWork()

    def timed(batch_size: int, rounds_before: int) -> dict[str, list[float]]:
        def report(done: int, _total: int) -> None:
            if progress is not None:
                progress(rounds_before + done, 2 * rounds)

        inputs = packed_inputs(rows, batch_size, sequence_length)
        seconds = time_models(models, inputs, rounds=rounds, max_seconds=max_seconds, progress=report)
        report(rounds, rounds)
        return seconds

    latency_s, batch_s = timed(1, 0), timed(throughput_batch_size, rounds)
    shape = {"sequence_length": sequence_length}
    found = {
        name: {
            "latency_ms": summarize([1e3 * s for s in latency_s[name]]) | {"batch_size": 1, **shape},
            "throughput_per_s": summarize([throughput_batch_size / s for s in batch_s[name]])
            | {"batch_size": throughput_batch_size, **shape},
        }
        for name in models
    }
    dtype = str(next(iter(models.values())).dtype).removeprefix("torch.")
    return Speed(found, dtype, others.busy_cpus())


def summarize(values: Sequence[float]) -> Timing:
    """The median of measured values, and as low and high their 10th and 90th percentile."""
    found = spread(values)
    return {"median": found.median, "low": found.low, "high": found.high}
