"""Casts of parameters under autocast are kept while the parameter stays as it is, and never longer."""

import gc

import pytest
import torch
from torch import nn

from moebert_kernels import MoEFFN, RoutingPlan, autocast
from moebert_kernels.autocast import cast_parameter


@pytest.fixture
def parameter():
    return nn.Parameter(torch.randn(4, 6))


def test_a_cast_is_reused_until_the_parameter_is_written_to(parameter):
    first = cast_parameter(parameter, torch.bfloat16)
    assert first.data_ptr() == cast_parameter(parameter, torch.bfloat16).data_ptr()
    with torch.no_grad():
        parameter.add_(1)
    assert torch.equal(cast_parameter(parameter, torch.bfloat16), parameter.to(torch.bfloat16))
    assert torch.equal(cast_parameter(parameter, torch.float16), parameter.to(torch.float16))


def test_an_optimisers_step_ends_every_cast(parameter):
    """Some optimisers write through `.data`, which the version counter does not see."""

    class ThroughData(torch.optim.SGD):
        def step(self):
            parameter.data += 1

    optimiser = ThroughData([parameter], lr=0.1)
    cast_parameter(parameter, torch.bfloat16)
    optimiser.step()
    assert torch.equal(cast_parameter(parameter, torch.bfloat16), parameter.to(torch.bfloat16))


def test_storage_replaced_through_data_ends_the_cast(parameter):
    cast_parameter(parameter, torch.bfloat16)
    parameter.data = torch.randn(4, 6)
    assert torch.equal(cast_parameter(parameter, torch.bfloat16), parameter.to(torch.bfloat16))


def test_the_gradient_is_that_of_a_plain_cast(parameter):
    dy = torch.randn(4, 6).bfloat16()
    (grad,) = torch.autograd.grad(cast_parameter(parameter, torch.bfloat16), parameter, dy)
    assert grad.dtype == torch.float32
    assert torch.equal(grad, dy.float())


def test_a_cast_made_in_inference_mode_does_not_reach_training(parameter):
    """An inference tensor cannot be saved for backward."""
    with torch.inference_mode():
        cast_parameter(parameter, torch.bfloat16)
    (cast_parameter(parameter, torch.bfloat16) * 2).square().sum().backward()
    assert parameter.grad is not None


def test_casts_die_with_their_parameter():
    autocast._casts.clear()
    parameter = nn.Parameter(torch.randn(3))
    cast_parameter(parameter, torch.bfloat16)
    assert len(autocast._casts) == 1
    del parameter
    gc.collect()
    assert len(autocast._casts) == 0


def test_training_under_autocast_follows_the_weights():
    """Two steps with the cache equal two steps with plain casts, bit for bit."""

    def losses(cached):
        torch.manual_seed(0)
        layer = MoEFFN(8, 12, 2)
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
        plan = RoutingPlan.from_expert_ids(torch.arange(6) % 2, 2)
        x = torch.randn(6, 8)
        found = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
                if not cached:
                    patch.setattr("moebert_kernels.ops.cast_parameter", lambda t, dtype: t.to(dtype))
                loss = layer(x, routing=plan).float().square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)
