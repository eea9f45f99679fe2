"""Eager calls, which go past the dispatcher: what autograd then has to be told."""

import pytest
import torch

from tests.cases import Case
from tests.kernels.checks import assert_equal, call, inputs, leaves, outputs, plan_of


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_x_as_its_own_residual_gets_both_gradients(K, gate, dropout_p):
    """The residual's gradient is what x's is added to, in place: nothing may be lost or counted twice."""
    case = Case(60, D=24, F=40, K=K, gate=gate, norm=True, routing="dropped")
    t, plan = inputs(case, torch.float32, "cpu"), plan_of(case, "cpu")
    del t["residual"]
    t = leaves(t)
    results = []
    for residual in (None, t["x"]):
        torch.manual_seed(3)
        y = call(case, t | {"residual": residual}, plan, dropout_p=dropout_p)
        results.append(outputs(y, t))
    torch.testing.assert_close(*results)


def test_a_plan_written_to_before_backward_is_refused():
    """Backward reads the plan's memory: gradients by another routing would be silently wrong."""
    case = Case(9, D=8, F=8, E=2, norm=True)
    t, plan = leaves(inputs(case, torch.float32, "cpu")), plan_of(case, "cpu")
    y = call(case, t, plan)
    plan.order_S.copy_(plan.order_S.flip(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_plan_may_be_gone_before_backward():
    """The row kernels hold the address of its sorted slots."""
    case = Case(300, D=16, F=16, E=3, norm=True)
    t, plan = leaves(inputs(case, torch.float32, "cpu")), plan_of(case, "cpu")
    expected = outputs(call(case, t, plan), t)
    y = call(case, t, plan)
    del plan
    torch.full((3, 300), 10**6, dtype=torch.int32)  # takes the memory, if it was given back
    assert_equal(outputs(y, t), expected)
