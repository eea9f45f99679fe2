"""The time of every kernel that one forward and backward pass of the layer launches, alone and in place.

    python -m bench.kernel_times --out DIR [--tokens 4096,16384,65536] [--once] [--toy]

The launches of a pass are recorded and run once in order, so that each finds real data. "Alone", a launch is
then timed by itself in a CUDA graph, over so many copies of the inputs that none finds its data cached. "In
place", the profiler reads each kernel's time within a graph of whole passes, where it finds in the cache
what the kernel before it wrote. --once launches each kernel once and times nothing: what a profiler wraps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import RoutingPlan
from moebert_kernels.kernels.call import Call
from moebert_kernels.timing import Spread, spread

from . import ceilings
from .baselines.implementation import FFNInputs
from .cases import FFNCase, Request
from .ceilings import Ceiling
from .ffn import footprint, make_inputs
from .registry import DidNotRun, Work
from .results import Row, write
from .run import Settings, copies_past_cache, describe_run
from .tables import duration, half_width
from .timing import first_line, make_timer

TOKENS = (16384, 65536, 4096)
TOY_TOKENS = (24,)
_SAMPLES = 9
_REPLAYS = 10
_PRODUCTS = ("gather", "scatter", "weight_grad")


@dataclass(frozen=True)
class Step:
    """The launches of one pass over one copy of the inputs, ready to be run again."""

    launches: tuple[Any, ...]

    def run(self) -> None:
        """All of them, in order."""
        for launch in self.launches:
            launch.kernel[launch.grid](**launch.arguments)


def record(inputs: FFNInputs) -> Step:
    """Record what a forward and backward pass launches, the plan given, and run it once."""
    from moebert_kernels.kernels import triton as kernels
    from moebert_kernels.kernels.triton.launch import recorded

    plan = RoutingPlan.from_expert_ids(inputs.expert_ids_TK, inputs.case.E)
    of_plan = plan.expert_ids_TK, plan.order_S, plan.inverse_S, plan.offsets_E1
    call = Call(inputs.x_TD, *of_plan, inputs.w1_EFD, inputs.b1_EF, inputs.w2_EDF, inputs.b2_ED)
    with recorded() as launches:
        _, hidden = kernels.expert_ffn_forward(call, True)
        kernels.expert_ffn_backward(call, hidden, inputs.dy_TD, [True] * 5 + [False])
    step = Step(tuple(launches))
    step.run()
    return step


def work_of(launch: Any, case: FFNCase) -> Work:
    """A product's multiply-adds, and every tensor that a launch is given, read or written once."""
    product = launch.kernel.__name__.startswith(_PRODUCTS)
    both = all(launch.arguments.get(name) is not None for name in ("dw1_ptr", "dw2_ptr"))
    flops = (2.0 + 2.0 * both) * case.T * case.K * case.D * case.F if product else 0.0
    tensors = {}
    for value in launch.arguments.values():
        tensor = getattr(value, "base", value) if not isinstance(value, Tensor) else value
        if isinstance(tensor, Tensor):
            tensors[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return Work(flops, float(sum(tensors.values())))


def name_of(index: int, launch: Any) -> str:
    """The kernel, its place in the pass, and the tile it computes."""
    tile = [launch.arguments[side] for side in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if side in launch.arguments]
    name = launch.kernel.__name__.removesuffix("_kernel")
    return f"{index + 1} {name}" + (f" {'x'.join(map(str, tile))}" if tile else "")


def alone(steps: list[Step], index: int, device: torch.device) -> Spread:
    """Seconds of one launch of the pass."""

    def thunk(launch: Any) -> Callable[[], dict[str, Any]]:
        def call() -> dict[str, Any]:
            launch.kernel[launch.grid](**launch.arguments)
            return {}

        return call

    timer = make_timer(
        device, "graph" if device.type == "cuda" else "eager", [thunk(step.launches[index]) for step in steps]
    )
    return spread([timer() for _ in range(_SAMPLES if device.type == "cuda" else 1)])


def in_place(steps: list[Step]) -> list[Spread]:
    """Seconds of every launch within graphs of whole passes, as the profiler reads them from the device.

    Raises:
        DidNotRun: the profiler did not see every launch.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step.run()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    names = [launch.kernel.__name__ for launch in steps[0].launches]
    events = [event for event in profiler.events() if event.name in set(names)]
    events.sort(key=lambda event: event.time_range.start)
    if [event.name for event in events] != names * (len(steps) * _REPLAYS):
        raise DidNotRun(f"the profiler saw {len(events)} of {len(names) * len(steps) * _REPLAYS} launches")
    return [
        spread([event.time_range.elapsed_us() * 1e-6 for event in events[index :: len(names)]])
        for index in range(len(names))
    ]


def predicted(
    launches: tuple[Any, ...], case: FFNCase, device: torch.device, ceiling: Ceiling
) -> list[float | None]:
    """Microseconds that `machine` expects of each launch alone; None where it knows nothing."""
    from .predictions import of_kernels

    unknown: list[float | None] = [None] * len(launches)
    if device.type != "cuda":
        return unknown
    found = of_kernels(case, torch.cuda.get_device_name(device), ceiling, "forward+backward")
    names = [launch.kernel.__name__.removesuffix("_kernel").removesuffix("_stream") for launch in launches]
    if found is None or [name for name, _ in found] != names:
        return unknown
    return [None if prediction is None else round(prediction.seconds * 1e6, 2) for _, prediction in found]


def rows(case: FFNCase, device: torch.device, ceiling: Ceiling) -> Iterator[Row]:
    """A row for every launch of a pass, alone, and then in place."""
    copies = [make_inputs(case, device, 0)]
    count = copies_past_cache(footprint(copies[0]), device) if device.type == "cuda" else 1
    copies += [make_inputs(case, device, seed) for seed in range(1, count)]
    steps = [record(inputs) for inputs in copies]
    launches = steps[0].launches
    expected = predicted(launches, case, device, ceiling)

    def row(index: int, cache: str, seconds: Spread | None, reason: str | None) -> Row:
        work = work_of(launches[index], case)
        return Row(
            case=asdict(case),
            entry=name_of(index, launches[index]),
            work="kernel",
            pass_="forward+backward",
            launch="graph" if device.type == "cuda" else "eager",
            cache=cache,
            dispatch="apart",
            seconds=seconds,
            did_not_run=reason,
            flops=work.flops,
            bytes=work.bytes,
            floor_s=ceiling.floor(work),
            predicted_us=expected[index] if cache == "cold" else None,
        )

    for index in range(len(launches)):
        try:
            yield row(index, "cold", alone(steps, index, device), None)
        except Exception as error:
            yield row(index, "cold", None, first_line(error))
    if device.type != "cuda":
        return
    try:
        found = in_place(steps)
    except Exception as error:
        for index in range(len(launches)):
            yield row(index, "in place", None, first_line(error))
        return
    for index, seconds in enumerate(found):
        yield row(index, "in place", seconds, None)


def line(row: Row, ceiling: Ceiling) -> str:
    """One figure for the log: its time, and the shares of the ceilings that it reaches."""
    place = "alone" if row.cache == "cold" else "in place"
    head = f"T={row.case['T']:<6} {row.entry:40} {place:8}"
    if row.seconds is None:
        return f"{head} did not run: {row.did_not_run}"
    time = row.seconds.median
    expected = "" if row.predicted_us is None else f", predicted {duration(row.predicted_us * 1e-6)}"
    return (
        f"{head} {duration(time):>8} ±{half_width(row.seconds):<4.0%} {row.flops / time / 1e12:5.0f} TFLOP/s "
        f"({row.flops / time / ceiling.flops_per_s:.0%}), {row.bytes / time / 1e12:.2f} TB/s "
        f"({row.bytes / time / ceiling.bytes_per_s:.0%}){expected}"
    )


def main() -> None:
    """Time the kernels of each token count, into a result file of the "kernels" benchmark."""
    parser = argparse.ArgumentParser(description="Time each kernel of a forward and backward pass.")
    parser.add_argument("--out", type=Path, help="folder for the result file; default: print only")
    parser.add_argument("--tokens", help="T, with commas")
    parser.add_argument("--once", action="store_true", help="launch each kernel once, for a profiler")
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument("--toy", action="store_true", help="tiny, in Triton's interpreter")
    options = parser.parse_args()
    sizes: dict[str, Any] = {"D": 16, "F": 16, "E": 2, "dtype": "float32"} if options.toy else {}
    tokens: tuple[int, ...] = TOY_TOKENS if options.toy else TOKENS
    if options.tokens:
        tokens = tuple(int(count) for count in options.tokens.split(","))
    cases = [FFNCase(count, **sizes) for count in tokens]
    device = torch.device("cpu" if options.toy else "cuda")
    if options.once:
        for case in cases:
            record(make_inputs(case, device, 0))
        return
    settings = Settings(
        Request(T=tokens), device=device.type, threads=1, probes=ceilings.TOY if options.toy else None
    )
    run = describe_run("kernels", (cases[0].dtype,), device, settings)
    if options.commit:
        run = replace(run, environment=run.environment | {"commit": options.commit})
    ceiling = run.ceilings[cases[0].dtype]

    def told() -> Iterator[Row]:
        for case in cases:
            for row in rows(case, device, ceiling):
                print(f"{run.device}: {line(row, ceiling)}", flush=True)
                yield row
            if device.type == "cuda":
                torch.cuda.empty_cache()

    if options.out is None:
        for _ in told():
            pass
    else:
        print(write(options.out, run, told()))


if __name__ == "__main__":
    main()
