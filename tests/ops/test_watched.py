"""What watches calls - tracers, counters, modes, transforms - sees the operator, and the same numbers."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moebert_kernels import moe_ffn
from moebert_kernels.ops.operator import ffn
from tests.cases import Case, expert_ids
from tests.kernels.checks import arguments, assert_equal, inputs, leaves, plan_of

CASE = Case(9, D=6, F=5, E=3, K=2, routing="dropped", gate=True, norm=True)
USED = int((expert_ids(CASE) >= 0).sum())  # slots, of CASE.T * CASE.K
SLOT_FLOPS = 2 * CASE.D * CASE.F  # in one GEMM
NAMES = ("x", "w1", "b1", "w2", "b2", "ln_w", "ln_b")
# With row kernels, and in plain PyTorch.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture
def layer():
    """A function of tensors alone; without norm it leaves the last two be."""
    plan = plan_of(CASE, "cpu")

    def call(x, w1, b1, w2, b2, ln_w=None, ln_b=None, **options):
        return moe_ffn(x, plan, w1, b1, w2, b2, norm=None if ln_w is None else (ln_w, ln_b), **options)

    return call


def layer_inputs(dtype, seed=0):
    t = leaves(inputs(CASE, dtype, "cpu", seed=seed))
    return tuple(t[name] for name in NAMES)


def gradients(y, tensors):
    return torch.autograd.grad(y.square().sum(), tensors)


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_computes_and_learns_as_the_layer(layer, dtype, norm, grad):
    """A trace held the addresses of the example's buffers: off by 6 on the very same input, once NaN."""
    tensors, others = (layer_inputs(dtype, seed)[: 7 if norm else 5] for seed in (0, 1))
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.simplefilter("ignore")  # shapes that are checked in Python, and that tracing is deprecated
        traced = torch.jit.trace(layer, tensors)
    assert any("moebert_kernels::ffn" in str(node) for node in traced.graph.nodes())
    for given in (tensors, others):
        found, expected = traced(*given), layer(*given)
        assert torch.equal(found, expected)
        torch.testing.assert_close(gradients(found, given), gradients(expected, given))


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("forward_counted", [False, True])
def test_flops_are_counted(layer, dtype, norm, forward_counted):
    """2 GEMMs forward and 4 backward, 2 per multiply-add, for padding none; the counter read 0."""
    tensors = layer_inputs(dtype)[: 7 if norm else 5]
    assert USED < CASE.T * CASE.K
    counter = FlopCounterMode(display=False)
    with counter if forward_counted else nullcontext():
        y = layer(*tensors)
    assert counter.get_total_flops() == (2 * USED * SLOT_FLOPS if forward_counted else 0)
    with counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * USED * SLOT_FLOPS


def test_flops_are_counted_where_there_are_no_values():
    """On the meta device nobody knows which tokens are padding: all count."""
    x, *weights = (t.detach().to("meta") for t in layer_inputs(torch.float32)[:5])
    counter = FlopCounterMode(display=False)
    with counter:
        moe_ffn(x, plan_of(CASE, "meta"), *weights)
    assert counter.get_total_flops() == 2 * CASE.T * CASE.K * SLOT_FLOPS


def test_flops_of_what_is_not_wanted_are_not_counted(layer):
    x, *weights = (t.detach() for t in layer_inputs(torch.float32))
    counter = FlopCounterMode(display=False)
    y = layer(x.requires_grad_(), *weights)
    with counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * USED * SLOT_FLOPS


SEEN: list[str] = []


@pytest.fixture
def seen():
    """What those below were told of."""
    SEEN.clear()
    return SEEN


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        SEEN.append(func.name())
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        SEEN.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        SEEN.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@DTYPES
def test_modes_see_the_operator(layer, dtype, seen):
    tensors = layer_inputs(dtype)
    with Dispatched():
        layer(*tensors).sum().backward()
    assert {"moebert_kernels::ffn", "moebert_kernels::ffn_backward"} <= {*seen}
    with Called():
        layer(*tensors)
    assert "moebert_kernels.ffn.default" in seen


@pytest.mark.parametrize("which", range(len(NAMES)))
def test_a_subclass_sees_the_operator_whichever_argument_it_is(layer, which, seen):
    tensors = [t.detach() for t in layer_inputs(torch.float32)]
    tensors[which] = tensors[which].as_subclass(Subclass)
    layer(*tensors)
    assert "moebert_kernels.ffn.default" in seen


def test_the_operator_is_traced_by_make_fx(layer):
    graph = make_fx(lambda *tensors: layer(*tensors))(*layer_inputs(torch.float32))
    assert any(node.target is torch.ops.moebert_kernels.ffn.default for node in graph.graph.nodes)
    others = layer_inputs(torch.float32, seed=1)
    assert torch.equal(graph(*others), layer(*others))


@DTYPES
def test_vmap_maps(layer, dtype):
    x, *weights = (t.detach() for t in layer_inputs(dtype))
    x_BTD = torch.stack([x, x + 1])
    mapped = torch.vmap(lambda x: layer(x, *weights))(x_BTD)
    torch.testing.assert_close(mapped, torch.stack([layer(x, *weights) for x in x_BTD]))


@DTYPES
@pytest.mark.parametrize("which", [0, 1, 6])
def test_forward_mode_and_transforms_are_refused(layer, dtype, which):
    """The tangent came out as None or 0, in silence."""
    tensors = [t.detach() for t in layer_inputs(dtype)]
    with forward_ad.dual_level():
        layer(*tensors)  # no tangent: nothing to refuse
        dual = list(tensors)
        dual[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer(*dual)

    def of_one(t):
        return layer(*tensors[:which], t, *tensors[which + 1 :])

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(of_one, (tensors[which],), (torch.ones_like(tensors[which]),))
    # Of which PyTorch said that an autograd.Function lacks a method.
    with pytest.raises(NotImplementedError, match="cannot be differentiated by transforms"):
        torch.func.grad(lambda t: of_one(t).sum())(tensors[which])


def test_what_a_transform_does_not_differentiate_is_computed(layer):
    """Within torch.func.grad every tensor is a wrapped one; a head over frozen experts must be trainable."""
    x, *weights = (t.detach() for t in layer_inputs(torch.float32))
    expected = layer(x, *weights).sum()

    def through(scale):
        return (layer(x * 1.0, *weights) * scale).sum()

    torch.testing.assert_close(torch.func.grad(through)(torch.tensor(2.0)), expected)


@DTYPES
@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()])
def test_a_second_derivative_is_refused(layer, dtype, loss):
    """It came out as 0 where the loss was linear in the output, as of a gradient penalty."""
    tensors = layer_inputs(dtype)
    (dx,) = torch.autograd.grad(loss(layer(*tensors)), tensors[0], create_graph=True)
    (plain,) = torch.autograd.grad(loss(layer(*tensors)), tensors[0])
    assert torch.equal(dx, plain)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (dx.square().sum() + tensors[0].sum()).backward()


def test_meta_tensors_have_shapes(layer):
    """Backward as well; nothing is computed."""
    x, *weights, ln_w, ln_b = tensors = [
        t.detach().to("meta").requires_grad_() for t in layer_inputs(torch.float32)
    ]
    y = moe_ffn(x, plan_of(CASE, "meta"), *weights, norm=(ln_w, ln_b))
    assert [g.shape for g in torch.autograd.grad(y.sum(), tensors)] == [t.shape for t in tensors]


def test_an_untraced_forward_can_be_differentiated_later():
    """The operator called for inference keeps nothing: its backward computes the pre-activations again."""
    t = leaves(inputs(CASE, torch.float32, "cpu"))
    call = arguments(t, plan_of(CASE, "cpu"), norm=True, gate=True)
    wanted = [tensor for tensor in t.values() if tensor.requires_grad]
    kept, again = (torch.autograd.grad(ffn(*call, keep)[0].sum(), wanted) for keep in (True, False))
    assert_equal(again, kept)
