"""Candidate tiles of every GEMM of the layer, each kernel timed alone: what the tuning table is chosen from.

    python -m bench.tune --out tiles.jsonl [--tokens 16384,4096,65536,512,64] [--roles up,down] [--limit 120]

All candidates are compiled by a pool of processes first. A candidate is then one GEMM of a pass with another
tile; the pass runs once, so that the GEMM finds real data, and its result is held against that of the table's
own tile. Its time is that of its launches in a CUDA graph over copies of the inputs that no cache holds. Each
figure is appended to the file at once; the fastest of each role and T are printed. With --toy everything runs
without a GPU, in Triton's interpreter, and says nothing. What is put into the table is read with
`python -m bench.binaries`: an entry that spills is a bug, however fast.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.environment import describe_environment
from moebert_kernels.kernels.call import Call
from moebert_kernels.timing import spread

from .ahead import as_on, compile_launch
from .cases import FFNCase
from .ffn import footprint, make_inputs
from .run import copies_past_cache
from .timing import first_line, make_timer
from .verify import check_close

TOKENS = (16384, 4096, 65536, 512, 64)
_SAMPLES = 5

# m, n, warps and stages of the GEMMs whose rows are tokens, with so many parts of the epilogue; k is 64.
_GEMMS = (
    (128, 128, 8, 3, (1, 2, 4)),
    (128, 256, 8, 4, (4,)),
    (64, 128, 4, 3, (2, 4)),
    (128, 64, 4, 3, (1, 2)),
    (64, 64, 4, 4, (1, 2)),
    (64, 32, 4, 4, (1,)),
    (32, 64, 4, 4, (1,)),
    (32, 32, 4, 6, (1,)),
    (16, 64, 4, 4, (1,)),
)
# m, n, warps, stages and programs per multiprocessor of the weight gradients; 0 for one program a tile. Some
# of the stages hold indices only.
_WEIGHTS = (
    (128, 256, 8, 5, 1),
    (128, 256, 8, 7, 1),
    (128, 128, 8, 5, 2),
    (128, 128, 8, 4, 2),
    (128, 128, 8, 7, 1),
    (128, 128, 8, 5, 0),
    (128, 64, 4, 7, 0),
    (64, 128, 4, 7, 0),
    (64, 64, 4, 7, 0),
    (64, 64, 4, 4, 0),
)


@dataclass(frozen=True)
class Role:
    """One GEMM of the layer.

    Attributes:
        field: of a `Config`.
        pass_: the pass it is launched in.
        kernels: which of the pass's launches it is, by a prefix of their kernels' names.
        outputs: the results of the pass that it decides.
    """

    field: str
    pass_: str
    kernels: tuple[str, ...]
    outputs: tuple[str, ...]


ROLES = {
    "up": Role("up", "inference", ("gather_kernel", "gather_pingpong"), ("y",)),
    "up_training": Role("up", "forward", ("gather_kernel",), ("y",)),
    "down": Role("down", "inference", ("scatter",), ("y",)),
    "down_backward": Role("down_backward", "backward", ("gather_backward",), ("dx", "dw1", "db1", "db2")),
    "up_backward": Role("up_backward", "backward", ("scatter",), ("dx",)),
    "weight_grad": Role("weight_grad", "backward", ("weight_grad", "join"), ("dw1", "dw2")),
}


@dataclass(frozen=True)
class Candidate:
    """A role's tile; for weight gradients streamed over the multiprocessors or not.

    Of the warp-specialised kernels, `specialised`, it is theirs alone.
    """

    role: str
    tile: Any
    stream_k: bool = False
    tma: bool = True
    specialised: bool = False

    def config(self, config: Any) -> Any:
        """The config with this in it."""
        field = ROLES[self.role].field
        changed = {"tma": self.tma, "specialised": (field,) if self.specialised else ()}
        if not self.specialised:
            changed[field] = self.tile
        if field == "weight_grad":
            changed["stream_k"] = self.stream_k
        return replace(config, **changed)


def candidates(role: str, k: int = 64) -> Iterator[Candidate]:
    """What is tried for a role."""
    from moebert_kernels.kernels.triton import hopper
    from moebert_kernels.kernels.triton.configs import Tile

    if ROLES[role].field == "weight_grad":
        for m, n, warps, stages, programs in _WEIGHTS:
            tile = Tile(m, n, k, warps, stages, per_multiprocessor=max(programs, 1))
            yield Candidate(role, tile, stream_k=programs > 0)
        return
    for m, n, warps, stages, choices in _GEMMS:
        for parts in choices:
            yield Candidate(role, Tile(m, n, k, warps, stages, parts))
    yield Candidate(role, Tile(128, 128, k, 8, 3, 2), tma=False)
    if role != "up_training" and hopper.takes(E=1, N=hopper.TILE.n, K=hopper.TILE.k):
        yield Candidate(role, hopper.TILE, specialised=True)


@dataclass(frozen=True)
class Pass:
    """A recorded pass: what it launches and the tensors it leaves."""

    launches: tuple[Any, ...]
    outputs: dict[str, Tensor]

    def of(self, role: Role) -> tuple[Any, ...]:
        """A role's launches."""
        return tuple(one for one in self.launches if one.kernel.__name__.startswith(role.kernels))


def record(call: Call, dy_TD: Tensor, hidden: Tensor | None, pass_: str, config: Any) -> Pass:
    """Record one pass of a call without norm."""
    from moebert_kernels.kernels import triton as kernels
    from moebert_kernels.kernels.triton.launch import recorded

    with recorded() as launches:
        if pass_ == "backward":
            assert hidden is not None
            grads = kernels.expert_ffn_backward(call, hidden, dy_TD, [True] * 5 + [False], config=config)
            outputs = dict(zip(("dx", "dw1", "db1", "dw2", "db2"), grads, strict=False))
        else:
            y_TD, hidden = kernels.expert_ffn_forward(call, pass_ == "forward", config)
            outputs = {"y": y_TD, "hidden": hidden}
    return Pass(tuple(launches), outputs)


def run(launches: tuple[Any, ...]) -> None:
    """Launch what was recorded, in order."""
    for launch in launches:
        launch.kernel[launch.grid](**launch.arguments)


def _meta_launches(case: FFNCase, candidate: Candidate, base: Any) -> tuple[Any, ...]:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    T, D, F, E = case.T, case.D, case.F, case.E
    plan = (empty(*shape, dtype=torch.int32) for shape in ((T, 1), (T,), (T,), (E + 1,)))
    ids, order, inverse, offsets = plan
    call = Call(
        empty(T, D), ids, order, inverse, offsets, empty(E, F, D), empty(E, F), empty(E, D, F), empty(E, D)
    )
    role = ROLES[candidate.role]
    return record(call, empty(T, D), empty(2 * T, F), role.pass_, candidate.config(base)).of(role)


def _compile(family: str, multiprocessors: int, case: FFNCase, candidate: Candidate, base: Any) -> str:
    """What is wrong with a candidate, or nothing."""
    try:
        with as_on(family, multiprocessors):
            for launch in _meta_launches(case, candidate, base):
                compile_launch(launch)
    except Exception as error:
        return first_line(error)
    return ""


def compile_all(case: FFNCase, wanted: list[Candidate], base: Any, jobs: int) -> dict[Candidate, str]:
    """Compile every candidate for the current device, and tell which failed and why."""
    from moebert_kernels.kernels.triton import configs

    here = torch.device("cuda", torch.cuda.current_device())
    device = (configs.family(here), configs.multiprocessors(here))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        tasks = {c: pool.submit(_compile, *device, case, c, base) for c in wanted}
        return {c: reason for c, task in tasks.items() if (reason := task.result())}


class Bench:
    """The copies of one T's inputs, and the times of candidates on them."""

    def __init__(self, case: FFNCase, device: torch.device, commit: str | None = None) -> None:
        from moebert_kernels import RoutingPlan
        from moebert_kernels.kernels.triton import configs

        copies = [make_inputs(case, device, 0)]
        copies += [
            make_inputs(case, device, seed)
            for seed in range(
                1, copies_past_cache(footprint(copies[0]), device) if device.type == "cuda" else 1
            )
        ]
        self.case, self.device, self.commit = case, device, commit
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.base = configs.select(device, copies[0].x_TD.dtype, case.T, case.E)
        self.calls: list[Call] = []
        self.dy: list[Tensor] = []
        self.hidden: list[Tensor] = []
        for inputs in copies:
            plan = RoutingPlan.from_expert_ids(inputs.expert_ids_TK, case.E)
            weights = (inputs.w1_EFD, inputs.b1_EF, inputs.w2_EDF, inputs.b2_ED)
            sort = (plan.expert_ids_TK, plan.order_S, plan.inverse_S, plan.offsets_E1)
            self.calls.append(Call(inputs.x_TD, *sort, *weights))
            self.dy.append(inputs.dy_TD)
            forward = self._pass(len(self.hidden), "forward", self.base, None)
            run(forward.launches)
            self.hidden.append(forward.outputs["hidden"])
        self.expected = {
            pass_: self._ran(0, pass_, self.base).outputs for pass_ in ("inference", "forward", "backward")
        }

    def _pass(self, copy: int, pass_: str, config: Any, hidden: Tensor | None) -> Pass:
        return record(self.calls[copy], self.dy[copy], hidden, pass_, config)

    def _ran(self, copy: int, pass_: str, config: Any) -> Pass:
        found = self._pass(copy, pass_, config, self.hidden[copy])
        run(found.launches)
        return found

    def seconds(self, candidate: Candidate) -> float:
        """Median time of a candidate's launches.

        Raises:
            ValueError: its results are not those of the table's tile.
        """
        role = ROLES[candidate.role]
        passes = [self._ran(copy, role.pass_, candidate.config(self.base)) for copy in range(len(self.dy))]
        got = {name: passes[0].outputs[name] for name in role.outputs}
        expected = {name: self.expected[role.pass_][name].double() for name in role.outputs}
        check_close(got, expected, self.calls[0].x_TD.dtype, slack=2.0)

        def thunk(launches: tuple[Any, ...]) -> Any:
            def call() -> dict[str, Tensor]:
                run(launches)
                return {}

            return call

        launch = "graph" if self.device.type == "cuda" else "eager"
        timer = make_timer(self.device, launch, [thunk(found.of(role)) for found in passes])
        samples = _SAMPLES if self.device.type == "cuda" else 1
        return spread([timer() for _ in range(samples)]).median


def _told(T: int, role: str, found: list[tuple[float, Candidate]], case: FFNCase) -> Iterator[str]:
    """The fastest candidates of a role, one to a line."""
    flops = 2.0 * T * case.D * case.F * len(ROLES[role].outputs if role == "weight_grad" else (role,))
    yield f"T={T} {role}"
    for seconds, candidate in sorted(found, key=lambda one: one[0])[:4]:
        t = candidate.tile
        notes = (" stream" if candidate.stream_k else "") + ("" if candidate.tma else " pointers")
        notes += " pingpong" if candidate.specialised else ""
        yield (
            f"  {seconds * 1e6:8.2f} us {flops / seconds / 1e12:5.0f} TFLOP/s  {t.m}x{t.n}x{t.k} w{t.warps} "
            f"s{t.stages} p{t.parts} x{t.per_multiprocessor}{notes}"
        )


def measure(
    bench: Bench, wanted: list[Candidate], deadline: float, out: Path | None
) -> dict[str, list[tuple[float, Candidate]]]:
    """Seconds of the candidates by role; what does not run or is wrong goes into the file with its reason."""
    found: dict[str, list[tuple[float, Candidate]]] = {}
    for candidate in wanted:
        if time.monotonic() > deadline:
            print("no time left")
            break
        row: dict[str, Any] = {"device": bench.name, "commit": bench.commit, "T": bench.case.T}
        row |= asdict(candidate)
        try:
            row["seconds"] = bench.seconds(candidate)
            found.setdefault(candidate.role, []).append((row["seconds"], candidate))
        except torch.AcceleratorError:
            raise  # the device is lost: every further figure would be wrong
        except Exception as error:
            row["failed"] = first_line(error)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return found


def main() -> None:
    """Time the candidates of each role and T."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description="Time candidate tiles of each GEMM, each alone."
    )
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON lines")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="T, with commas")
    parser.add_argument("--roles", default=",".join(ROLES), help=f"some of {', '.join(ROLES)}")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which nothing is started")
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--commit", help="of the checkout, where there is no git")
    parser.add_argument("--toy", action="store_true", help="tiny, in Triton's interpreter")
    options = parser.parse_args()
    if unknown := [role for role in options.roles.split(",") if role not in ROLES]:
        parser.error(f"--roles must be some of {', '.join(ROLES)}, got {', '.join(unknown)}")
    from moebert_kernels.kernels.triton import configs
    from moebert_kernels.kernels.triton.configs import Tile

    deadline = time.monotonic() + options.limit
    commit = options.commit or describe_environment().commit
    wanted = [c for role in options.roles.split(",") for c in candidates(role)]
    device, cases = torch.device("cuda"), [FFNCase(int(word)) for word in options.tokens.split(",")]
    if options.toy:
        device, cases = torch.device("cpu"), [FFNCase(24, D=16, F=16, E=2, dtype="float32")]
        wanted = [replace(c, tile=Tile(16, 16, 16, 4, 2)) for c in wanted[:: max(1, len(wanted) // 8)]]
    else:
        begin = time.monotonic()
        base = configs.select(device, torch.bfloat16, 65536, 4)
        failed = compile_all(FFNCase(4096), wanted, base, options.jobs)
        print(f"{len(wanted)} candidates compiled in {time.monotonic() - begin:.1f} s, {len(failed)} failed")
        for candidate, reason in failed.items():
            print(f"  {candidate}: {reason}")
        wanted = [candidate for candidate in wanted if candidate not in failed]
    for case in cases:
        if time.monotonic() > deadline:
            break
        found = measure(Bench(case, device, commit), wanted, deadline, options.out)
        for role, times in found.items():
            print(*_told(case.T, role, times, case), sep="\n", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
