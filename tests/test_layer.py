"""MoEFFN as a layer of somebody's own model."""

import copy

import pytest
import torch
from torch import nn

from moebert_kernels import HashRouter, MoEFFN, RoutingPlan, SentenceGate, TokenGate, hash_random_tables


def dense_ffn(D, F, norm_eps=None):
    torch.manual_seed(0)
    return nn.Linear(D, F), nn.Linear(F, D), nn.LayerNorm(D, eps=norm_eps or 1e-5)


@pytest.mark.parametrize("norm_eps", [None, 1e-12])
def test_experts_that_are_all_the_dense_ffn_are_the_dense_ffn(norm_eps):
    fc1, fc2, norm = dense_ffn(8, 16, norm_eps)
    table_V = hash_random_tables(1, 50, 4)[0]
    ffn = MoEFFN(8, 16, 4, router=HashRouter(table_V, 4), norm_eps=norm_eps)
    with torch.no_grad():
        for e in range(4):
            for ours, theirs in ((ffn.w1_EFD, fc1.weight), (ffn.b1_EF, fc1.bias)):
                ours[e] = theirs
            for ours, theirs in ((ffn.w2_EDF, fc2.weight), (ffn.b2_ED, fc2.bias)):
                ours[e] = theirs
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
    for p in (ffn.w1_EFD, ffn.w2_EDF, ffn.ln_w_ED):
        per_expert = p.grad.abs().flatten(1).sum(1)
        assert torch.equal(per_expert > 0, used)


def test_state_dict_round_trip_brings_the_routing_along():
    """The authors' tables were not saved: a reloaded model routed at random."""
    make = lambda seed: MoEFFN(8, 6, 4, router=HashRouter(hash_random_tables(1, 50, 4, seed=seed)[0], 4))  # noqa: E731
    first, second = make(0), make(1)
    x, input_ids = torch.randn(2, 5, 8), torch.randint(0, 50, (2, 5))
    assert not torch.equal(first(x, input_ids=input_ids), second(x, input_ids=input_ids))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, input_ids=input_ids), second(x, input_ids=input_ids))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    ffn = MoEFFN(8, 6, 2, dropout=0.5)
    x, plan = torch.randn(10, 8), RoutingPlan.from_expert_ids(torch.zeros(10, dtype=torch.long), 2)
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
    with pytest.raises(ValueError, match="expert_size must be at least 1, got 0"):
        MoEFFN(8, 0, 2)
    with pytest.raises(ValueError, match="activation must be one of"):
        MoEFFN(8, 6, 2, activation="geluu")
    with pytest.raises(ValueError, match=r"top_k must lie in \[1, num_experts=4\], got 5"):
        TokenGate(8, 4, top_k=5)
    with pytest.raises(ValueError, match="no router"):
        MoEFFN(8, 6, 2)(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"hidden_size=8, got shape \(3, 7\)"):
        MoEFFN(8, 6, 2)(torch.zeros(3, 7), routing=RoutingPlan.from_expert_ids(torch.zeros(3).long(), 2))
