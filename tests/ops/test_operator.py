"""The operator contract on the CPU: float64 python_ref for values and gradients, PyTorch's rules."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

from moebert_kernels import RoutingPlan, moe_ffn
from moebert_kernels.ops.operator import ffn
from tests.kernels.checks import FORMS, arguments
from tests.ops.calls import INPUTS, make_inputs, ours, reference, used


@given(
    st.sampled_from([0, 1, 2, 7, 17]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
    st.integers(0, 1000),
)
def test_values_and_gradients_equal_the_reference(T, E, K, norm, gate, activation, seed):
    t, ids = make_inputs(T, 6, 5, E, min(K, E), seed=seed)
    y = ours(t, RoutingPlan.from_expert_ids(ids, E), norm=norm, gate=gate, activation=activation)
    expected = reference(t, ids, norm=norm, gate=gate, activation=activation)
    torch.testing.assert_close(y, expected)
    if T == 0:
        return
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    names = used(norm, gate)
    ours_grads = torch.autograd.grad(y, [t[n] for n in names], dy, materialize_grads=True)
    ref_grads = torch.autograd.grad(expected, [t[n] for n in names], dy, materialize_grads=True)
    for name, a, b in zip(names, ours_grads, ref_grads, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"gradient of {name}: {m}")


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
    t64, ids = make_inputs(64, 32, 48, 3, 1, low=0)
    t = {k: v.detach().to(dtype) for k, v in t64.items()}
    exact = reference({k: v.double() for k, v in t.items()}, ids, norm=norm, gate=False)
    y = ours(t, RoutingPlan.from_expert_ids(ids, 3), norm=norm, gate=False)
    assert y.dtype == dtype
    plain = torch.empty_like(y)
    for e in range(3):
        rows = ids[:, 0] == e
        h = torch.nn.functional.gelu(torch.nn.functional.linear(t["x"][rows], t["w1"][e], t["b1"][e]))
        z = torch.nn.functional.linear(h, t["w2"][e], t["b2"][e])
        if norm:
            u = z + t["residual"][rows]
            z = torch.nn.functional.layer_norm(u, (32,), t["ln_w"][e], t["ln_b"][e], 1e-12)
        plain[rows] = z

    def rms_error(value):
        return (value.double() - exact).square().mean().sqrt()

    assert rms_error(y) <= 1.5 * rms_error(plain)


def test_any_subset_of_inputs_may_require_grad():
    t, ids = make_inputs(9, 6, 5, 3, 2)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    full = torch.autograd.grad(
        ours(t, plan, norm=True, gate=True).square().sum(), [t[n] for n in INPUTS], retain_graph=True
    )
    wanted = dict(zip(INPUTS, full, strict=True))
    for subset in itertools.chain(itertools.combinations(INPUTS, 1), itertools.combinations(INPUTS, 2)):
        part = {n: v.detach().requires_grad_(n in subset) for n, v in t.items()}
        y = ours(part, plan, norm=True, gate=True)
        for name, grad in zip(
            subset, torch.autograd.grad(y.square().sum(), [part[n] for n in subset]), strict=True
        ):
            torch.testing.assert_close(grad, wanted[name], msg=lambda m, s=subset: f"{s}: {m}")


def test_nothing_needs_biases():
    t, ids = make_inputs(9, 6, 5, 3, 1)
    t |= {"b1": None, "b2": None}
    plan = RoutingPlan.from_expert_ids(ids, 3)
    y = ours(t, plan, norm=False, gate=True)
    expected = reference(t, ids, norm=False, gate=True)
    torch.testing.assert_close(y, expected)
    names = ["x", "w1", "w2", "gate"]
    for a, b in zip(
        torch.autograd.grad(y.sum(), [t[n] for n in names]),
        torch.autograd.grad(expected.sum(), [t[n] for n in names]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_second_backward_sees_the_same_saved_tensors():
    """A peer wrote into what it had saved, so that the second backward was wrong."""
    t, ids = make_inputs(9, 6, 5, 3, 2)
    y = ours(t, RoutingPlan.from_expert_ids(ids, 3), norm=True, gate=True).sum()
    first = torch.autograd.grad(y, [t[n] for n in INPUTS], retain_graph=True)
    second = torch.autograd.grad(y, [t[n] for n in INPUTS])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_strides_do_not_matter():
    t, ids = make_inputs(9, 6, 5, 3, 1)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    y = ours(t, plan, norm=True, gate=True)
    strided = dict(t, x=t["x"].detach().T.contiguous().T.requires_grad_())
    y_strided = ours(strided, plan, norm=True, gate=True)
    assert torch.equal(y, y_strided)
    dy = torch.randn(6, 9, dtype=torch.float64).T
    (a,) = torch.autograd.grad(y, t["x"], dy.contiguous())
    (b,) = torch.autograd.grad(y_strided, strided["x"], dy)
    torch.testing.assert_close(a, b)


def test_a_token_without_expert_is_skipped():
    t, ids = make_inputs(5, 6, 5, 3, 1)
    ids[:] = -1
    plan = RoutingPlan.from_expert_ids(ids, 3)
    assert torch.equal(ours(t, plan, norm=False, gate=True), torch.zeros(5, 6, dtype=torch.float64))
    y = ours(t, plan, norm=True, gate=True)
    assert torch.equal(y, t["residual"])
    (dresidual,) = torch.autograd.grad(y.sum(), t["residual"])
    assert torch.equal(dresidual, torch.ones_like(dresidual))


def test_dropout_is_the_same_in_backward_and_follows_the_seed():
    t, ids = make_inputs(40, 6, 5, 3, 1, low=0)
    plan = RoutingPlan.from_expert_ids(ids, 3)

    def run(seed, x):
        torch.manual_seed(seed)
        return ours(dict(t, x=x), plan, norm=True, gate=False, dropout_p=0.3)

    assert torch.equal(run(1, t["x"]), run(1, t["x"]))
    assert not torch.equal(run(1, t["x"]), run(2, t["x"]))
    assert torch.autograd.gradcheck(lambda x: run(1, x), (t["x"],))


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


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(device_dtype):
    t, ids = make_inputs(9, 6, 5, 3, 1, dtype=torch.float32)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    with torch.autocast("cpu", dtype=device_dtype):
        plain = ours(t, plan, norm=False, gate=True)
        normed = ours(t, plan, norm=True, gate=True)
    assert plain.dtype == device_dtype
    assert normed.dtype == torch.float32
    grads = torch.autograd.grad(normed.sum() + plain.float().sum(), [t[n] for n in INPUTS])
    assert all(g.dtype == torch.float32 for g in grads)
    low = {k: v.detach().to(device_dtype) for k, v in t.items()}
    assert torch.equal(plain, ours(low | {"gate": t["gate"].detach()}, plan, norm=False, gate=True))


@pytest.mark.parametrize("form", range(len(FORMS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_is_clean(form, dtype):
    """Every form in every dtype, and each of the two with one expert for a token or two."""
    K, form = 1 + (form + (dtype == torch.float32)) % 2, FORMS[form]
    t, ids = make_inputs(9, 6, 5, 3, K, dtype=dtype)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    # The last check compares gradients of its own compilation: for them 16 bits are too few.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(
        ffn, (*arguments(t, plan, **form), True), test_utils=checks[: 3 if dtype == torch.bfloat16 else 4]
    )
    fixed = {k: v.detach() for k, v in t.items()}
    library.opcheck(ffn, (*arguments(fixed, plan, **form), False))


@pytest.mark.slow
def test_compiles_whole_and_once_for_all_token_counts():
    t, _ = make_inputs(4, 6, 5, 3, 1, dtype=torch.float32)
    weights = [t[n] for n in ("w1", "b1", "w2", "b2")]
    frames = []

    def count(graph, _inputs):
        frames.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count, dynamic=None)
    def layer(x, ids):
        plan = RoutingPlan.from_expert_ids(ids, 3)
        return moe_ffn(x, plan, *weights, norm=(t["ln_w"], t["ln_b"]))

    for T in (5, 9, 33, 64, 100):
        x, ids = torch.randn(T, 6), torch.randint(-1, 3, (T,))
        plan = RoutingPlan.from_expert_ids(ids, 3)
        expected = moe_ffn(x, plan, *weights, norm=(t["ln_w"], t["ln_b"]))
        torch.testing.assert_close(layer(x, ids), expected)
    assert len(frames) <= 2


WRONG = {
    "x": ({"x": torch.zeros(9, 7)}, "x_TD must have shape"),
    "w1": ({"w1": torch.zeros(6, 5)}, "w1_EFD must have shape"),
    "experts": ({"w1": torch.zeros(4, 5, 6)}, "plan is for 3 experts, but w1_EFD has 4"),
    "w2": ({"w2": torch.zeros(3, 5, 6)}, "w2_EDF must have shape"),
    "b1": ({"b1": torch.zeros(3, 6)}, "b1_EF must have shape"),
    "gate": ({"gate": torch.zeros(9, 2)}, "gate_TK must have shape"),
    "dtype": (
        {"w1": torch.zeros(3, 5, 6, dtype=torch.float64)},
        "x_TD must have|w1_EFD must have x_TD's dtype",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    changes, words = WRONG[case]
    t, ids = make_inputs(9, 6, 5, 3, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match=words):
        ours(t | changes, RoutingPlan.from_expert_ids(ids, 3), norm=False, gate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [False, True])
def test_a_plan_of_another_device_or_form_is_refused(dtype, norm):
    """Stops its tables from being read through a null or a foreign pointer, which ends the process."""
    t, ids = make_inputs(9, 6, 5, 3, 1, dtype=dtype)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    with pytest.raises(ValueError, match="plan is on meta, but w1_EFD is on cpu"):
        ours(t, RoutingPlan.from_expert_ids(ids.to("meta"), 3), norm=norm, gate=False)
    for changes, words in (
        ({"inverse_S": plan.inverse_S.to("meta")}, "plan is on meta, but w1_EFD is on cpu"),
        ({"order_S": plan.order_S.long()}, r"plan\.order_S must be int32, got torch\.int64"),
        ({"order_S": plan.order_S[:5]}, r"plan\.order_S must have shape \(9,\) .* got \(5,\)"),
        ({"offsets_E1": plan.offsets_E1.float()}, r"plan\.offsets_E1 must be int32"),
    ):
        with pytest.raises(ValueError, match=words):
            ours(t, dataclasses.replace(plan, **changes), norm=norm, gate=False)


def test_wrong_options_are_named():
    t, ids = make_inputs(9, 6, 5, 3, 1)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    with pytest.raises(ValueError, match="activation must be one of gelu"):
        ours(t, plan, norm=False, gate=True, activation="swish")
    with pytest.raises(ValueError, match=r"dropout_p=0\.1 needs norm"):
        ours(t, plan, norm=False, gate=True, dropout_p=0.1)
    with pytest.raises(ValueError, match="residual_TD"):
        ours(t, plan, norm=False, gate=True, residual_TD=t["residual"])
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\), got 1"):
        ours(t, plan, norm=True, gate=True, dropout_p=1)
