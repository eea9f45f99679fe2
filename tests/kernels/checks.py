"""How a kernel's result is judged: against float64, per output and per expert, beside plain torch.

The error of a group (one output of one expert) is at most 1.5 times plain torch's, in the mean and at worst.
Plain torch's error on one input is one draw of its roundings: over a group of two or of sixteen elements it
may be several times smaller than usual. So it is drawn at several inputs near the one under test, where the
problem is conditioned the same and every rounding falls anew, and the largest counts. Were the kernel's
errors drawn from the same distribution, they would exceed the largest of N by chance once in N + 1 groups,
and hardly ever 1.5 times that: at N = 32 no further allowance is needed, in any dtype.
`test_checks.py` shows which defects the bound catches.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moebert_kernels import RoutingPlan, moe_ffn
from moebert_kernels.kernels import torch as plain
from moebert_kernels.kernels.call import Call
from moebert_kernels.ops import backends
from python_ref import ffn as ref
from tests.cases import Case, expert_ids, tensors

SHARED = ("shared_w1", "shared_b1", "shared_w2")
NEIGHBOURS = 32
FEW_NEIGHBOURS = 4  # where groups have many thousand elements, each a draw of its own
# Relative to every element: far above the coarsest rounding, bfloat16's 2^-9.
_NEAR = 2.0**-3

Errors = dict[tuple[str, int], tuple[float, float]]  # by output and expert: rms and largest


def send_to(backend: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Let one backend run every call, on every device."""
    patch.setattr(backends, "choose", lambda _: backend)
    patch.setattr(backends, "_forms", {})


def use_config(config: Any, patch: pytest.MonkeyPatch) -> None:
    """Let every call of the kernels have this config, and none be repeated as it was with another."""
    from moebert_kernels.kernels.triton import configs

    patch.setattr(configs, "select", lambda *_: config)
    patch.setattr(backends, "_forms", {})


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """What is launched inside, backward too, and not run: a record is of one thread, and on CUDA autograd's
    is another unless it is told to stay."""
    from moebert_kernels.kernels.triton import launch

    with torch.autograd.set_multithreading_enabled(False), launch.recorded() as launches:
        yield launches


def experts_of(t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Of the tensors of a case, weights and biases of its experts; None for biases that are not there."""
    return t["w1"], t.get("b1"), t["w2"], t.get("b2")


def shared_of(t: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """Of the tensors of a case, the neurons of all experts; None where there are none."""
    return (t["shared_w1"], t.get("shared_b1"), t["shared_w2"]) if "shared_w1" in t else None


def call(case: Case, t: dict[str, Tensor], plan: RoutingPlan, **options) -> Tensor:
    """`moe_ffn` on the tensors of a case."""
    if case.norm:
        options |= {"norm": (t["ln_w"], t["ln_b"]), "residual_TD": t["residual"]}
    parts = {"gate_TK": t.get("gate"), "activation": case.activation, "shared": shared_of(t)}
    return moe_ffn(t["x"], plan, *experts_of(t), **(parts | options))


def arguments(t, plan, *, norm, gate, dropout_p=0.0, residual=True):
    """The operator's, as a `Call`."""
    of_plan = plan.expert_ids_TK, plan.order_S, plan.inverse_S, plan.offsets_E1
    norms = (t["ln_w"], t["ln_b"], t["residual"] if residual else None) if norm else (None, None, None)
    seed = torch.tensor([3], device=t["x"].device) if dropout_p else None
    parts = t["gate"] if gate else None, *norms, seed, *(t.get(name) for name in SHARED)
    return Call(t["x"], *of_plan, *experts_of(t), *parts, "gelu", 1e-12, dropout_p)


FORMS = [
    {"norm": False, "gate": False},
    {"norm": False, "gate": True},
    {"norm": True, "gate": False},
    {"norm": True, "gate": True, "dropout_p": 0.1, "residual": False},
]


def inputs(case: Case, dtype: torch.dtype, device: str, *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a case as the kernels get them: in `dtype`, but the gate in float32 at least."""
    dtypes = {"gate": torch.promote_types(dtype, torch.float32)}
    return {k: v.to(device, dtypes.get(k, dtype)) for k, v in tensors(case, seed=seed).items()}


def plan_of(case: Case, device: str | torch.device, *, seed: int = 0) -> RoutingPlan:
    """The routing of a case."""
    return RoutingPlan.from_expert_ids(expert_ids(case, seed=seed).to(device), case.E)


def leaves(t: dict[str, Tensor], wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """The same with every input, or those that are named, a leaf that requires grad."""
    wanted = t.keys() - {"dy"} if wanted is None else wanted
    return {k: v.detach().clone().requires_grad_(k in wanted) for k, v in t.items()}


def outputs(y: Tensor, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradient of every input that requires grad."""
    names = [k for k, v in t.items() if v.requires_grad]
    grads = torch.autograd.grad(y, [t[k] for k in names], t["dy"].to(y.dtype), materialize_grads=True)
    return {"y": y.detach()} | {"d" + k: g for k, g in zip(names, grads, strict=True)}


def run(case: Case, t: dict[str, Tensor], ids_TK: Tensor | None = None, **options) -> dict[str, Tensor]:
    """Forward and backward through `moe_ffn`, by the routing of the case or another."""
    t, ids_TK = leaves(t), expert_ids(case) if ids_TK is None else ids_TK
    plan = RoutingPlan.from_expert_ids(ids_TK.to(t["x"].device), case.E)
    return outputs(call(case, t, plan, **options), t)


def reference(case: Case, t: dict[str, Tensor], ids_TK: Tensor | None = None) -> dict[str, Tensor]:
    """The same in float64, from the very values the kernels got."""
    t = leaves({k: v.double().cpu() for k, v in t.items()})
    ids_TK = expert_ids(case) if ids_TK is None else ids_TK
    options = {"gate_TK": t.get("gate"), "activation": case.activation, "shared": shared_of(t)}
    if case.norm:
        options |= {"ln_w_ED": t["ln_w"], "ln_b_ED": t["ln_b"], "residual_TD": t["residual"]}
    return outputs(ref.moe_ffn(t["x"], ids_TK, *experts_of(t), **options), t)


def assert_equal(found: Any, expected: Any) -> None:
    """Tensors, or the same sequences or mappings of tensors, are equal in every element."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def errors(result: dict[str, Tensor], exact: dict[str, Tensor], ids_TK: Tensor, E: int) -> Errors:
    """Errors of every group, relative to the rms of its exact values; groups without elements are left out.

    Rows of outputs belong to their token's first expert, -1 if that is none; parameters to their own, and
    those of shared neurons are one group.
    """
    found = {}
    for name, expected in exact.items():
        got = result[name].cpu().double()
        assert got.shape == expected.shape, f"{name}: {got.shape}, expected {expected.shape}"
        per_expert = name[1:] in ("w1", "b1", "w2", "b2", "ln_w", "ln_b")
        groups = [0] if name[1:] in SHARED else range(0 if per_expert else -1, E)
        for e in groups:
            rows = e if per_expert else slice(None) if name[1:] in SHARED else ids_TK[:, 0] == e
            want = expected[rows]
            if want.numel() == 0:
                continue
            # Exact zeros have no scale, and no roundings either.
            scale = want.square().mean().sqrt() if want.any() else torch.tensor(torch.finfo().tiny)
            off = (got[rows] - want) / scale
            found[name, e] = (off.square().mean().sqrt().item(), off.abs().max().item())
    return found


def plain_errors(case: Case, t: dict[str, Tensor], neighbours: int = NEIGHBOURS) -> Errors:
    """The largest errors of plain torch, in the dtype and on the device of `t`, at `t` and near it."""
    g = torch.Generator().manual_seed(0)
    worst: Errors = {}
    for i in range(neighbours):
        near = {k: _nudge(v, g) for k, v in t.items()} if i else t
        with pytest.MonkeyPatch.context() as plain_path:
            send_to(plain, plain_path)
            result = run(case, near)
        for group, (rms, largest) in errors(result, reference(case, near), expert_ids(case), case.E).items():
            before = worst.get(group, (0.0, 0.0))
            worst[group] = (max(before[0], rms), max(before[1], largest))
    return worst


def _nudge(v: Tensor, g: torch.Generator) -> Tensor:
    factor = 1 + _NEAR * torch.randn(v.shape, generator=g, dtype=torch.float64)
    return (v.double() * factor.to(v.device)).to(v.dtype)


def assert_as_good_as(plain: Errors, ours: Errors, slack: tuple[float, float] = (0.0, 0.0)) -> None:
    """`ours` at most 1.5 times `plain` in every group, plus the slack, as (rms, largest)."""
    for group, found in ours.items():
        for kind, error, beside, more in zip(("rms", "largest"), found, plain[group], slack, strict=True):
            limit = 1.5 * beside + more
            where = f"{group[0]}, expert {group[1]}"
            assert error <= limit, f"{where}: {kind} error {error:.3g} of rms, limit {limit:.3g}"


def check(
    case: Case,
    dtype: torch.dtype,
    device: str,
    *,
    neighbours: int = NEIGHBOURS,
    slack: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Forward and backward of a case against float64, beside plain torch in the same dtype on this device."""
    t = inputs(case, dtype, device)
    ours = errors(run(case, t), reference(case, t), expert_ids(case), case.E)
    switch = torch.backends.cuda.matmul.fp32_precision
    assert_as_good_as(_plain_errors(case, dtype, device, neighbours, switch), ours, slack)


@functools.cache
def _plain_errors(case: Case, dtype: torch.dtype, device: str, neighbours: int, switch: str) -> Errors:
    """`plain_errors` of a case, asked for with every config; `switch` is that of torch for float32."""
    return plain_errors(case, inputs(case, dtype, device), neighbours)


def slack_of_long_sums(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """What two float32 GEMMs that add up in one chain may be off, where torch's may add up in several.

    Nothing in 16 bits, whose own roundings are coarser by far.

    The GEMMs of weight gradients add up so; the others have two chains, and are off by less.

    The k-th partial sum of terms of random sign and size s is about s sqrt(k), and rounding it adds at most
    u s sqrt(k / 3), u = 2^-24, in the mean. Over n terms that makes u s n / sqrt(6), or relative to the sum,
    s sqrt(n), u sqrt(n / 6). A chain of D terms, then one of F: u sqrt((D + F) / 6). The largest of some 10^5
    to 10^6 elements lies 5 sigma out, and where rows of x have twice the size of others, 1.5 times as far:
    8 times the mean.
    """
    rms = 2.0**-24 * ((case.D + case.F) / 6) ** 0.5 if dtype == torch.float32 else 0.0
    return rms, 8 * rms
