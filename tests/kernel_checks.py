"""How a kernel's result is judged: against float64, per output and per expert, beside plain torch."""

from __future__ import annotations

import pytest
import torch
from cases import Case, expert_ids, tensors
from torch import Tensor

from moebert_kernels import RoutingPlan, cpu, moe_ffn, ops
from python_ref import ffn as ref

# Added to 1.5 times plain torch's own error, as (rms, max). Groups are small here, a dozen to some hundred
# elements, so that plain torch's error is a sample of a few roundings and may happen to be near zero.
SLACK = {
    torch.float32: (2.0**-23, 16 * 2.0**-23),
    torch.float16: (2.0**-12, 2 * 2.0**-10),
    torch.bfloat16: (2.0**-9, 2 * 2.0**-7),
}


def call(case: Case, t: dict[str, Tensor], plan: RoutingPlan, **options) -> Tensor:
    """`moe_ffn` on the tensors of a case."""
    if case.norm:
        options |= {"norm": (t["ln_w"], t["ln_b"]), "residual_TD": t["residual"]}
    return moe_ffn(
        t["x"],
        plan,
        t["w1"],
        t.get("b1"),
        t["w2"],
        t.get("b2"),
        gate_TK=t.get("gate"),
        activation=case.activation,
        **options,
    )


def inputs(case: Case, dtype: torch.dtype, device: str, *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a case as the kernels get them: the gate in float32, all else in `dtype`."""
    made = tensors(case, seed=seed)
    return {k: v.to(device, torch.float32 if k == "gate" else dtype) for k, v in made.items()}


def plan_of(case: Case, device: str | torch.device, *, seed: int = 0) -> RoutingPlan:
    """The routing of a case."""
    return RoutingPlan.from_expert_ids(expert_ids(case, seed=seed).to(device), case.E)


def leaves(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with every input a leaf that requires grad."""
    return {k: v.detach().clone().requires_grad_(k != "dy") for k, v in t.items()}


def outputs(y: Tensor, t: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradient of every input."""
    names = [k for k in t if k != "dy"]
    grads = torch.autograd.grad(y, [t[k] for k in names], t["dy"].to(y.dtype), materialize_grads=True)
    return {"y": y.detach()} | {"d" + k: g for k, g in zip(names, grads, strict=True)}


def run(case: Case, t: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Forward and backward through `moe_ffn`."""
    t = leaves(t)
    return outputs(call(case, t, plan_of(case, t["x"].device), **options), t)


def reference(case: Case, t: dict[str, Tensor], ids_TK: Tensor | None = None) -> dict[str, Tensor]:
    """The same in float64, from the very values the kernels got."""
    t = leaves({k: v.double().cpu() for k, v in t.items()})
    norms = {f"{k}_ED": t[k] for k in ("ln_w", "ln_b")} | {"residual_TD": t["residual"]} if case.norm else {}
    y = ref.moe_ffn(
        t["x"],
        expert_ids(case) if ids_TK is None else ids_TK,
        t["w1"],
        t.get("b1"),
        t["w2"],
        t.get("b2"),
        gate_TK=t.get("gate"),
        activation=case.activation,
        **norms,
    )
    return outputs(y, t)


def check(case: Case, dtype: torch.dtype, device: str, slack: tuple[float, float] | None = None) -> None:
    """Forward and backward of a case against float64, beside plain torch in the same dtype on this device."""
    t = inputs(case, dtype, device)
    ours = run(case, t)
    with pytest.MonkeyPatch.context() as plain_path:
        plain_path.setattr(ops, "cpu", cpu)
        plain_path.setattr(ops, "_cuda_backend", lambda _: cpu)
        plain = run(case, t)
    assert_as_good_as(plain, ours, reference(case, t), expert_ids(case), case.E, slack or SLACK[dtype])


def assert_as_good_as(
    plain: dict[str, Tensor],
    ours: dict[str, Tensor],
    exact: dict[str, Tensor],
    ids_TK: Tensor,
    E: int,
    slacks: tuple[float, float],
) -> None:
    """Errors relative to rms(exact), in the mean and at worst, at most 1.5 times those of plain torch.

    Compared per expert: rows of outputs by the token's first expert, parameters by their own.
    """
    per_expert = {name for name in exact if name[1:] in ("w1", "b1", "w2", "b2", "ln_w", "ln_b")}
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape, f"{name}: {ours[name].shape}, expected {expected.shape}"
        for e in range(-1, E):
            rows = e if name in per_expert else ids_TK[:, 0] == e
            if name in per_expert and e < 0:
                continue
            want = expected[rows]
            if want.numel() == 0:
                continue
            got, beside = (r[name].cpu().double()[rows] for r in (ours, plain))
            where = f"{name}, expert {e}"
            if not want.any():
                assert not got.any(), f"{where}: expected zeros, found up to {got.abs().max():.3g}"
                continue
            scale = want.square().mean().sqrt()
            for kind, measure, slack in zip(("rms", "max"), (_rms, _max), slacks, strict=True):
                error, limit = measure(got - want) / scale, 1.5 * measure(beside - want) / scale + slack
                assert error <= limit, f"{where}: {kind} error {error:.3g} of rms, limit {limit:.3g}"


def _rms(d: Tensor) -> Tensor:
    return d.square().mean().sqrt()


def _max(d: Tensor) -> Tensor:
    return d.abs().max()
