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
@pytest.mark.parametrize("keep", [False, True])
def test_weights_are_cast_in_every_call_or_once(device, training, keep):
    """Casting all experts costs more than the layer on few tokens: serving must be able to do without."""
    layer = MoEFFN(D, F, E, device=device)
    plan = RoutingPlan.from_expert_ids(torch.arange(T, device=device) % E, E)
    x = torch.randn(T, D, device=device)
    if keep:
        layer.keep_casts(torch.bfloat16)
    weights = [] if keep and not training else [tuple(p.shape) for p in layer.parameters()]
    for _ in range(2):
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16), Casts() as casts:
            layer(x, routing=plan)
        assert sorted(casts.shapes) == sorted([*weights, (T, D)])


@pytest.mark.gpu
def test_a_captured_graph_casts_no_weights():
    """They would be cast at every replay. The graph reads the casts, and goes on doing so."""
    layer = MoEFFN(64, 96, 4, norm_eps=1e-12, device="cuda")
    plan = RoutingPlan.from_expert_ids(torch.arange(50, device="cuda") % 4, 4)
    x = torch.randn(50, 64, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = layer(x, routing=plan)
        layer.keep_casts(torch.bfloat16)
        layer(x, routing=plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, routing=plan)
    graph.replay()
    assert torch.equal(y, expected)
    layer.w1_EFD.data.zero_()
    graph.replay()
    assert torch.equal(y, expected)
