"""MoEFFN as a layer of somebody's own model."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moebert_kernels import HashRouter, MoEFFN, RoutingPlan, SentenceGate, TokenGate, hash_random_tables
from tests.former_names import under_former_names


def dense_ffn(D, F, norm_eps=None):
    torch.manual_seed(0)
    return nn.Linear(D, F), nn.Linear(F, D), nn.LayerNorm(D, eps=norm_eps or 1e-5)


@pytest.mark.parametrize("norm_eps", [None, 1e-12])
def test_experts_that_are_all_the_dense_ffn_are_the_dense_ffn(norm_eps):
    fc1, fc2, norm = dense_ffn(8, 16, norm_eps)
    table_V = hash_random_tables(1, 50, 4)[0]
    ffn = MoEFFN(8, 16, 4, router=HashRouter(table_V, 4), norm_eps=norm_eps)
    with torch.no_grad():
        for weights, biases, layer in ((ffn.w1_EFD, ffn.bias1_EF, fc1), (ffn.w2_EDF, ffn.bias2_ED, fc2)):
            weights[:], biases[:] = layer.weight, layer.bias
    x, input_ids = torch.randn(2, 5, 8), torch.randint(0, 50, (2, 5))
    expected = fc2(nn.functional.gelu(fc1(x)))
    if norm_eps is not None:
        expected = norm(expected + x)
    torch.testing.assert_close(ffn(x, input_ids=input_ids), expected)


@pytest.mark.parametrize("make_router", [lambda: TokenGate(8, 4, 2), lambda: SentenceGate(8, 4)])
def test_learned_gates_train(make_router):
    torch.manual_seed(0)
    ffn = MoEFFN(8, 6, 4, router=make_router(), norm_eps=1e-12, dropout=0.1)
    x = torch.randn(3, 5, 8, requires_grad=True)
    routing = ffn.route(x)
    loss = ffn(x, routing=routing).square().mean() + 0.1 * routing.balance_loss
    loss.backward()
    assert ffn.router.gate.weight.grad.abs().sum() > 0
    used = routing.plan.counts_E > 0
    for p in (ffn.w1_EFD, ffn.w2_EDF, ffn.layernorm_weight_ED):
        per_expert = p.grad.abs().flatten(1).sum(1)
        assert torch.equal(per_expert > 0, used)


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    extra=st.integers(0, 5),
    top_k=st.integers(1, 3),
    norm_eps=st.sampled_from([None, 1e-12]),
    seed=st.integers(0, 99),
)
def test_a_sentence_gate_acts_and_learns_alike_alone_and_in_a_batch(lengths, extra, top_k, norm_eps, seed):
    """The authors' gate-sentence left its probability out at batch size 1, and its gradient with it."""
    torch.manual_seed(seed)
    ffn = MoEFFN(8, 6, 4, router=SentenceGate(8, 4, top_k), norm_eps=norm_eps).double()
    x_BSD = torch.randn(len(lengths), max(lengths) + extra, 8, dtype=torch.float64)
    dy_BSD = torch.randn_like(x_BSD)
    real_BS = torch.arange(x_BSD.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    gate_ED = ffn.router.gate.weight

    y_BSD = ffn(x_BSD, mask=real_BS)
    (in_batch_ED,) = torch.autograd.grad((y_BSD * dy_BSD)[real_BS].sum(), gate_ED)
    alone_ED = torch.zeros_like(gate_ED)
    for row, length in enumerate(lengths):
        y_1SD = ffn(x_BSD[row : row + 1, :length])
        torch.testing.assert_close(y_1SD[0], y_BSD[row, :length])
        (row_ED,) = torch.autograd.grad((y_1SD[0] * dy_BSD[row, :length]).sum(), gate_ED)
        assert bool(row_ED.abs().sum() > 0)
        alone_ED += row_ED
    torch.testing.assert_close(in_batch_ED, alone_ED)


def test_state_dict_round_trip_brings_the_routing_along():
    """The authors' tables were not saved: a reloaded model routed at random."""
    tables = (hash_random_tables(1, 50, 4, seed=seed)[0] for seed in (0, 1))
    first, second = (MoEFFN(8, 6, 4, router=HashRouter(table_V, 4)) for table_V in tables)
    x, input_ids = torch.randn(2, 5, 8), torch.randint(0, 50, (2, 5))
    assert not torch.equal(first(x, input_ids=input_ids), second(x, input_ids=input_ids))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, input_ids=input_ids), second(x, input_ids=input_ids))


@pytest.mark.parametrize("norm_eps", [None, 1e-12])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_with_former_names_load(norm_eps, bias):
    saved, wrapped = (
        nn.Sequential(nn.Linear(8, 8), MoEFFN(8, 6, 2, norm_eps=norm_eps, bias=bias)) for _ in range(2)
    )
    state = saved.state_dict()
    former = under_former_names(state)
    assert (former.keys() == state.keys()) == (norm_eps is None and not bias)
    wrapped.load_state_dict(former, strict=True)
    torch.testing.assert_close(wrapped.state_dict(), state, rtol=0, atol=0)
    if bias:
        former["1.b1_EF"] = torch.zeros(2, 5)
        with pytest.raises(RuntimeError, match=r"size mismatch for 1\.bias1_EF"):
            wrapped.load_state_dict(former)
        with pytest.raises(RuntimeError, match=r"Unexpected key.* \"1\.b1_EF\""):
            wrapped.load_state_dict({**state, "1.b1_EF": torch.zeros(2, 6)})


def a_plan(num_tokens):
    return RoutingPlan.from_expert_ids(torch.zeros(num_tokens, dtype=torch.long), 2)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    ffn = MoEFFN(8, 6, 2, dropout=0.5)
    x, plan = torch.randn(10, 8), a_plan(10)
    assert not torch.equal(ffn(x, routing=plan), ffn(x, routing=plan))
    ffn.eval()
    assert torch.equal(ffn(x, routing=plan), ffn(x, routing=plan))


def test_it_can_be_copied_moved_and_made_on_meta():
    ffn = MoEFFN(8, 6, 2, router=HashRouter(hash_random_tables(1, 9, 2)[0], 2), norm_eps=1e-6)
    twin = copy.deepcopy(ffn).double()
    assert twin.w1_EFD.dtype == torch.float64
    assert twin.router.table_V.dtype == torch.int32
    assert MoEFFN(8, 6, 2, device="meta").w1_EFD.is_meta


def test_wrong_use_is_refused():
    for router in (TokenGate(8, 2), HashRouter(torch.tensor([0, 1]), 2)):
        with pytest.raises(ValueError, match="router is for 2 experts, but num_experts is 4"):
            MoEFFN(8, 6, 4, router=router)
    for router in (TokenGate(16, 4), SentenceGate(16, 4)):
        with pytest.raises(ValueError, match="router is for hidden_size=16, but hidden_size is 8"):
            MoEFFN(8, 6, 4, router=router)
    with pytest.raises(ValueError, match="expert_size must be at least 1, got 0"):
        MoEFFN(8, 0, 2)
    with pytest.raises(ValueError, match="activation must be one of"):
        MoEFFN(8, 6, 2, activation="geluu")
    with pytest.raises(ValueError, match=r"top_k must lie in \[1, num_experts=4\], got 5"):
        TokenGate(8, 4, top_k=5)
    with pytest.raises(ValueError, match="no router"):
        MoEFFN(8, 6, 2)(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"x must have values.*meta device"), torch.autocast("cpu"):
        MoEFFN(8, 6, 2, device="meta")(torch.zeros(3, 8, device="meta"), routing=a_plan(3))
    with pytest.raises(ValueError, match=r"hidden_size=8, got shape \(3, 7\)"):
        MoEFFN(8, 6, 2)(torch.zeros(3, 7), routing=a_plan(3))


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ((a_plan(3),) * 2, "got a tuple of length 2; RoutingPlan.from_input_ids gives one plan per layer"),
        ("hash-random", "got str"),
        (torch.zeros(3).long(), "got Tensor"),
    ],
)
def test_what_is_no_routing_is_refused(routing, words):
    """The plans of all layers ended in an AttributeError, or ran with the second as the first's gate."""
    with pytest.raises(TypeError, match=f"routing must be a RoutingPlan or a RouterOutput, {words}"):
        MoEFFN(8, 6, 2)(torch.zeros(3, 8), routing=routing)


@pytest.mark.parametrize("name", ["input_ids", "mask"])
@pytest.mark.parametrize("router", [HashRouter(torch.zeros(9).long(), 2), TokenGate(8, 2)])
def test_what_the_router_reads_must_have_the_shape_of_x(name, router):
    """Ids of another shape were said to be an `x_TD` that does not fit the plan, or went unread."""
    ffn, x = MoEFFN(8, 6, 2, router=router), torch.zeros(2, 5, 8)
    given = {"input_ids": torch.zeros(2, 5).long(), name: torch.zeros(2, 4).long()}
    words = rf"{name} must have the leading shape of x, \(2, 5\), got \(2, 4\)"
    for call in (ffn, ffn.route):
        with pytest.raises(ValueError, match=words):
            call(x, **given)


@pytest.mark.parametrize("name", ["input_ids", "mask"])
def test_routing_and_what_the_router_reads_are_one_too_many(name):
    ffn = MoEFFN(8, 6, 2, router=TokenGate(8, 2))
    with pytest.raises(ValueError, match=f"{name} goes to the router, which routing replaces"):
        ffn(torch.zeros(3, 8), routing=a_plan(3), **{name: torch.ones(3).long()})
