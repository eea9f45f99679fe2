"""The tuning pass: times candidate tiles of every GEMM and prints the lines of `kernels/configs.py`'s table.

    python -m bench.tune [--arithmetic half,tf32,ieee] [--limit 400] [--out FILE]

One choice is varied at a time, the others as they stand, in a CUDA graph on cold caches, at BERT-base sizes.
A candidate that does not compile, does not fit the device or gives other results is passed over. Paste what
is printed into the table and read it with `python -m moebert_kernels.kernels.inspect`: an entry that spills
is a bug, however fast. With --toy and TRITON_INTERPRET=1 everything runs without a GPU, and says nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import RoutingPlan

from .baselines.implementation import FFNInputs
from .cases import FFNCase
from .ffn import make_inputs
from .registry import Outputs, Thunk
from .run import copies_past_cache
from .tables import duration
from .timing import make_timer
from .verify import check_close

_FORWARD = ("up", "down", "tma")
_BACKWARD = ("down_backward", "up_backward", "weight_grad", "stream_k")
ARITHMETIC = ("half", "tf32", "ieee")
_WORTH_IT = 0.98  # of the time so far


@dataclass(frozen=True)
class Scale:
    """What is tried, on what.

    Attributes:
        case: sizes of the layer.
        tokens: T that stands for each size class of the table.
        shapes: m, n, warps and parts of the GEMMs' tiles.
        weight_shapes: m, n and warps of the weight gradients' tiles.
        stages: of the pipelines.
        dense_tokens: T at which all experts on all tokens are tried.
        samples: of each time, of which the median counts.
    """

    case: FFNCase
    tokens: dict[str, int]
    shapes: tuple[tuple[int, int, int, int], ...]
    weight_shapes: tuple[tuple[int, int, int], ...]
    stages: tuple[int, ...]
    dense_tokens: tuple[int, ...]
    samples: int = 9


FULL = Scale(
    case=FFNCase(0),
    tokens={"small": 256, "medium": 4096, "large": 32768},
    shapes=(
        (64, 64, 4, 2),
        (64, 128, 4, 4),
        (128, 64, 4, 2),
        (128, 128, 8, 4),
        (64, 256, 8, 4),
        (128, 256, 8, 4),
    ),
    weight_shapes=((64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8)),
    stages=(3, 4, 5),
    dense_tokens=(16, 32, 64, 128, 256, 512, 1024),
)
TOY = Scale(
    case=FFNCase(0, D=16, F=16, E=2, dtype="float32"),
    tokens={"small": 8},
    shapes=((16, 16, 4, 1),),
    weight_shapes=((16, 16, 4),),
    stages=(2,),
    dense_tokens=(8,),
    samples=1,
)


def candidates(field: str, scale: Scale, k: int) -> list[Any]:
    """Values to try for one field of a `Config`."""
    from moebert_kernels.kernels.configs import Tile

    if field in ("tma", "stream_k"):
        return [False, True]
    if field == "weight_grad":
        return [
            Tile(m, n, k, warps, stages) for m, n, warps in scale.weight_shapes for stages in scale.stages
        ]
    return [Tile(m, n, k, warps, s, parts) for m, n, warps, parts in scale.shapes for s in scale.stages]


@dataclass(frozen=True)
class Tuner:
    """One device, one dtype, one token count.

    Attributes:
        copies: inputs, so many that they are cold when their turn comes.
        deadline: when no further candidate is started.
        samples: of each time.
    """

    copies: tuple[FFNInputs, ...]
    deadline: float
    samples: int

    @property
    def device(self) -> torch.device:
        return self.copies[0].x_TD.device

    def forward(self, inputs: FFNInputs, config: Any) -> Thunk:
        """Inference, the plan given."""
        arguments = _arguments(inputs)
        return lambda: {"y": _kernels().expert_ffn_forward(*arguments, False, False, config)[0]}

    def backward(self, inputs: FFNInputs, config: Any) -> Thunk:
        """All gradients, from saved pre-activations."""
        x_TD, *rest = _arguments(inputs)
        _, preact_SF = _kernels().expert_ffn_forward(x_TD, *rest, False, True, config)
        needs = [True, True, True, True, True, False]

        def thunk() -> Outputs:
            grads = _kernels().expert_ffn_backward(inputs.dy_TD, x_TD, preact_SF, *rest, False, needs, config)
            return dict(zip(("dx", "dw1", "db1", "dw2", "db2"), grads, strict=False))

        return thunk

    def seconds(self, pass_: str, config: Any, expected: dict[str, Tensor] | None = None) -> float:
        """Median time of a pass; infinite if it does not run or its results are others than `expected`."""
        try:
            thunks = [getattr(self, pass_)(inputs, config) for inputs in self.copies]
            if expected is not None:
                check_close(thunks[0](), expected, self.copies[0].x_TD.dtype, slack=2.0)
            timer = make_timer(self.device, "graph" if self.device.type == "cuda" else "eager", thunks)
            return statistics.median(timer() for _ in range(self.samples))
        except torch.AcceleratorError:
            raise  # the device is lost: every further figure would be wrong
        except Exception:
            return float("inf")

    def tune(self, config: Any, pass_: str, names: tuple[str, ...], scale: Scale) -> tuple[Any, float, float]:
        """Vary each field in turn; the config found, its time, and the time before."""
        k = 32 if self.copies[0].x_TD.dtype == torch.float32 else 64
        k = min(k, scale.case.D, scale.case.F)
        expected = {
            name: value.double() for name, value in getattr(self, pass_)(self.copies[0], config)().items()
        }
        before = best = self.seconds(pass_, config)
        for name in names:
            for value in candidates(name, scale, k):
                if time.monotonic() > self.deadline:
                    return config, best, before
                if value != getattr(config, name):
                    tried = replace(config, **{name: value})
                    seconds = self.seconds(pass_, tried, expected)
                    if seconds < _WORTH_IT * best:
                        config, best = tried, seconds
        return config, best, before


def _kernels() -> Any:
    from moebert_kernels import kernels

    return kernels


def _arguments(inputs: FFNInputs) -> tuple[Any, ...]:
    """Of `kernels.expert_ffn_forward`, up to `top_k`."""
    plan = RoutingPlan.from_expert_ids(inputs.expert_ids_TK, inputs.case.E)
    weights = (inputs.w1_EFD, inputs.b1_EF, inputs.w2_EDF, inputs.b2_ED)
    return (inputs.x_TD, plan.order_S, plan.offsets_E1, *weights, None, "gelu", inputs.case.K)


def _copies(case: FFNCase, device: torch.device) -> tuple[FFNInputs, ...]:
    first = make_inputs(case, device, 0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (first.x_TD, first.w1_EFD, first.w2_EDF))
    count = copies_past_cache(size, device) if device.type == "cuda" else 1
    return (first, *(make_inputs(case, device, seed) for seed in range(1, count)))


def table_lines(scale: Scale, device: torch.device, deadline: float) -> Iterator[str]:
    """The table's lines, one per size class, each after the times it rests on."""
    from moebert_kernels.kernels import configs

    for size, tokens in scale.tokens.items():
        tuner = Tuner(_copies(replace(scale.case, T=tokens), device), deadline, scale.samples)
        dtype = tuner.copies[0].x_TD.dtype
        config = replace(configs.select(device, dtype, tokens, scale.case.E), dense_slots=0)
        config, forward, forward_before = tuner.tune(config, "forward", _FORWARD, scale)
        config, backward, backward_before = tuner.tune(config, "backward", _BACKWARD, scale)
        if size == "small":
            config = replace(config, dense_slots=_dense_reach(config, scale, device, deadline))
        key = (configs.family(device), configs.arithmetic(dtype), size)
        yield (
            f"    # T={tokens}: forward {duration(forward)} (before {duration(forward_before)}), "
            f"backward {duration(backward)} (before {duration(backward_before)})"
        )
        yield f"    {key!r}: {_source(config)},"


def _dense_reach(config: Any, scale: Scale, device: torch.device, deadline: float) -> int:
    """The most tokens, of those tried, up to which all experts on all tokens are faster than sorted ones."""
    reach = 0
    for tokens in scale.dense_tokens:
        tuner = Tuner(_copies(replace(scale.case, T=tokens), device), deadline, scale.samples)
        dense = tuner.seconds("forward", replace(config, dense_slots=tokens))
        if time.monotonic() > deadline or dense >= tuner.seconds("forward", config):
            break
        reach = tokens
    return reach


def _source(config: Any) -> str:
    defaults = type(config)(*(None for _ in range(5)))
    parts = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if getattr(config, field.name) != getattr(defaults, field.name)
    ]
    return f"Config({', '.join(parts)})"


def tune(
    arithmetic: Sequence[str],
    device: torch.device,
    *,
    limit: float,
    toy: bool = False,
    out: Path | None = None,
) -> None:
    """Time candidate tiles and print the table that follows from them.

    Args:
        arithmetic: some of `ARITHMETIC`.
        device: where the candidates run.
        limit: seconds after which none is started.
        toy: tiny sizes, few candidates.
        out: file for the lines, beside stdout.
    """
    deadline = time.monotonic() + limit
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("", encoding="utf-8")
    for name in arithmetic:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
        scale = replace(FULL, case=replace(FULL.case, dtype="bfloat16" if name == "half" else "float32"))
        for line in table_lines(TOY if toy else scale, device, deadline):
            print(line, flush=True)
            if out is not None:  # line by line: what is cut off keeps what it has
                with out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, by default this process's; wrong ones end the process with status 2."""
    parser = argparse.ArgumentParser(
        "python -m bench.tune",
        description="Time candidate tiles and print the table that follows from them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--arithmetic",
        default="half",
        metavar="NAME,...",
        help=f"some of {', '.join(ARITHMETIC)} (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 (default: %(default)s)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=400.0,
        metavar="S",
        help="seconds after which no candidate is started (default: %(default)s)",
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes, two candidates")
    parser.add_argument("--out", type=Path, metavar="FILE", help="for the lines, beside the terminal")
    given = parser.parse_args(arguments)
    given.arithmetic = given.arithmetic.split(",")
    if unknown := [name for name in given.arithmetic if name not in ARITHMETIC]:
        parser.error(f"--arithmetic must be some of {', '.join(ARITHMETIC)}, got {', '.join(unknown)}")
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, by default this process's."""
    given = parse(arguments)
    tune(given.arithmetic, torch.device(given.device), limit=given.limit, toy=given.toy, out=given.out)


if __name__ == "__main__":
    main()
