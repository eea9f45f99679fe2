"""Under autocast, what a call costs in casts: counted where torch dispatches them, on any device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moebert_kernels import MoEFFN, RoutingPlan

T, D, F, E = 20, 8, 12, 3


class Casts(TorchDispatchMode):
    """The shapes of all tensors that were copied to another dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("training", [False, True])
def test_weights_are_cast_once_per_optimiser_step(device, training):
    """Casting all experts costs more than the layer on few tokens: a second call casts its input alone."""
    layer = MoEFFN(D, F, E, device=device)
    plan = RoutingPlan.from_expert_ids(torch.arange(T, device=device) % E, E)
    x = torch.randn(T, D, device=device)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    weights = sorted(tuple(p.shape) for p in layer.parameters())

    def casts_of_a_call():
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16), Casts() as casts:
            y = layer(x, routing=plan)
        if training:
            y.float().sum().backward()
        return sorted(casts.shapes)

    for _ in range(2):
        assert casts_of_a_call() == sorted([*weights, (T, D)])
        assert casts_of_a_call() == [(T, D)]
        assert casts_of_a_call() == [(T, D)]
        optimiser.step()
