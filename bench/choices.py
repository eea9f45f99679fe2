"""What is chosen for a device besides tiles: dependent launches; up to which T all experts run on all tokens.

    python -m bench.choices --out choices.jsonl [--tokens 64,512,4096,16384]

Both forms of a choice are captured in CUDA graphs on cold caches in one process, their results compared
bitwise, and timed in turn. Each figure is appended to the file as it is measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ahead import CALLS, as_on, compile_launch, distinct, launches
from .cases import FFNCase
from .ffn import OURS, entries, footprint, make_inputs
from .run import copies_past_cache
from .timing import interleave, make_timer, spread

_PASSES = ("forward", "forward+backward")
_FEW = (8, 16, 32, 64, 128)


def use_dependent_launches(yes: bool) -> None:
    """Set it for this process, and forget what was decided under another setting."""
    from moebert_kernels.kernels import configs, launch, replay

    configs.DEPENDENT_LAUNCHES = yes
    launch.dependence.cache_clear()
    replay.forget()


def _compile(device: tuple[str, int], dependent: bool, which: tuple[Any, int]) -> None:
    call, index = which
    use_dependent_launches(dependent)
    with as_on(*device):
        launch = launches(call)[index]
    compile_launch(launch)


def compile_both(jobs: int) -> None:
    """Compile what is timed here in both forms, with so many processes."""
    from moebert_kernels.kernels import configs

    here = torch.device("cuda", torch.cuda.current_device())
    device = (configs.family(here), configs.multiprocessors(here))
    calls = tuple(call for call in CALLS if not call.gate)
    with as_on(*device):
        wanted = distinct(calls)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(_compile, device, yes, which) for which in wanted for yes in (False, True)]
        for task in tasks:
            task.result()


def compare(case: FFNCase, pass_: str, forms: dict[str, Callable[[], None]], samples: int) -> dict[str, Any]:
    """Seconds of each form of a choice, which its function sets, and whether their results are equal."""
    device = torch.device("cuda")
    copies = [make_inputs(case, device, 0)]
    count = copies_past_cache(footprint(copies[0]), device)
    copies += [make_inputs(case, device, seed) for seed in range(1, count)]
    (ours,) = (entry for entry in entries(None) if entry.name == OURS)
    timers, results = {}, {}
    for name, choose in forms.items():
        choose()
        thunks = [ours.bind(copy, pass_) for copy in copies]
        timers[name] = make_timer(device, "graph", thunks)
        results[name] = [_tensors(thunk()) for thunk in thunks[:2]]
        for _ in range(20):  # a race shows as a difference
            again = [_tensors(thunk()) for thunk in thunks[:2]]
            if not _equal(again, results[name]):
                raise RuntimeError(f"T={case.T}, {pass_}, {name}: two runs differ")
    found, failed = interleave(timers, samples, 5.0)
    if failed:
        raise RuntimeError(str(failed))
    first, *others = results.values()
    return {
        "T": case.T,
        "pass": pass_,
        "seconds": {name: spread(seconds).median for name, seconds in found.items()},
        "equal": all(_equal(other, first) for other in others),
    }


def _tensors(outputs: Any) -> list[Tensor]:
    return [value.clone() for value in outputs.values()]


def _equal(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def main() -> None:
    """Compare the forms of both choices."""
    parser = argparse.ArgumentParser(
        description="Dependent launches or not, all experts on few tokens or not."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="64,512,4096,16384", help="T, with commas")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    options = parser.parse_args()
    from moebert_kernels.kernels import configs

    begin = time.monotonic()
    compile_both(options.jobs)
    print(f"compiled in {time.monotonic() - begin:.1f} s")
    card = torch.cuda.get_device_name()

    def tell(choice: str, row: dict[str, Any]) -> None:
        times = ", ".join(f"{name} {seconds * 1e6:.2f} us" for name, seconds in row["seconds"].items())
        equal = "" if row["equal"] else "; results differ"
        print(f"{choice}, T={row['T']}, {row['pass']}: {times}{equal}", flush=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"device": card, "choice": choice, **row}) + "\n")

    dependent = {
        "ordinary": lambda: use_dependent_launches(False),
        "dependent": lambda: use_dependent_launches(True),
    }
    for count in map(int, options.tokens.split(",")):
        for pass_ in _PASSES:
            tell("launches", compare(FFNCase(count), pass_, dependent, options.samples))
    tiny, select = configs.select(torch.device("cuda", 0), torch.bfloat16, 32, 4), configs.select

    def reach(slots: int) -> Callable[[], None]:
        config = replace(tiny, dense_slots=slots)

        def choose() -> None:
            configs.select = lambda *_: config

        return choose

    try:
        for count in _FEW:
            forms = {"sorted": reach(0), "all experts": reach(count)}
            tell("few tokens", compare(FFNCase(count), "forward", forms, options.samples))
    finally:
        configs.select = select


if __name__ == "__main__":
    main()
