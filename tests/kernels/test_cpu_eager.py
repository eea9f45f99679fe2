"""Eager calls, which go past the dispatcher: what autograd then has to be told."""

import pytest
import torch

from moebert_kernels import RoutingPlan, moe_ffn
from tests.ops.calls import make_inputs


def call(t, plan, **options):
    norm = (t["ln_w"], t["ln_b"])
    return moe_ffn(t["x"], plan, t["w1"], t["b1"], t["w2"], t["b2"], norm=norm, norm_eps=1e-5, **options)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_x_as_its_own_residual_gets_both_gradients(K, gate, dropout_p):
    """The residual's gradient is what x's is added to, in place: nothing may be lost or counted twice."""
    t, ids = make_inputs(60, 24, 40, 4, K, dtype=torch.float32)
    plan = RoutingPlan.from_expert_ids(ids, 4)
    options = {"gate_TK": t["gate"] if gate else None, "dropout_p": dropout_p}
    leaves = [t[name] for name in ("x", "w1", "b1", "w2", "b2", "ln_w", "ln_b")]
    dy = torch.randn(60, 24, generator=torch.Generator().manual_seed(1))
    results = []
    for residual in (None, t["x"]):
        torch.manual_seed(3)
        y = call(t, plan, residual_TD=residual, **options)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(together, apart)


def test_a_plan_written_to_before_backward_is_refused():
    """Backward reads the plan's memory: gradients by another routing would be silently wrong."""
    t, ids = make_inputs(9, 8, 8, 2, 1, dtype=torch.float32)
    plan = RoutingPlan.from_expert_ids(ids, 2)
    y = call(t, plan)
    plan.order_S.copy_(plan.order_S.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_plan_may_be_gone_before_backward():
    """The row kernels hold the address of its sorted slots."""
    t, ids = make_inputs(300, 16, 16, 3, 1, dtype=torch.float32)
    grads = []
    for keep in (True, False):
        plan = RoutingPlan.from_expert_ids(ids, 3)
        y = call(t, plan)
        if not keep:
            del plan
            torch.full((3, 300), 10**6, dtype=torch.int32)  # takes the memory, if it was given back
        grads.append(torch.autograd.grad(y.sum(), t["w1"])[0])
    assert torch.equal(*grads)
