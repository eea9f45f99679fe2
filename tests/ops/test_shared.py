"""Neurons that all experts share, stored once: operator and layer, against float64 and the untied form."""

import itertools

import pytest
import torch
from torch import library

from moebert_kernels import HashRouter, MoEFFN, hash_random_tables, moe_ffn, native
from moebert_kernels.kernels import cpu
from moebert_kernels.kernels import torch as plain
from moebert_kernels.kernels.cpu import rows
from moebert_kernels.ops import backends, operator
from python_ref.adaptation import tie_shared
from tests.cases import SHARING, Case, expert_ids
from tests.kernels.checks import (
    FORMS,
    SHARED,
    arguments,
    call,
    check,
    errors,
    inputs,
    leaves,
    plan_of,
    reference,
    run,
    shared_of,
)


@pytest.mark.parametrize("case", SHARING, ids=str)
def test_float64_equals_the_reference(case):
    """Values and all gradients of the path in plain PyTorch."""
    t = {name: value.double() for name, value in inputs(case, torch.float64, "cpu").items()}
    for name, value in reference(case, t).items():
        found = run(case, t)[name].double()
        torch.testing.assert_close(found, value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", SHARING, ids=str)
def test_float32_is_as_good_as_plain_pytorch(case):
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", [c for c in SHARING if c.T > 1], ids=str)
def test_tied_equals_untied_with_copies(case):
    """The same function as that of experts which each hold a copy; the shared gradient is the copies' sum."""
    t = inputs(case, torch.float64, "cpu")
    copied = {name: value for name, value in t.items() if name not in SHARED}
    copied["w1"] = torch.cat([t["shared_w1"].expand(case.E, -1, -1), t["w1"]], 1)
    copied["w2"] = torch.cat([t["shared_w2"].expand(case.E, -1, -1), t["w2"]], 2)
    if case.bias:
        copied["b1"] = torch.cat([t["shared_b1"].expand(case.E, -1), t["b1"]], 1)
    tied, untied = run(case, t), run(case, copied)
    for name in ("y", "dx"):
        torch.testing.assert_close(tied[name], untied[name])
    torch.testing.assert_close(tied["dshared_w1"], untied["dw1"][:, : case.C].sum(0))
    torch.testing.assert_close(tied["dshared_w2"], untied["dw2"][:, :, : case.C].sum(0))
    torch.testing.assert_close(tied["dw1"], untied["dw1"][:, case.C :])


@pytest.fixture(params=("together", "one after another", "in pieces"))
def layout(request, monkeypatch):
    """Forces a layout of rows that only large inputs would reach."""
    if request.param != "together":
        monkeypatch.setattr(rows, "_MAX_BATCH_FILL", -1)
    if request.param == "in pieces":
        monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 40)
    monkeypatch.setattr(backends, "_forms", {})


@pytest.mark.skipif(not native.status().cpu, reason=native.status().cpu_detail)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("norm", [False, True])
def test_native_rows_in_every_layout(layout, dtype, limit, norm, poisoned_memory):
    """Row counts of no expert are those of a GEMM over all rows: filled up, rows beyond must not show."""
    case = Case(230, D=19, F=37, C=21, E=5, norm=norm, routing="skewed")
    t = inputs(case, dtype, "cpu")
    assert backends.choose(arguments(t | {"gate": None}, plan_of(case, "cpu"), norm=norm, gate=False)) is cpu
    exact = reference(case, t)
    found = run(case, t)
    with torch.no_grad():  # nothing is kept for backward: this is where pieces are cut
        inferred = call(case, t, plan_of(case, "cpu"))
    for result in (found, found | {"y": inferred}):
        for group, (_, largest) in errors(result, exact, expert_ids(case), case.E).items():
            assert largest < limit, group


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_is_clean(form, dtype):
    case = Case(9, D=6, F=5, E=3, C=4, gate=True, norm=True)
    t = leaves(inputs(case, dtype, "cpu"))
    call_ = arguments(t, plan_of(case, "cpu"), **form)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(operator.ffn, (*call_, True), test_utils=checks[: 3 if dtype == torch.bfloat16 else 4])


def test_plain_pytorch_keeps_on_a_gpu_what_the_kernels_would(monkeypatch):
    """Stops compiled code from being told other shapes than come back, where Triton is missing."""
    case = Case(33, C=7, norm=True, routing="dropped")
    t = {name: value.double() for name, value in inputs(case, torch.float64, "cpu").items()}
    expected = run(case, t)
    monkeypatch.setattr(plain.backend, "_together", lambda _: True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        found = run(case, t)
    assert (case.T, case.C + case.F) in [tuple(v.shape) for v in kept]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("norm", [False, True])
def test_eager_calls_equal_those_through_the_dispatcher(norm, monkeypatch):
    case = Case(300, D=16, F=24, E=3, C=16, norm=norm, routing="dropped")
    t = inputs(case, torch.float32, "cpu")
    direct = run(case, t)
    monkeypatch.setattr(operator, "unwatched", lambda _: False)
    for name, value in run(case, t).items():
        assert torch.equal(value, direct[name]), name


def test_any_subset_of_inputs_may_require_grad():
    case = Case(40, D=8, F=8, E=2, C=16, norm=True, routing="dropped")
    t = inputs(case, torch.float32, "cpu")
    everything, plan = run(case, t), plan_of(case, "cpu")
    names = [name for name in t if name != "dy"]
    for wanted in (c for n in (1, 2) for c in itertools.combinations(names, n)):
        part = {k: v.clone().requires_grad_(k in wanted) for k, v in t.items()}
        grads = torch.autograd.grad(call(case, part, plan), [part[n] for n in wanted], t["dy"])
        for name, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, everything["d" + name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_tokens_without_an_expert_hold_does_not_matter(dtype):
    """Stops nan times 0 from getting out of padding into the gradients of what all experts share."""
    case = Case(33, C=7, routing="dropped")
    t = inputs(case, dtype, "cpu")
    dropped_T1 = (expert_ids(case) < 0).all(1, keepdim=True)
    found = run(case, t | {"x": t["x"].masked_fill(dropped_T1, torch.nan)})
    assert dropped_T1.any()
    assert all(found[f"d{name}"].isfinite().all() for name in SHARED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_shared_weights_too(dtype):
    case = Case(9, C=8)
    t = leaves(inputs(case, torch.float32, "cpu"))
    with torch.autocast("cpu", dtype=dtype):
        y = call(case, t, plan_of(case, "cpu"))
    low = {name: value.detach().to(dtype) for name, value in t.items()}
    assert torch.equal(y, call(case, low, plan_of(case, "cpu")))
    grads = torch.autograd.grad(y.float().sum(), [t[name] for name in SHARED])
    assert all(grad.dtype == torch.float32 for grad in grads)


WRONG = {
    "three": (lambda w1, b1, w2: (w1, w2), TypeError, "shared must be three"),
    "kind": (lambda w1, b1, w2: (w1, b1, 3), TypeError, "shared's w2_DC must be"),
    "bias kind": (lambda w1, b1, w2: (w1, "b", w2), TypeError, "shared's b1_C must be"),
    "axes": (lambda w1, b1, w2: (w1[None], b1, w2), ValueError, r"shared\[0\] must have shape \[C, D\]"),
    "w2": (lambda w1, b1, w2: (w1, b1, w2.T), ValueError, r"shared\[2\] must have shape \(16, 8\)"),
    "no bias": (lambda w1, b1, w2: (w1, None, w2), ValueError, r"shared\[1\] and b1_EF must both be given"),
    "dtype": (lambda w1, b1, w2: (w1.half(), b1, w2), ValueError, r"shared\[0\] must have x_TD's dtype"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    change, error, words = WRONG[wrong]
    case = Case(9, C=8)
    t = inputs(case, torch.float32, "cpu")
    arguments_ = (t["x"], plan_of(case, "cpu"), t["w1"], t["b1"], t["w2"], t["b2"])
    with pytest.raises(error, match=words):
        moe_ffn(*arguments_, shared=change(*shared_of(t)))


def make_layer(**options):
    torch.manual_seed(0)
    router = HashRouter(hash_random_tables(1, 50, 4)[0], 4)
    return MoEFFN(8, 12, 4, num_shared=8, router=router, **options)


@pytest.mark.parametrize("options", [{}, {"norm_eps": 1e-5}, {"bias": False}])
@torch.no_grad()
def test_a_layer_is_one_with_copies_of_what_is_shared(options):
    """Cut as `python_ref.adaptation.tie_shared` does."""
    tied = make_layer(**options)
    copies = MoEFFN(8, 12, 4, router=tied.router, **options)
    shared, own = tie_shared(copies.w1_EFD, copies.bias1_EF, copies.w2_EDF, 8)
    names = ("w1_EFD", "bias1_EF", "w2_EDF"), ("shared_w1_CD", "shared_bias1_C", "shared_w2_DC")
    for name, of_own, shared_name, of_shared in zip(names[0], own, names[1], shared, strict=True):
        if of_own is None:
            continue
        getattr(copies, name)[(slice(None),) * (1 + (name == "w2_EDF")) + (slice(8),)] = of_shared
        getattr(tied, name).copy_(of_own)
        getattr(tied, shared_name).copy_(of_shared)
    for name in ("bias2_ED", "layernorm_weight_ED", "layernorm_bias_ED"):
        if getattr(tied, name) is not None:
            getattr(tied, name).copy_(getattr(copies, name))
    x, ids = torch.randn(3, 7, 8), torch.randint(50, (3, 7))
    torch.testing.assert_close(tied(x, input_ids=ids), copies(x, input_ids=ids))


def test_a_layer_trains_and_keeps_casts_of_all_its_weights():
    layer = make_layer(norm_eps=1e-5)
    x, ids = torch.randn(3, 7, 8), torch.randint(50, (3, 7))
    layer(x, input_ids=ids).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x, input_ids=ids)
        layer.keep_casts(torch.bfloat16)
        assert torch.equal(layer(x, input_ids=ids), expected)
    assert len(layer._kept[1]) == 7


@pytest.mark.parametrize("num_shared", [12, 13])
def test_experts_need_neurons_of_their_own(num_shared):
    with pytest.raises(ValueError, match=f"num_shared must be less than expert_size=12.* got {num_shared}"):
        MoEFFN(8, 12, 4, num_shared=num_shared)


@pytest.mark.slow
def test_compiles_whole():
    layer = make_layer(norm_eps=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9):
        x, ids = torch.randn(3, length, 8), torch.randint(50, (3, length))
        ours, theirs = layer(x, input_ids=ids), compiled(x, input_ids=ids)
        torch.testing.assert_close(ours, theirs)
        grads = (torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (ours, theirs))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
