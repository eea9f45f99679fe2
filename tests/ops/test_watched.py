"""What watches calls - tracers, counters, modes, transforms - sees the operator, and the same numbers."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moebert_kernels import RoutingPlan, moe_ffn
from moebert_kernels.ops.operator import ffn
from tests.kernels.checks import arguments
from tests.ops.calls import make_inputs

T, D, F, E, K = 9, 6, 5, 3, 2
USED = int((make_inputs(T, D, F, E, K)[1] >= 0).sum())  # by tokens that have an expert
NAMES = ("x", "w1", "b1", "w2", "b2", "ln_w", "ln_b")
# With row kernels, and in plain PyTorch.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture
def layer():
    """A function of tensors alone; without norm it leaves the last two be."""
    plan = RoutingPlan.from_expert_ids(make_inputs(T, D, F, E, K)[1], E)

    def call(x, w1, b1, w2, b2, ln_w=None, ln_b=None, **options):
        return moe_ffn(x, plan, w1, b1, w2, b2, norm=None if ln_w is None else (ln_w, ln_b), **options)

    return call


def leaves(dtype, seed=0):
    t, _ = make_inputs(T, D, F, E, K, seed=seed, dtype=dtype)
    return tuple(t[name] for name in NAMES)


def gradients(y, inputs):
    return torch.autograd.grad(y.square().sum(), inputs)


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_computes_and_learns_as_the_layer(layer, dtype, norm, grad):
    """A trace held the addresses of the example's buffers: off by 6 on the very same input, once NaN."""
    inputs, others = (leaves(dtype, seed)[: 7 if norm else 5] for seed in (0, 1))
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")  # shapes that are checked in Python, and that tracing is deprecated
        traced = torch.jit.trace(layer, inputs)
    assert any("moebert_kernels::ffn" in str(node) for node in traced.graph.nodes())
    for tensors in (inputs, others):
        assert torch.equal(traced(*tensors), layer(*tensors))
        for a, b in zip(
            gradients(traced(*tensors), tensors), gradients(layer(*tensors), tensors), strict=True
        ):
            torch.testing.assert_close(a, b)


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("forward_counted", [False, True])
def test_flops_are_counted(layer, dtype, norm, forward_counted):
    """2 GEMMs forward and 4 backward, 2 per multiply-add, for padding none; the counter read 0."""
    inputs = leaves(dtype)[: 7 if norm else 5]
    one = 2 * USED * D * F
    assert USED < T * K
    counter = FlopCounterMode(display=False)
    if forward_counted:
        with counter:
            y = layer(*inputs)
        assert counter.get_total_flops() == 2 * one
    else:
        y = layer(*inputs)
    with counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * one


def test_flops_are_counted_where_there_are_no_values():
    """On the meta device nobody knows which tokens are padding: all count."""
    x, *weights = (t.detach().to("meta") for t in leaves(torch.float32)[:5])
    plan = RoutingPlan.from_expert_ids(torch.full((T, K), -1, device="meta"), E)
    counter = FlopCounterMode(display=False)
    with counter:
        moe_ffn(x, plan, *weights)
    assert counter.get_total_flops() == 2 * 2 * T * K * D * F


def test_flops_of_what_is_not_wanted_are_not_counted(layer):
    x, *weights = (t.detach() for t in leaves(torch.float32))
    counter = FlopCounterMode(display=False)
    y = layer(x.requires_grad_(), *weights)
    with counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * USED * D * F


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@DTYPES
def test_modes_see_the_operator(layer, dtype):
    inputs = leaves(dtype)
    with Dispatched() as dispatched:
        layer(*inputs).sum().backward()
    assert {"moebert_kernels::ffn", "moebert_kernels::ffn_backward"} <= dispatched.seen
    with Called() as called:
        layer(*inputs)
    assert "moebert_kernels.ffn.default" in called.seen


def test_the_operator_is_traced_by_make_fx(layer):
    inputs = leaves(torch.float32)
    graph = make_fx(lambda *tensors: layer(*tensors))(*inputs)
    assert any(node.target is torch.ops.moebert_kernels.ffn.default for node in graph.graph.nodes)
    others = leaves(torch.float32, seed=1)
    assert torch.equal(graph(*others), layer(*others))


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


seen: list[str] = []


@pytest.mark.parametrize("which", range(len(NAMES)))
def test_a_subclass_sees_the_operator_whichever_argument_it_is(layer, which):
    inputs = [t.detach() for t in leaves(torch.float32)]
    inputs[which] = inputs[which].as_subclass(Subclass)
    seen.clear()
    layer(*inputs)
    assert "moebert_kernels.ffn.default" in seen


@DTYPES
def test_vmap_maps(layer, dtype):
    x, *weights = (t.detach() for t in leaves(dtype))
    x_BTD = torch.stack([x, x + 1])
    mapped = torch.vmap(lambda x: layer(x, *weights))(x_BTD)
    torch.testing.assert_close(mapped, torch.stack([layer(x, *weights) for x in x_BTD]))


@DTYPES
@pytest.mark.parametrize("which", [0, 1, 6])
def test_forward_mode_is_refused(layer, dtype, which):
    """The tangent came out as None or 0, in silence."""
    inputs = [t.detach() for t in leaves(dtype)]
    with forward_ad.dual_level():
        layer(*inputs)  # no tangent: nothing to refuse
        dual = list(inputs)
        dual[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer(*dual)

    def of_one(t):
        return layer(*inputs[:which], t, *inputs[which + 1 :])

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(of_one, (inputs[which],), (torch.ones_like(inputs[which]),))


@DTYPES
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()])
def test_a_second_derivative_is_refused(layer, dtype, loss):
    """It came out as 0 where the loss was linear in the output, as of a gradient penalty."""
    inputs = leaves(dtype)
    (dx,) = torch.autograd.grad(loss(layer(*inputs)), inputs[0], create_graph=True)
    (plain,) = torch.autograd.grad(loss(layer(*inputs)), inputs[0])
    assert torch.equal(dx, plain)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (dx.square().sum() + inputs[0].sum()).backward()


def test_meta_tensors_have_shapes(layer):
    """Backward as well; nothing is computed."""
    plan = RoutingPlan(
        *(torch.empty(s, dtype=torch.int32, device="meta") for s in ((T, K), T * K, T * K, E + 1))
    )
    t = dict(zip(NAMES, (v.detach().to("meta").requires_grad_() for v in leaves(torch.float32)), strict=True))
    y = moe_ffn(t["x"], plan, t["w1"], t["b1"], t["w2"], t["b2"], norm=(t["ln_w"], t["ln_b"]))
    grads = torch.autograd.grad(y.sum(), list(t.values()))
    assert [g.shape for g in grads] == [v.shape for v in t.values()]


def test_an_untraced_forward_can_be_differentiated_later():
    """The operator called for inference keeps nothing: its backward computes the pre-activations again."""
    t, ids = make_inputs(T, D, F, E, K, dtype=torch.float32)
    call = arguments(t, RoutingPlan.from_expert_ids(ids, E), norm=True, gate=True)
    wanted = list(t.values())
    kept, again = (torch.autograd.grad(ffn(*call, keep)[0].sum(), wanted) for keep in (True, False))
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)
