"""The operator contract on the CPU: float64 python_ref for values and gradients, PyTorch's rules."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import library
from torch.nn import functional

from moebert_kernels import RoutingPlan, moe_ffn
from moebert_kernels.ops.operator import ffn
from tests.cases import Case, any_experts, expert_ids
from tests.kernels.checks import (
    FORMS,
    arguments,
    assert_equal,
    call,
    experts_of,
    inputs,
    leaves,
    outputs,
    plan_of,
    reference,
    run,
)

SMALL = Case(9, D=6, F=5, E=3, routing="dropped", gate=True)
WHOLE = dataclasses.replace(SMALL, K=2, norm=True)
TIED = dataclasses.replace(SMALL, C=4)


@given(
    T=st.sampled_from([0, 1, 2, 7, 17]),
    E=st.integers(1, 5),
    K=st.integers(1, 3),
    norm=st.booleans(),
    gate=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
    seed=st.integers(0, 1000),
)
@example(T=9, E=3, K=1, norm=False, gate=True, bias=False, activation="gelu", seed=0)
def test_values_and_gradients_equal_the_reference(T, E, K, norm, gate, bias, activation, seed):
    case = Case(T, 6, 5, E, min(K, E), activation=activation, bias=bias, gate=gate, norm=norm)
    t, ids_TK = inputs(case, torch.float64, "cpu", seed=seed), any_experts(case, seed=seed)
    torch.testing.assert_close(run(case, t, ids_TK), reference(case, t, ids_TK))


def test_erf_and_tanh_gelu_are_told_apart():
    """A peer shipped the wrong GELU behind a loose tolerance: at |x| up to 6 they part by 5e-4."""
    ids = torch.zeros(121, 1, dtype=torch.long)
    plan = RoutingPlan.from_expert_ids(ids, 1)
    x = torch.linspace(-6, 6, 121).unsqueeze(1)
    one = torch.ones(1, 1, 1)
    erf = moe_ffn(x, plan, one, None, one, None, activation="gelu")
    tanh = moe_ffn(x, plan, one, None, one, None, activation="gelu_tanh")
    assert (erf - tanh).abs().max() > 4e-4
    torch.testing.assert_close(erf, torch.nn.functional.gelu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_low_precision_is_as_good_as_plain_torch(dtype, norm):
    """Per output, rms error against float64 at most 1.5 times that of torch's own modules in this dtype."""
    case = Case(64, D=32, F=48, E=3, norm=norm)
    t, ids_TK = inputs(case, dtype, "cpu"), expert_ids(case)
    y = call(case, t, plan_of(case, "cpu"))
    assert y.dtype == dtype
    plain = torch.empty_like(y)
    for e in range(case.E):
        rows = ids_TK[:, 0] == e
        h = functional.gelu(functional.linear(t["x"][rows], t["w1"][e], t["b1"][e]))
        z = functional.linear(h, t["w2"][e], t["b2"][e])
        if norm:
            u = z + t["residual"][rows]
            z = functional.layer_norm(u, (case.D,), t["ln_w"][e], t["ln_b"][e], 1e-12)
        plain[rows] = z

    def rms_error(value):
        return (value.double() - exact).square().mean().sqrt()

    exact = reference(case, t)["y"]
    assert rms_error(y) <= 1.5 * rms_error(plain)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(WHOLE, torch.float64), (Case(40, D=8, F=8, E=2, C=16, norm=True, routing="dropped"), torch.float32)],
    ids=str,
)
def test_any_subset_of_inputs_may_require_grad(case, dtype):
    t, plan = inputs(case, dtype, "cpu"), plan_of(case, "cpu")
    everything = run(case, t)
    names = [name for name in t if name != "dy"]
    for wanted in (c for n in (1, 2) for c in itertools.combinations(names, n)):
        part = leaves(t, wanted)
        found = outputs(call(case, part, plan), part)
        torch.testing.assert_close(found, {name: everything[name] for name in found})


def test_a_second_backward_sees_the_same_saved_tensors():
    """A peer wrote into what it had saved, so that the second backward was wrong."""
    t = leaves(inputs(WHOLE, torch.float64, "cpu"))
    y = call(WHOLE, t, plan_of(WHOLE, "cpu")).sum()
    wanted = [tensor for tensor in t.values() if tensor.requires_grad]
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    assert_equal(torch.autograd.grad(y, wanted), first)


def test_strides_do_not_matter():
    t = inputs(WHOLE, torch.float64, "cpu")
    strided = leaves(t | {name: t[name].T.contiguous().T for name in ("x", "dy")})
    assert not strided["x"].is_contiguous()
    found, expected = outputs(call(WHOLE, strided, plan_of(WHOLE, "cpu")), strided), run(WHOLE, t)
    assert_equal(found["y"], expected["y"])
    torch.testing.assert_close(found, expected)


def test_a_token_without_expert_is_skipped():
    case = dataclasses.replace(WHOLE, routing="nobody")
    t = inputs(case, torch.float64, "cpu")
    assert not run(dataclasses.replace(case, norm=False), t)["y"].any()
    found = run(case, t)
    assert_equal([found["y"], found["dresidual"]], [t["residual"], t["dy"]])


def test_dropout_is_the_same_in_backward_and_follows_the_seed():
    case = Case(40, D=6, F=5, E=3, norm=True)
    t, plan = leaves(inputs(case, torch.float64, "cpu")), plan_of(case, "cpu")

    def dropping(seed, x):
        torch.manual_seed(seed)
        return call(case, t | {"x": x}, plan, dropout_p=0.3)

    assert torch.equal(dropping(1, t["x"]), dropping(1, t["x"]))
    assert not torch.equal(dropping(1, t["x"]), dropping(2, t["x"]))
    assert torch.autograd.gradcheck(lambda x: dropping(1, x), (t["x"],))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_zeroes_its_share_and_keeps_the_mean(dtype):
    T, D = 50, 1000
    plan = RoutingPlan.from_expert_ids(torch.zeros(T, dtype=torch.long), 1)
    zeros, ones = torch.zeros(T, D, dtype=dtype), torch.ones(1, D, dtype=dtype)
    w1, w2 = torch.zeros(1, 1, D, dtype=dtype), torch.zeros(1, D, 1, dtype=dtype)
    torch.manual_seed(0)
    # LayerNorm of dropout(1) + 0 takes two values; their shares are those of the mask.
    y = moe_ffn(zeros, plan, w1, None, w2, ones, norm=(ones, zeros[:1]), dropout_p=0.25)
    assert (y < 0).double().mean().item() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [SMALL, TIED], ids=str)
def test_autocast_casts_as_linear_does(case, dtype):
    normed = dataclasses.replace(case, norm=True)
    t, plan = leaves(inputs(normed, torch.float32, "cpu")), plan_of(case, "cpu")
    with torch.autocast("cpu", dtype=dtype):
        y, y_normed = call(case, t, plan), call(normed, t, plan)
    assert (y.dtype, y_normed.dtype) == (dtype, torch.float32)
    wanted = [tensor for tensor in t.values() if tensor.requires_grad]
    grads = torch.autograd.grad(y_normed.sum() + y.float().sum(), wanted)
    assert {grad.dtype for grad in grads} == {torch.float32}
    low = {name: tensor.detach().to(dtype) for name, tensor in t.items()}
    assert_equal(y, call(case, low | {"gate": t["gate"].detach()}, plan))


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [0, 4])
def test_opcheck_is_clean(C, dtype, form):
    """Every form in every dtype, and each of the two with one expert for a token or two."""
    K = 1 + (form + (dtype == torch.float32)) % 2
    case = dataclasses.replace(WHOLE, K=K, C=C)
    t, plan = leaves(inputs(case, dtype, "cpu")), plan_of(case, "cpu")
    # The last check compares gradients of its own compilation: for them 16 bits are too few.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    training = (*arguments(t, plan, **FORMS[form]), True)
    library.opcheck(ffn, training, test_utils=checks[: 3 if dtype == torch.bfloat16 else 4])
    if C == 0:  # inference keeps nothing, of shared neurons either
        fixed = {name: tensor.detach() for name, tensor in t.items()}
        library.opcheck(ffn, (*arguments(fixed, plan, **FORMS[form]), False))


@pytest.mark.slow
def test_compiles_whole_and_once_for_all_token_counts():
    t = leaves(inputs(Case(4, D=6, F=5, E=3, norm=True), torch.float32, "cpu"))
    frames = []

    def count(graph, _inputs):
        frames.append(graph)
        return graph

    def layer(x, ids):
        plan = RoutingPlan.from_expert_ids(ids, 3)
        return moe_ffn(x, plan, *experts_of(t), norm=(t["ln_w"], t["ln_b"]))

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=None)
    for T in (5, 9, 33, 64, 100):
        x, ids = torch.randn(T, 6), torch.randint(-1, 3, (T,))
        torch.testing.assert_close(compiled(x, ids), layer(x, ids))
    assert len(frames) <= 2


WRONG = {
    "x": ({"x": torch.zeros(9, 7)}, "x_TD must have shape"),
    "w1": ({"w1": torch.zeros(6, 5)}, "w1_EFD must have shape"),
    "experts": ({"w1": torch.zeros(4, 5, 6)}, "plan is for 3 experts, but w1_EFD has 4"),
    "w2": ({"w2": torch.zeros(3, 5, 6)}, "w2_EDF must have shape"),
    "b1": ({"b1": torch.zeros(3, 6)}, "b1_EF must have shape"),
    "gate": ({"gate": torch.zeros(9, 2)}, "gate_TK must have shape"),
    "dtype": ({"w1": torch.zeros(3, 5, 6).double()}, "x_TD must have|w1_EFD must have x_TD's dtype"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    changes, words = WRONG[wrong]
    with pytest.raises(ValueError, match=words):
        call(SMALL, inputs(SMALL, torch.float32, "cpu") | changes, plan_of(SMALL, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [False, True])
def test_a_plan_of_another_device_or_form_is_refused(dtype, norm):
    """Stops its tables from being read through a null or a foreign pointer, which ends the process."""
    case = dataclasses.replace(SMALL, gate=False, norm=norm)
    t, plan = inputs(case, dtype, "cpu"), plan_of(case, "cpu")
    with pytest.raises(ValueError, match="plan is on meta, but w1_EFD is on cpu"):
        call(case, t, plan_of(case, "meta"))
    for changes, words in (
        ({"inverse_S": plan.inverse_S.to("meta")}, "plan is on meta, but w1_EFD is on cpu"),
        ({"order_S": plan.order_S.long()}, r"plan\.order_S must be int32, got torch\.int64"),
        ({"order_S": plan.order_S[:5]}, r"plan\.order_S must have shape \(9,\) .* got \(5,\)"),
        ({"offsets_E1": plan.offsets_E1.float()}, r"plan\.offsets_E1 must be int32"),
    ):
        with pytest.raises(ValueError, match=words):
            call(case, t, dataclasses.replace(plan, **changes))


@pytest.mark.parametrize(
    ("norm", "options", "words"),
    [
        (False, {"activation": "swish"}, "activation must be one of gelu"),
        (False, {"dropout_p": 0.1}, r"dropout_p=0\.1 needs norm"),
        (False, {"residual_TD": torch.zeros(9, 6)}, "residual_TD"),
        (True, {"dropout_p": 1}, r"dropout_p must lie in \[0, 1\), got 1"),
    ],
)
def test_wrong_options_are_named(norm, options, words):
    case = dataclasses.replace(SMALL, norm=norm)
    with pytest.raises(ValueError, match=words):
        call(case, inputs(case, torch.float32, "cpu"), plan_of(case, "cpu"), **options)
