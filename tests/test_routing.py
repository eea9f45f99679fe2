"""Plans, tables and routers against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import library

import python_ref.routing as ref
from moebert_kernels.routing import (
    HashRouter,
    RoutingPlan,
    SentenceGate,
    TokenGate,
    builder,
    hash_balance_tables,
    hash_random_tables,
    load_balance_loss,
)


@st.composite
def expert_ids(draw):
    num_experts = draw(st.integers(1, 9))
    tokens = draw(st.sampled_from([0, 1, 2, 7, 31, 64, 65]))
    top_k = draw(st.integers(1, min(3, num_experts)))
    seed = draw(st.integers(0, 2**31))
    low = draw(st.sampled_from([-1, 0]))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, num_experts, (tokens, top_k), generator=generator)
    return ids, num_experts


@given(expert_ids(), st.sampled_from([torch.int32, torch.int64, torch.int16]))
def test_plan_is_the_stable_sort_of_the_reference(case, dtype):
    ids, num_experts = case
    plan = RoutingPlan.from_expert_ids(ids.to(dtype), num_experts)
    order, inverse, counts, offsets = ref.sort_by_expert(ids, num_experts)
    assert torch.equal(plan.order_S.long(), order)
    assert torch.equal(plan.inverse_S.long(), inverse)
    assert torch.equal(plan.counts_E.long(), counts)
    assert torch.equal(plan.offsets_E1.long(), offsets)
    assert torch.equal(plan.expert_ids_TK.long(), ids)
    assert (plan.num_tokens, plan.top_k, plan.num_experts) == (*ids.shape, num_experts)


def test_plan_of_a_hand_worked_batch():
    plan = RoutingPlan.from_expert_ids(torch.tensor([2, 0, -1, 2, 0]), num_experts=4)
    assert plan.order_S.tolist() == [1, 4, 0, 3, 2]
    assert plan.inverse_S.tolist() == [2, 0, 4, 3, 1]
    assert plan.offsets_E1.tolist() == [0, 2, 2, 4, 4]
    assert plan.counts_E.tolist() == [2, 0, 2, 0]
    assert all(t.dtype == torch.int32 for t in (plan.order_S, plan.inverse_S, plan.offsets_E1))


def test_plans_of_all_layers_equal_one_plan_per_layer():
    tables_LV = hash_random_tables(3, 50, 4, seed=1)
    input_ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    plans = RoutingPlan.from_input_ids(input_ids, tables_LV, 4, mask)
    assert len(plans) == 3
    for plan, table_V in zip(plans, tables_LV, strict=True):
        ids_T1 = ref.hash_expert_ids(input_ids.reshape(-1), table_V.long(), mask.reshape(-1).bool())
        alone = RoutingPlan.from_expert_ids(ids_T1, 4)
        assert torch.equal(plan.order_S, alone.order_S)
        assert torch.equal(plan.offsets_E1, alone.offsets_E1)
        assert torch.equal(plan.expert_ids_TK, alone.expert_ids_TK)


TABLES = torch.zeros(1, 7, dtype=torch.int32)
from_expert_ids, from_input_ids = RoutingPlan.from_expert_ids, RoutingPlan.from_input_ids


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: from_expert_ids(torch.tensor([0, 4]), 4), ValueError, "expert_ids.*from 0 to 4"),
        (lambda: from_expert_ids(torch.tensor([-2, 1]), 4), ValueError, "expert_ids.*from -2"),
        (lambda: from_expert_ids(torch.tensor([0.0]), 4), TypeError, "expert_ids.*float32"),
        (lambda: from_expert_ids(torch.zeros(1, 1, 1).int(), 4), ValueError, "shape"),
        (lambda: from_expert_ids(torch.tensor([0]), 0), ValueError, "num_experts.*0"),
        (
            lambda: from_expert_ids(torch.zeros(8, 128).long(), 4),  # [batch, sequence]
            ValueError,
            r"expert_ids.*at most num_experts=4.*\(8, 128\).*flatten batch and sequence",
        ),
        (lambda: from_expert_ids([0, 1, 2], 4), TypeError, "expert_ids.*tensor, got list"),
        (lambda: from_input_ids(torch.tensor([0]), [[0]], 4), TypeError, "tables_LV.*tensor, got list"),
        (lambda: hash_random_tables(1, 100, 0), ValueError, "num_experts must be at least 1, got 0"),
        (lambda: hash_random_tables(0, 100, 4), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: hash_random_tables(1, -1, 4), ValueError, "vocab_size must be at least 0, got -1"),
        (lambda: hash_balance_tables(1, torch.ones(9), 0), ValueError, "num_experts must be at least 1"),
        (lambda: hash_balance_tables(0, torch.ones(9), 4), ValueError, "num_layers must be at least 1"),
        (lambda: from_input_ids(torch.tensor([7]), TABLES, 4), ValueError, r"input_ids.*\[0, 7\).*7"),
        (lambda: from_input_ids(torch.tensor([1, 2]), TABLES, 4, torch.ones(3).bool()), ValueError, "mask"),
        (
            lambda: from_input_ids(torch.tensor([1, 2]), TABLES, 4, torch.tensor([0.0, -1e4])),
            TypeError,
            "mask must be bool or integer",
        ),
    ],
)
def test_bad_routing_is_refused_with_the_argument_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_random_tables_depend_on_the_seed_alone():
    """The authors' code drew tables from the global generator, so that a reload routed at random."""
    torch.manual_seed(0)
    first = hash_random_tables(2, 1000, 4, seed=3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, hash_random_tables(2, 1000, 4, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, hash_random_tables(2, 1000, 4, seed=4))
    assert not torch.equal(first[0], first[1])
    assert torch.bincount(first[0], minlength=4).min() > 200


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 6))
def test_balanced_tables_equal_the_reference(counts, num_experts):
    counts_V = torch.tensor(counts)
    tables_LV = hash_balance_tables(2, counts_V, num_experts)
    assert torch.equal(tables_LV[0].long(), ref.hash_balance_table(counts_V, num_experts))
    assert torch.equal(tables_LV[0], tables_LV[1])


def gate(kind, num_experts, top_k):
    torch.manual_seed(0)
    return kind(6, num_experts, top_k, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    ("kind", "reference"), [(TokenGate, ref.gate_token), (SentenceGate, ref.gate_sentence)]
)
def test_gates_equal_the_reference(kind, reference, top_k):
    router = gate(kind, 4, top_k)
    x_BSD = torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    out = router(x_BSD, mask_BS=mask_BS)
    ids_TK, gate_TK, probs_TE = reference(x_BSD, router.gate.weight, top_k, mask_BS.bool())
    assert torch.equal(out.plan.expert_ids_TK.long(), ids_TK)
    torch.testing.assert_close(out.gate_TK, gate_TK)
    expected = ref.load_balance_loss(probs_TE, ids_TK, mask_BS.bool().reshape(-1))
    torch.testing.assert_close(out.balance_loss, expected)
    torch.testing.assert_close(load_balance_loss(probs_TE, ids_TK), expected)


def test_a_sentence_is_gated_alike_alone_and_in_a_batch():
    """The authors' gate-sentence skipped the probability at batch size 1."""
    router = gate(SentenceGate, 4, 1)
    x_BSD = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask_BS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch, alone = router(x_BSD, mask_BS=mask_BS), router(x_BSD[:1, :3])
    torch.testing.assert_close(batch.gate_TK[:3], alone.gate_TK)
    assert torch.equal(batch.plan.expert_ids_TK[:3], alone.plan.expert_ids_TK)


@pytest.mark.parametrize("kind", [TokenGate, SentenceGate])
def test_padding_reaches_no_expert_and_no_loss_whatever_it_holds(kind):
    router = gate(kind, 4, 1)
    x_BSD = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask_BS = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    clean = router(x_BSD, mask_BS=mask_BS)
    x_BSD[0, 2:] = float("nan")
    poisoned = router(x_BSD, mask_BS=mask_BS)
    assert poisoned.plan.expert_ids_TK[2:4].eq(-1).all()
    assert torch.equal(clean.plan.order_S, poisoned.plan.order_S)
    torch.testing.assert_close(clean.balance_loss, poisoned.balance_loss)
    torch.testing.assert_close(clean.gate_TK, poisoned.gate_TK)


def test_the_balance_loss_is_one_when_balanced_and_trains_the_gate():
    probs_TE = torch.full((8, 4), 0.25, requires_grad=True)
    ids_TK = torch.arange(8).remainder(4).unsqueeze(1)
    loss = load_balance_loss(probs_TE, ids_TK)
    assert loss.item() == pytest.approx(1.0)
    collapsed = load_balance_loss(torch.eye(4)[torch.zeros(8, dtype=torch.long)], torch.zeros(8, 1).long())
    assert collapsed.item() == pytest.approx(4.0)
    loss.backward()
    assert probs_TE.grad.abs().sum() > 0


def test_hash_router_keeps_its_table_in_the_state_dict_and_needs_ids():
    table_V = hash_random_tables(1, 20, 4)[0]
    router = HashRouter(table_V, 4)
    assert torch.equal(router.state_dict()["table_V"], table_V)
    with pytest.raises(ValueError, match="input_ids"):
        router(torch.zeros(1, 3, 8), None)
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        HashRouter(torch.tensor([0, 2]), 2)


def test_a_table_of_too_many_experts_is_not_loaded():
    """It was, and the tokens it sent to missing experts got zeros without a word."""
    router = HashRouter(torch.tensor([0, 1, 2, 3]), 4)
    before = router.table_V.clone()
    with pytest.raises(RuntimeError, match=r"table_V must name experts in \[0, 4\), found 1 to 7"):
        router.load_state_dict(HashRouter(torch.tensor([7, 1, 2, 3]), 8).state_dict())
    assert torch.equal(router.table_V, before)
    router.load_state_dict(HashRouter(torch.tensor([3, 1, 2, 0]), 8).state_dict())
    assert router.table_V.tolist() == [3, 1, 2, 0]


def test_plans_do_not_depend_on_the_native_extension(monkeypatch):
    ids = torch.randint(-1, 5, (37, 2), generator=torch.Generator().manual_seed(0))
    tables_LV = hash_random_tables(3, 50, 5)
    input_ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = input_ids > 10

    def build():
        return [
            RoutingPlan.from_expert_ids(ids, 5),
            *RoutingPlan.from_input_ids(input_ids, tables_LV, 5, mask),
        ]

    with_extension = build()
    monkeypatch.setattr(builder.native_plans, "from_expert_ids", lambda *args: None)
    monkeypatch.setattr(builder.native_plans, "from_input_ids", lambda *args: None)
    for a, b in zip(with_extension, build(), strict=True):
        for name in ("expert_ids_TK", "order_S", "inverse_S", "offsets_E1"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_the_id_of_a_padding_token_may_be_anything():
    input_ids, mask = torch.tensor([[3, -100, 999]]), torch.tensor([[1, 0, 0]])
    (plan,) = RoutingPlan.from_input_ids(input_ids, hash_random_tables(1, 50, 4), 4, mask)
    assert plan.expert_ids_TK[1:].eq(-1).all()
    assert plan.expert_ids_TK[0] >= 0


def test_plan_operators_pass_opcheck():
    library.opcheck(builder.plan_from_expert_ids, (torch.tensor([[1, -1, 0, 3]]), 4))
    tables_LV, mask_T = hash_random_tables(2, 50, 4), torch.tensor([True, False, True])
    library.opcheck(builder.plan_from_input_ids, (torch.tensor([4, 7, 9]), tables_LV, mask_T, 4))
