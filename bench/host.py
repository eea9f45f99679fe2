"""What the host spends on a call: microseconds in Python and PyTorch, of which no GPU is needed to know.

    python -m bench host [--toy] [--device cuda] [--out FOLDER]

"CUDA path": the layer as on an H100, but what would start a compiled kernel does nothing. Arguments are
checked, memory is allocated, launches are found and their arguments laid out as ever; without a GPU, tensors
on the CPU stand in. "CPU": the layer on one token, so small that it is all host, and a dense network.
"Encoder": MiniLM on 1 x 16 tokens, without the time that its matrix products take, and its twin whose dense
network has one expert's size.

One row a figure; beside it the aim. Other work on the machine adds to all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from moebert_kernels import RoutingPlan, moe_ffn
from moebert_kernels.ops import backends
from moebert_kernels.timing import spread

from .cases import SHAPES, ModelCase, Request, token_ids
from .ceilings import TOY as TOY_PROBES
from .registry import DidNotRun
from .results import Row, write
from .run import Settings, describe_run
from .timing import first_line, interleave, make_timer

AIMS = {  # microseconds, and the encoder's time relative to its twin's
    ("CUDA path", "forward"): 35.0,
    ("CUDA path", "forward+backward"): 110.0,
    ("encoder", "forward"): 1.05,
}
_TWIN = "encoder of one expert"
_PRODUCTS = (
    (functional, "linear"),
    (torch, "mm"),
    (torch, "bmm"),
)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Scale:
    """Sizes, and how long to measure.

    Attributes:
        tokens: of the layer on the CUDA path.
        side: D and F of layers of which the host's time alone counts.
        shape: of the encoder, a name of `SHAPES`.
        layers: of the encoder; None for the shape's own.
        rounds, seconds: of each figure, at most.
    """

    tokens: int = 64
    side: int = 16
    shape: str = "minilm"
    layers: int | None = None
    rounds: int = 200
    seconds: float = 20.0


FULL = Scale()
TOY = Scale(tokens=16, layers=1, rounds=3, seconds=1.0)


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Every call goes to the kernels, chosen as for an H100, and no kernel is started.

    Raises:
        DidNotRun: Triton is absent, or told to interpret, which takes another way.
    """
    if find_spec("triton") is None:
        raise DidNotRun("Triton is not installed")
    from triton.runtime import JITFunction

    from moebert_kernels.kernels import triton as kernels
    from moebert_kernels.kernels.triton import configs, direct, grouped

    if not isinstance(grouped.gather_kernel, JITFunction):
        raise DidNotRun("TRITON_INTERPRET is set")
    with ExitStack() as stack:

        def patch(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        patch(backends, "choose", lambda _: kernels)
        patch(configs, "family", lambda _: "sm_90")
        patch(configs, "multiprocessors", lambda _: 132)
        patch(JITFunction, "run", lambda *_, **__: None)
        patch(direct, "entry", lambda *_: direct.Entry(lambda *_: None, (None,) * 9, [{}] * 2))
        patch(direct, "tensor_map", lambda *_: object())
        patch(direct, "current_stream", lambda _: 0)
        patch(backends, "_forms", {})
        yield


def layer(tokens: int, side: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, list[Tensor]]:
    """A call of the layer with residual and norm, and what it can be differentiated by."""
    E = 4
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float32)
        return drawn.to(device, dtype).requires_grad_()

    x_TD, norm = randn(tokens, side), (randn(E, side), randn(E, side))
    w1_EFD, b1_EF, w2_EDF, b2_ED = experts = [randn(E, *shape) for shape in [(side, side), (side,)] * 2]
    ids_T = torch.randint(E, (tokens,), generator=generator).to(device)
    plan = RoutingPlan.from_expert_ids(ids_T, E)
    return lambda: moe_ffn(x_TD, plan, w1_EFD, b1_EF, w2_EDF, b2_ED, norm=norm), [x_TD, *experts, *norm]


def dense(side: int) -> Call:
    """One expert's network as PyTorch has it, on one token."""
    x_TD, w_FD, b_F = torch.randn(1, side), torch.randn(side, side), torch.randn(side)

    def call() -> Tensor:
        hidden_TF = functional.gelu(functional.linear(x_TD, w_FD, b_F))
        return functional.layer_norm(functional.linear(hidden_TF, w_FD, b_F) + x_TD, (side,), b_F, b_F)

    return call


def without_gradients(call: Call) -> Call:
    """The same under `no_grad`."""

    def inference() -> Any:
        with torch.no_grad():
            return call()

    return inference


def both_ways(call: Call, leaves: list[Tensor]) -> Call:
    """A forward pass and the gradients of everything."""
    dy = torch.ones_like(leaves[0])
    return lambda: torch.autograd.grad(call(), leaves, dy)


def outside_products(call: Call) -> Callable[[], float]:
    """A timer of a call's seconds less those within `functional.linear`, `torch.mm` and `torch.bmm`."""
    spent = 0.0

    def watched(product: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = product(*args, **options)
            spent += time.perf_counter() - start
            return result

        return timed

    def timer() -> float:
        nonlocal spent
        with ExitStack() as stack:
            for module, name in _PRODUCTS:
                stack.enter_context(mock.patch.object(module, name, watched(getattr(module, name))))
            spent, start = 0.0, time.perf_counter()
            call()
            return time.perf_counter() - start - spent

    call()
    return timer


def encoders(scale: Scale) -> dict[str, Call]:
    """MoEBERT and its twin.

    Raises:
        DidNotRun: transformers is absent.
    """
    if find_spec("transformers") is None:
        raise DidNotRun("transformers is not installed")
    from .encoders import build

    sizes: dict[str, Any] = SHAPES[scale.shape] | ({"L": scale.layers} if scale.layers else {})
    case = ModelCase(T=16, sequence=16, **sizes)
    ids_BS = token_ids(1, 16, case.V, 0)
    mask_BS = torch.ones_like(ids_BS)

    def forward(kind: str) -> Call:
        model = build(case, kind)
        return without_gradients(lambda: model(ids_BS, attention_mask=mask_BS))

    return {"encoder": forward("experts"), _TWIN: forward("bound")}


def rows(scale: Scale, device: torch.device) -> Iterator[Row]:
    """A row for every figure; timers of one group take turns."""

    def sampled(case: dict[str, Any], timers: dict[tuple[str, str], Callable[[], float]]) -> Iterator[Row]:
        samples, failed = interleave(timers, scale.rounds, scale.seconds)
        for key in timers:
            taken = spread(samples[key]) if key in samples else None
            yield _row(key, case, taken, failed.get(key))

    def on_host(call: Call) -> Callable[[], float]:
        return make_timer(torch.device("cpu"), "eager", [call])

    forward, backward = ("CUDA path", "forward"), ("CUDA path", "forward+backward")
    case: dict[str, Any] = {
        "T": scale.tokens,
        "D": scale.side,
        "F": scale.side,
        "stands in": device.type == "cpu",
    }
    try:
        with launching_nothing():
            call, leaves = layer(scale.tokens, scale.side, torch.bfloat16, device)
            passes = {forward: without_gradients(call), backward: both_ways(call, leaves)}
            yield from sampled(case, {key: on_host(call) for key, call in passes.items()})
    except Exception as error:
        for key in (forward, backward):
            yield _row(key, case, None, _reason(error))
    call, _ = layer(1, scale.side, torch.float32, torch.device("cpu"))
    calls = {"CPU": without_gradients(call), "CPU, dense": without_gradients(dense(scale.side))}
    timers = {(name, "forward"): on_host(call) for name, call in calls.items()}
    yield from sampled({"T": 1, "D": scale.side, "F": scale.side}, timers)
    case = {"T": 16, "shape": scale.shape}
    try:
        made = {(name, "forward"): outside_products(call) for name, call in encoders(scale).items()}
        yield from sampled(case, made)
    except Exception as error:
        for name in ("encoder", _TWIN):
            yield _row((name, "forward"), case, None, _reason(error))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DidNotRun) else first_line(error)


def _row(key: tuple[str, str], case: dict[str, Any], seconds: Any, reason: str | None) -> Row:
    return Row(
        case=case,
        entry=key[0],
        work="host",
        pass_=key[1],
        launch="eager",
        cache="warm",
        dispatch="apart",
        seconds=seconds,
        did_not_run=reason,
    )


def lines(measured: list[Row]) -> Iterator[str]:
    """The table, a line for each row, and the encoder's ratio."""
    yield f"{'':24} {'pass':18} {'median':>8} {'10 %':>8} {'aim':>8}"
    medians = {}
    for row in measured:
        key = row.entry, row.pass_
        aim = f"{AIMS[key]:6.0f} µs" if key in AIMS and row.entry != "encoder" else ""
        if row.seconds is None:
            yield f"{row.entry:24} {row.pass_:18} did not run: {row.did_not_run}"
            continue
        medians[row.entry] = row.seconds.median
        times = (f"{1e6 * s:6.1f} µs" for s in (row.seconds.median, row.seconds.low))
        yield f"{row.entry:24} {row.pass_:18} {' '.join(f'{t:>8}' for t in times)} {aim:>8}".rstrip()
    if {"encoder", _TWIN} <= medians.keys():
        ratio, aim = medians["encoder"] / medians[_TWIN], f"{AIMS['encoder', 'forward']:.2f}"
        yield f"{'encoder / its twin':24} {'forward':18} {ratio:8.3f} {'':8} {aim:>8}"


def measure(device: str, *, toy: bool = False, out: Path | None = None) -> None:
    """Print the table; with `out`, also write a result file of the "host" benchmark there."""
    scale = TOY if toy else FULL
    probes = TOY_PROBES if toy else None
    settings = Settings(Request(T=(scale.tokens,)), device=device, threads=1, probes=probes)
    run = describe_run("host", ("float32",), torch.device(device), settings)
    measured = list(rows(scale, torch.device(device)))
    print("\n".join(lines(measured)))
    if run.busy_cpus and run.busy_cpus > 0.5:
        print(f"Other work kept {run.busy_cpus:.1f} processors busy: the figures are too high.")
    if out is not None:
        print(write(out, run, measured))
