import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebert_kernels.compress.affinity import alternate, split_by_affinity
from moebert_kernels.compress.assignment import assign, loads, total_value
from moebert_kernels.compress.importance import Importance
from moebert_kernels.compress.token_scores import TokenScores, group_tokens
from moebert_kernels.errors import UserError
from moebert_kernels.routing import hash_balance_tables
from python_ref import affinity as ref

# Whole numbers, so that sums are exact in every order and ties fall the same way everywhere.
SCORES = st.integers(0, 40)


def whole_numbers(data, *shape, most=40):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    return torch.randint(most + 1, shape, generator=generator).double()


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


@settings(max_examples=150, derandomize=True, deadline=None)
@given(problems())
def test_the_alternation_equals_the_reference(problem):
    scores_GF, counts_G, importance_F, start_G, sizes = problem
    index_EF, expert_G, history = alternate(scores_GF, counts_G, importance_F, start_G, **sizes)
    expected = ref.alternate(scores_GF, counts_G, importance_F, start_G, **sizes)
    assert torch.equal(index_EF, expected[0])
    assert torch.equal(expert_G, expected[1])
    assert history == expected[2]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(problems())
def test_more_is_captured_every_round_within_the_capacity(problem):
    scores_GF, counts_G, importance_F, start_G, sizes = problem
    index_EF, expert_G, history = alternate(scores_GF, counts_G, importance_F, start_G, **sizes)
    assert all(later > earlier for earlier, later in zip(history, history[1:], strict=False))
    assert int(loads(expert_G, counts_G, sizes["num_experts"]).max()) <= sizes["capacity"]
    captured_GE = ref.captured_scores(scores_GF, index_EF)
    assert total_value(captured_GE, expert_G) == history[-1]
    shared = importance_F.argsort(descending=True, stable=True)[: sizes["num_shared"]].tolist()
    for index_F in index_EF.tolist():
        assert index_F[: len(shared)] == shared
        assert len(set(index_F)) == sizes["expert_size"]
