"""Is the layer right on this device? Before anything is timed: forward and backward against float64.

    python -m bench.smoke --out smoke.jsonl [--toy]

bfloat16 at BERT-base's sizes. Each token count has a process of its own, side by side: a kernel that leaves
its memory ends no other's checks. Each case runs twice, which must agree bitwise; then a CUDA graph of one
routing is replayed with another in the same buffers. Unwritten memory reads as NaN. Each verdict is printed
and appended to the file as soon as it is known. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels import RoutingPlan, moe_ffn
from moebert_kernels.ops import backends

from .cases import DTYPES, FFNCase, expert_ids, tensors
from .reference import specification
from .timing import first_line
from .verify import LIMITS, relative_errors

TOKENS = (64, 517, 4096, 16384, 16)
# With a gate warp-specialised kernels do less.
CASES = (("balanced", False), ("skewed", True), ("dropped", True), ("first empty", False), ("dropped", False))
TOY_TOKENS = 13
_PER_EXPERT = ("dw1", "db1", "dw2", "db2")
_MOST_NAMED = 6
Found = tuple[list[str], dict[str, float]]  # what is wrong; rms errors by output


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one check.

    Attributes:
        check: which, in words.
        wrong: every fault found; empty if it is right.
        errors: rms error of each output, the worst expert's, relative to the reference.
    """

    check: str
    wrong: tuple[str, ...]
    errors: dict[str, float]

    def __str__(self) -> str:
        if not self.wrong:
            return f"right  {self.check}: " + ", ".join(f"{k} {v:.1e}" for k, v in self.errors.items())
        more = len(self.wrong) - _MOST_NAMED
        named = [*self.wrong[:_MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]
        return f"WRONG  {self.check}: " + "; ".join(named)


def cases(tokens: int, toy: bool) -> list[FFNCase]:
    """What is checked for one token count."""
    sizes: dict[str, Any] = {"D": 16, "F": 24, "E": 3, "dtype": "float32"} if toy else {}
    return [FFNCase(tokens, routing=routing, gate=gate, **sizes) for routing, gate in CASES]


def make_inputs(case: FFNCase, device: torch.device) -> dict[str, Tensor]:
    """The inputs of a case: the gate in float32, all else in the case's dtype."""
    dtype = DTYPES[case.dtype]
    return {k: v.to(torch.float32 if k == "gate" else dtype).to(device) for k, v in tensors(case).items()}


def step(t: dict[str, Tensor], plan: RoutingPlan) -> dict[str, Tensor]:
    """Inference, then forward and backward: every output by name."""
    leaves = {k: v.detach().requires_grad_() for k, v in t.items() if k != "dy"}
    weights = [leaves[k] for k in ("w1", "b1", "w2", "b2")]
    with torch.no_grad():
        inference = moe_ffn(leaves["x"], plan, *weights, gate_TK=leaves.get("gate"))
    y = moe_ffn(leaves["x"], plan, *weights, gate_TK=leaves.get("gate"))
    grads = torch.autograd.grad(y, list(leaves.values()), t["dy"])
    names = (f"d{name}" for name in leaves)
    return {"y": y.detach(), "inference": inference} | dict(zip(names, grads, strict=True))


def reference(t: dict[str, Tensor], ids_TK: Tensor) -> dict[str, Tensor]:
    """The same by `python_ref` in float64, on the device."""
    leaves = {k: v.double().requires_grad_() for k, v in t.items() if k != "dy"}
    weights = (leaves[k] for k in ("w1", "b1", "w2", "b2"))
    y = specification("ffn").moe_ffn(leaves["x"], ids_TK, *weights, gate_TK=leaves.get("gate"))
    grads = torch.autograd.grad(y, list(leaves.values()), t["dy"].double())
    names = (f"d{name}" for name in leaves)
    return {"y": y.detach(), "inference": y.detach()} | dict(zip(names, grads, strict=True))


def compare(outputs: dict[str, Tensor], exact: dict[str, Tensor], ids_TK: Tensor, case: FFNCase) -> Found:
    """What is wrong, output by output and expert by expert, and the worst rms error of each output."""
    wrong: list[str] = []
    errors: dict[str, float] = {}
    rms_limit, max_limit = LIMITS[DTYPES[case.dtype]]
    for name, expected in exact.items():
        per_expert = name in _PER_EXPERT
        for expert in range(0 if per_expert else -1, case.E):
            mine = torch.tensor([expert]) if per_expert else (ids_TK[:, 0] == expert).nonzero().flatten()
            rows = mine.to(expected.device)
            rms, largest = relative_errors(outputs[name][rows], expected[rows])
            errors[name] = max(errors.get(name, 0.0), rms)
            if rms <= rms_limit and largest <= max_limit:
                continue
            whose = "tokens without an expert" if expert < 0 else f"expert {expert}"
            where = "" if per_expert else _where(outputs[name], expected, rows, max_limit)
            wrong.append(
                f"{name} of {whose} is off by {rms:.1e} rms, {largest:.1e} at most "
                f"(limits {rms_limit:.0e}, {max_limit:.0e}){where}"
            )
    return wrong, errors


def _where(output: Tensor, expected: Tensor, rows: Tensor, limit: float) -> str:
    """Which of an expert's rows are off, so that a lost tile is told from a wrong sum."""
    delta = (output[rows].to(expected.dtype) - expected[rows]).abs().reshape(len(rows), -1).amax(1)
    scale = expected[rows].square().mean().sqrt()
    off = (~(delta <= limit * scale)).nonzero().flatten()
    if len(off) == 0:
        return ""
    return (
        f" in {len(off)} of {len(rows)} rows, counted within the expert from {int(off[0])} to {int(off[-1])}"
    )


def _different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    found = []
    for name, value in first.items():
        other = second[name]
        if not torch.equal(value, other):
            count = int((value != other).sum())
            found.append(f"{name} differs in {count} of {value.numel()} elements")
    return found


def check_case(case: FFNCase, t: dict[str, Tensor], kept: dict[str, Any]) -> Found:
    """Right twice over; leaves outputs and plan in `kept` for the graph."""
    ids_TK = expert_ids(case).to(t["x"].device)
    plan = RoutingPlan.from_expert_ids(ids_TK, case.E)
    outputs = step(t, plan)
    kept[_name(case.routing, case.gate)] = (t, plan, outputs)
    wrong, errors = compare(outputs, reference(t, ids_TK), ids_TK, case)
    wrong += [f"a second run: {text}" for text in _different(outputs, step(t, plan))]
    return wrong, errors


def _name(routing: str, gate: bool) -> str:
    return routing + (", gate" if gate else "")


def check_graph(kept: dict[str, Any], captured: str, replayed: str) -> Found:
    """A graph captured with one routing gives what plain launches gave, with another in the same buffers."""
    if missing := [name for name in (captured, replayed) if name not in kept]:
        return [f"not checked: there is nothing of {missing[0]} to compare with"], {}
    t, plan, _ = kept[captured]
    _, other, expected = kept[replayed]
    plan = RoutingPlan(**{f.name: _copy(getattr(plan, f.name)) for f in dataclasses.fields(plan)})
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(t, plan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(t, plan)
    for f in dataclasses.fields(plan):
        if isinstance(value := getattr(plan, f.name), Tensor):
            value.copy_(getattr(other, f.name))
    graph.replay()
    torch.cuda.synchronize()
    return _different(expected, outputs), {}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Judge:
    """Runs checks and reports their verdicts; on a device that is lost no more are run."""

    def __init__(self, report: Callable[[Verdict], None]) -> None:
        self._report = report
        self._lost_in: str | None = None
        self.all_right = True

    def __call__(self, check: str, run: Callable[..., Found], *arguments: Any) -> None:
        """Run one check; what it raises is what is wrong."""
        wrong: Sequence[str] = [f"not checked: the device was lost in {self._lost_in}"]
        errors: dict[str, float] = {}
        if self._lost_in is None:
            try:
                wrong, errors = run(*arguments)
            except Exception as error:
                traceback.print_exc()
                wrong = [first_line(error)]
                if isinstance(error, torch.AcceleratorError):
                    self._lost_in = check
        self.all_right = self.all_right and not wrong
        self._report(Verdict(check, tuple(wrong), errors))


def run(tokens: int, toy: bool, report: Callable[[Verdict], None]) -> bool:
    """All checks of one token count; whether everything was right."""
    device = torch.device("cpu" if toy else "cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # NaN in what no kernel has written
    kept: dict[str, Any] = {}
    judge = Judge(report)
    for case in cases(tokens, toy):
        t = make_inputs(case, device)
        if not toy and case.routing == CASES[0][0]:
            judge(f"T={tokens} runs in our kernels", _our_kernels, t["x"])
        judge(f"T={tokens}, {_name(case.routing, case.gate)}", check_case, case, t, kept)
    if not toy:
        for before, after in (("balanced", "first empty"), ("skewed, gate", "dropped, gate")):
            judge(f"T={tokens}, graph of {before} replayed as {after}", check_graph, kept, before, after)
    return judge.all_right


def _our_kernels(x_TD: Tensor) -> Found:
    """A fallback in our kernels' place would pass every other check."""
    from moebert_kernels.kernels import triton as kernels

    found = backends.on_cuda(x_TD)
    return ([] if found is kernels else [f"{found.__name__} is chosen"]), {}


def appending(path: Path) -> Callable[[Verdict], None]:
    """Print a verdict and append it to a file, at once."""

    def report(verdict: Verdict) -> None:
        print(verdict, flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(verdict)) + "\n")

    return report


def main() -> None:
    """Check one token count, or all of them, each in a process."""
    parser = argparse.ArgumentParser(description="Check the layer on this device against float64.")
    parser.add_argument("--out", type=Path, required=True, help="file for the verdicts, JSON lines")
    parser.add_argument("--tokens", type=int, help="one token count, in this process")
    parser.add_argument("--toy", action="store_true", help="tiny, float32, on the CPU")
    options = parser.parse_args()
    tokens = TOY_TOKENS if options.toy and options.tokens is None else options.tokens
    if tokens is not None:
        sys.exit(0 if run(tokens, options.toy, appending(options.out)) else 1)
    command = [sys.executable, "-m", "bench.smoke", "--out", str(options.out), "--tokens"]
    running = {count: subprocess.Popen([*command, str(count)]) for count in TOKENS}
    failed = [f"T={count}" for count, process in running.items() if process.wait()]
    if failed:
        sys.exit(f"the layer is wrong at {', '.join(failed)}")


if __name__ == "__main__":
    main()
