"""Autocast: weights are cast as `nn.Linear` casts them, or once, where that is asked for."""

import copy

import pytest
import torch
from torch import nn

from moebert_kernels import MoEFFN, RoutingPlan, moe_ffn
from tests.kernels.checks import assert_equal

T, D, F, E = 20, 8, 12, 3


def layer_and_inputs(**options):
    torch.manual_seed(0)
    plan = RoutingPlan.from_expert_ids(torch.arange(T) % E, E)
    return MoEFFN(D, F, E, norm_eps=1e-12, **options), torch.randn(T, D), plan


def under_autocast(layer, x, plan, *, dtype=torch.bfloat16, grad=False):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
        return layer(x, routing=plan)


@pytest.mark.parametrize("grad", [False, True])
def test_weights_written_through_data_are_seen(grad):
    """An average of weights is often written so: a cache gave the output of the old ones."""
    layer, x, plan = layer_and_inputs()
    before = under_autocast(layer, x, plan, grad=grad)
    for parameter in layer.parameters():
        parameter.data.fill_(0)
    after = under_autocast(layer, x, plan, grad=grad)
    assert before.abs().max() > 0
    assert torch.equal(after, torch.zeros(T, D))


def test_float64_is_left_alone_as_by_linear():
    """It was cast down, and 45 bits were lost without a word."""
    layer, x, plan = layer_and_inputs(dtype=torch.float64)
    linear = nn.Linear(D, D, dtype=torch.float64)
    x = x.double()
    exact = layer(x, routing=plan)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.float64
    assert torch.equal(under_autocast(layer, x, plan, grad=True), exact)
    layer.keep_casts(torch.bfloat16)
    assert torch.equal(under_autocast(layer, x, plan), exact)


def test_the_gradient_is_that_of_a_plain_cast():
    layer, x, plan = layer_and_inputs()
    layer.keep_casts(torch.bfloat16)
    under_autocast(layer, x, plan, grad=True).sum().backward()
    weights = (layer.w1_EFD, layer.bias1_EF, layer.w2_EDF, layer.bias2_ED)
    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    half, norm = [leaf.bfloat16() for leaf in leaves], (layer.layernorm_weight_ED, layer.layernorm_bias_ED)
    y = moe_ffn(x.bfloat16(), plan, *half, norm=norm, residual_TD=x)
    assert_equal([weight.grad for weight in weights], torch.autograd.grad(y.sum(), leaves))


def test_kept_casts_change_nothing():
    layer, x, plan = layer_and_inputs()
    plain = {d: under_autocast(layer, x, plan, dtype=d) for d in (torch.bfloat16, torch.float16)}
    outside = layer(x, routing=plan)
    layer.keep_casts(torch.bfloat16)
    for dtype, expected in plain.items():
        assert torch.equal(under_autocast(layer, x, plan, dtype=dtype), expected)
    assert torch.equal(layer(x, routing=plan), outside)
    assert len(layer.state_dict()) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: torch.optim.SGD(layer.parameters(), lr=1.0).step(),
        lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
        lambda layer: setattr(layer, "w1_EFD", nn.Parameter(torch.randn(E, F, D))),
        lambda layer: setattr(layer.bias1_EF, "data", torch.randn(E, F)),
        lambda layer: layer.keep_casts(None),
    ],
    ids=["step", "load", "replace", "data", "give up"],
)
def test_kept_casts_are_not_used_for_other_weights(change):
    layer, x, plan = layer_and_inputs()
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    layer.keep_casts(torch.bfloat16)
    change(layer)
    fresh = MoEFFN(D, F, E, norm_eps=1e-12)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(under_autocast(layer, x, plan), under_autocast(fresh, x, plan))


def test_a_layer_that_keeps_casts_can_be_copied():
    layer, x, plan = layer_and_inputs()
    layer.keep_casts(torch.bfloat16)
    twin = copy.deepcopy(layer)
    assert torch.equal(under_autocast(twin, x, plan), under_autocast(layer, x, plan))
