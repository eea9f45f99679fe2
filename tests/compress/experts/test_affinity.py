import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebert_kernels.compress.experts.affinity import alternate, split_by_affinity
from moebert_kernels.compress.experts.assignment import assign, loads, total_value
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.scoring.token_scores import TokenScores
from moebert_kernels.errors import UserError
from moebert_kernels.routing import hash_balance_tables
from python_ref import affinity as ref
from tests.compress.toys import Progress

# Whole numbers, so that sums are exact in every order and ties fall the same way everywhere.


@st.composite
def problems(draw):
    """(scores_GF, counts_G, importance_F, start_G, sizes with capacity) of one layer."""
    num_experts = draw(st.integers(1, 4))
    groups, width = draw(st.integers(1, 12)), draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scores_GF = torch.randint(draw(st.sampled_from([2, 40])), (groups, width), generator=generator).double()
    counts_G = torch.randint(draw(st.sampled_from([2, 9, 60])), (groups,), generator=generator)
    start_G = hash_balance_tables(1, counts_G, num_experts)[0].long()
    expert_size = draw(st.integers(1, width))
    sizes = {
        "num_experts": num_experts,
        "expert_size": expert_size,
        "num_shared": draw(st.integers(0, expert_size)),
        "capacity": int(loads(start_G, counts_G, num_experts).max()) + draw(st.integers(0, 10)),
    }
    importance_F = torch.randint(20, (width,), generator=generator).double()
    return scores_GF, counts_G, importance_F, start_G, sizes


@settings(max_examples=50)
@given(problems())
def test_the_alternation_is_the_references_and_captures_more_every_round(problem):
    scores_GF, counts_G, importance_F, start_G, sizes = problem
    index_EF, expert_G, history = alternate(scores_GF, counts_G, importance_F, start_G, **sizes)
    expected = ref.alternate(scores_GF, counts_G, importance_F, start_G, **sizes)
    assert torch.equal(index_EF, expected[0])
    assert torch.equal(expert_G, expected[1])
    assert history == expected[2]
    assert all(later > earlier for earlier, later in itertools.pairwise(history))
    assert int(loads(expert_G, counts_G, sizes["num_experts"]).max()) <= sizes["capacity"]
    captured_GE = ref.captured_scores(scores_GF, index_EF)
    assert total_value(captured_GE, expert_G) == history[-1]
    shared = importance_F.argsort(descending=True, stable=True)[: sizes["num_shared"]].tolist()
    for index_F in index_EF.tolist():
        assert index_F[: len(shared)] == shared
        assert len(set(index_F)) == sizes["expert_size"]


def test_assignment_comes_near_the_best_of_all():
    """The prices alone leave room behind heavy items; the passes after them have to fill it."""
    found = best_of_all = 0.0
    for seed in range(15):
        generator = torch.Generator().manual_seed(seed)
        value_GE = torch.rand(7, 3, generator=generator, dtype=torch.float64)
        weight_G = torch.randint(1, 10, (7,), generator=generator)
        start_G = hash_balance_tables(1, weight_G, 3)[0].long()
        capacity = int(loads(start_G, weight_G, 3).max()) + 1
        every = torch.cartesian_prod(*[torch.arange(3)] * 7)
        fits = torch.stack([loads(bin_G, weight_G, 3).max() <= capacity for bin_G in every])
        best_of_all += max(total_value(value_GE, bin_G) for bin_G in every[fits])
        bin_G = assign(value_GE, weight_G, capacity, start_G)
        assert int(loads(bin_G, weight_G, 3).max()) <= capacity
        assert total_value(value_GE, bin_G) >= total_value(value_GE, start_G)
        found += total_value(value_GE, bin_G)
    assert found > 0.97 * best_of_all


def test_without_a_capacity_that_binds_every_item_is_where_it_is_worth_most():
    value_GE = torch.rand(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start_G = torch.zeros(50, dtype=torch.int64)
    assert torch.equal(assign(value_GE, torch.ones(50).long(), 50, start_G), value_GE.argmax(1))


def make_importance(num_layers=3, num_groups=200, width=24, vocab_size=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores_LGF = torch.rand(num_layers, num_groups, width, generator=generator) ** 4
    group_V = torch.randint(num_groups, (vocab_size,), generator=generator)
    group_V[:num_groups] = torch.arange(num_groups)
    counts_V = (1000 / torch.arange(1, vocab_size + 1)).long()
    return Importance(scores_LGF.sum(1), "m", "t", 1, TokenScores(scores_LGF, group_V)), counts_V


SIZES = {"num_experts": 4, "expert_size": 8, "num_shared": 3}


def test_a_split_routes_every_id_shares_neurons_and_keeps_loads():
    (importance, counts_V), done = make_importance(), Progress()
    split = split_by_affinity(importance, counts_V, **SIZES, max_load=1.15, progress=done)
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert split.tables_LV.shape == (3, 300)
    assert split.tables_LV.dtype == torch.int32
    assert split.index_LEF.shape == (3, 4, 8)
    group_V = importance.tokens.group_V
    for layer, table_V in enumerate(split.tables_LV.long()):
        assert torch.equal(table_V, table_V[:200][group_V])
        shares_E = loads(table_V, counts_V, 4) / counts_V.sum()
        torch.testing.assert_close(split.loads_LE[layer], shares_E)
        # The most frequent id is a sixth of all tokens: 1.15 times the mean can be kept.
        assert float(shares_E.max()) <= 1.15 / 4
        shared = importance.scores_LF[layer].argsort(descending=True)[:3]
        assert torch.equal(split.index_LEF[layer, :, :3], shared.expand(4, 3))
        scores_GF = importance.tokens.scores_LGF[layer].double()
        captured_GE = ref.captured_scores(scores_GF, split.index_LEF[layer])
        total = total_value(captured_GE, table_V[:200]) / float(scores_GF.sum())
        assert split.captured_LR[layer][-1] == pytest.approx(total, rel=1e-5)
        assert split.captured_LR[layer] == sorted(set(split.captured_LR[layer]))
        assert len(split.captured_LR[layer]) > 1


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    importance, counts_V = make_importance(num_layers=1, num_groups=60, vocab_size=90)
    state = torch.get_rng_state()
    first, again, other = (split_by_affinity(importance, counts_V, **SIZES, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.tables_LV, again.tables_LV)
    assert torch.equal(first.index_LEF, again.index_LEF)
    assert not torch.equal(first.tables_LV, other.tables_LV)


def test_an_id_heavier_than_the_largest_load_is_alone_with_its_expert():
    importance, counts_V = make_importance()
    counts_V[7] = 10 * counts_V.sum()
    counts_V[counts_V == 0] = 1
    split = split_by_affinity(importance, counts_V, **SIZES)
    for table_V in split.tables_LV:
        assert torch.equal(table_V == table_V[7], importance.tokens.group_V == 7)


def test_experts_that_see_no_scores_take_the_most_important_neurons():
    """A classifier's last layer has gradients at [CLS] alone: other experts took the lowest indices."""
    scores_LGF = torch.zeros(1, 6, 10)
    scores_LGF[0, 0] = torch.arange(10.0)
    importance_LF = torch.tensor([[3.0, 9, 1, 8, 7, 2, 6, 5, 4, 0]])
    importance = Importance(importance_LF, "m", "t", 1, TokenScores(scores_LGF, torch.arange(6)))
    split = split_by_affinity(importance, torch.ones(6).long(), num_experts=2, expert_size=4, num_shared=1)
    expert = int(split.tables_LV[0, 0])
    assert split.index_LEF[0, expert].tolist() == [1, 9, 8, 7]
    assert split.index_LEF[0, 1 - expert].tolist() == [1, 3, 4, 6]


def test_what_affinity_needs_is_named():
    importance, counts_V = make_importance()
    with pytest.raises(UserError, match="needs importance with token scores"):
        split_by_affinity(Importance(importance.scores_LF, "m", "t", 1), counts_V, **SIZES)
    with pytest.raises(UserError, match=r"vocabulary of 300, the token counts for one of \(299,\)"):
        split_by_affinity(importance, counts_V[1:], **SIZES)
    with pytest.raises(ValueError, match=r"max_load must be at least 1, got 0\.9"):
        split_by_affinity(importance, counts_V, **SIZES, max_load=0.9)
