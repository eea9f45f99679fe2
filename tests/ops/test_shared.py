"""Neurons that all experts share, stored once: operator and layer, against float64 and the untied form."""

import pytest
import torch

from moebert_kernels import HashRouter, MoEFFN, hash_random_tables
from moebert_kernels.kernels import torch as plain
from python_ref.adaptation import tie_shared
from tests.cases import SHARING, Case, expert_ids
from tests.kernels.checks import SHARED, call, check, inputs, plan_of, reference, run, shared_of


@pytest.mark.parametrize("case", SHARING, ids=str)
def test_float64_equals_the_reference(case):
    """Values and all gradients of the path in plain PyTorch."""
    t = inputs(case, torch.float64, "cpu")
    torch.testing.assert_close(run(case, t), reference(case, t))


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


def test_plain_pytorch_keeps_on_a_gpu_what_the_kernels_would(monkeypatch):
    """Stops compiled code from being told other shapes than come back, where Triton is missing."""
    case = Case(33, C=7, norm=True, routing="dropped")
    t = inputs(case, torch.float64, "cpu")
    expected = run(case, t)
    monkeypatch.setattr(plain.backend, "_together", lambda _: True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        found = run(case, t)
    assert (case.T, case.C + case.F) in [tuple(v.shape) for v in kept]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_tokens_without_an_expert_hold_does_not_matter(dtype):
    """Stops nan times 0 from getting out of padding into the gradients of what all experts share."""
    case = Case(33, C=7, routing="dropped")
    t = inputs(case, dtype, "cpu")
    dropped_T1 = (expert_ids(case) < 0).all(1, keepdim=True)
    found = run(case, t | {"x": t["x"].masked_fill(dropped_T1, torch.nan)})
    assert dropped_T1.any()
    assert all(found[f"d{name}"].isfinite().all() for name in SHARED)


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
    with pytest.raises(error, match=words):
        call(case, t, plan_of(case, "cpu"), shared=change(*shared_of(t)))


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
    copies.w1_EFD[:, :8], copies.w2_EDF[:, :, :8] = shared[0], shared[2]
    if copies.bias1_EF is not None:
        copies.bias1_EF[:, :8] = shared[1]
    state = copies.state_dict() | dict(zip(("w1_EFD", "bias1_EF", "w2_EDF"), own, strict=True))
    state |= zip(("shared_w1_CD", "shared_bias1_C", "shared_w2_DC"), shared, strict=True)
    tied.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
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
        grads = [torch.autograd.grad(y.square().sum(), list(layer.parameters())) for y in (ours, theirs)]
        torch.testing.assert_close(*grads)
