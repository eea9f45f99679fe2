"""python_ref.adaptation: the split by hand, its invariants, and what it does to the function computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_ref.adaptation import adapt_ffn, split_neurons
from python_ref.ffn import dense_ffn, moe_ffn
from tests.reference.draws import randn


def random_ffn(hidden: int, neurons: int) -> tuple[torch.Tensor, ...]:
    shapes = [(neurons, hidden), (neurons,), (hidden, neurons), (hidden,)]
    return tuple(randn(*shape, seed=seed) for seed, shape in enumerate(shapes))


def test_split_by_hand():
    # In order: 1 6 | 3 7 4 2 5 0. Expert 0 is dealt 3, 4, 5 and expert 1 7, 2, 0; each has room for two.
    importance = torch.tensor([1.0, 9.0, 3.0, 7.0, 5.0, 2.0, 8.0, 6.0])
    assert split_neurons(importance, 2, 4, 2).tolist() == [[1, 6, 3, 4], [1, 6, 7, 2]]


def test_ties_stay_in_order_of_index():
    assert split_neurons(torch.ones(50), 2, 3, 1).tolist() == [[0, 1, 3], [0, 2, 4]]


def test_a_rest_that_does_not_divide_is_cut_evenly():
    """Stops the authors' ragged array: 7 neurons dealt to 3 experts are 3, 2 and 2."""
    importance = torch.arange(8, 0, -1)
    assert split_neurons(importance, 3, 3, 1).tolist() == [[0, 1, 4], [0, 2, 5], [0, 3, 6]]


def test_all_shared_and_none_shared():
    importance = torch.arange(6, 0, -1)
    assert split_neurons(importance, 3, 2, 2).tolist() == [[0, 1]] * 3
    assert split_neurons(importance, 3, 2, 0).tolist() == [[0, 3], [1, 4], [2, 5]]


@given(
    experts=st.integers(1, 5),
    own=st.integers(0, 6),
    shared=st.integers(0, 6),
    spare=st.integers(0, 9),
    levels=st.integers(1, 30),
)
def test_experts_hold_the_most_important_neurons_and_share_only_the_shared(
    experts: int, own: int, shared: int, spare: int, levels: int
):
    used = experts * own + shared
    importance = torch.randint(levels, (used + spare,), generator=torch.Generator().manual_seed(levels))
    index = split_neurons(importance.double(), experts, own + shared, shared)
    assert index.shape == (experts, own + shared)
    by_importance = sorted(range(used + spare), key=lambda j: -importance[j])  # stable
    rows = index.tolist()
    for row in rows:
        assert row[:shared] == by_importance[:shared]
    own_neurons = [j for row in rows for j in row[shared:]]
    assert sorted(own_neurons) == sorted(by_importance[shared:used])
    # Dealt in turn: read across the experts, the rest comes back in order of importance.
    assert index[:, shared:].T.flatten().tolist() == by_importance[shared:used]


def test_splits_that_cannot_be():
    with pytest.raises(ValueError, match="num_shared is 5, expected 0 to expert_size"):
        split_neurons(torch.ones(16), 2, 4, 5)
    with pytest.raises(ValueError, match="num_shared is -1"):
        split_neurons(torch.ones(16), 2, 4, -1)
    split_neurons(torch.ones(14), 4, 5, 2)  # 4 (5 - 2) + 2 = 14 just fits
    with pytest.raises(ValueError, match=r"need 14, but importance_F has 13"):
        split_neurons(torch.ones(13), 4, 5, 2)


def test_adapt_by_hand():
    w1, b1 = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([10.0, 20.0, 30.0])
    w2, b2 = torch.tensor([[4.0, 5.0, 6.0]]), torch.tensor([7.0])
    experts = adapt_ffn(w1, b1, w2, b2, torch.tensor([[2, 0], [2, 1]]))
    assert [w.tolist() for w in experts] == [
        [[[3.0], [1.0]], [[3.0], [2.0]]],
        [[30.0, 10.0], [30.0, 20.0]],
        [[[6.0, 4.0]], [[6.0, 5.0]]],
        [[7.0], [7.0]],
    ]


def test_one_expert_of_full_width_is_a_permutation_that_changes_nothing():
    ffn, x = random_ffn(4, 9), randn(5, 4, seed=7)
    index = split_neurons(randn(9, seed=8), 1, 9, 3)
    assert index[0].sort().values.tolist() == list(range(9))
    assert index[0].tolist() != list(range(9))
    y = moe_ffn(x, torch.zeros(5, 1, dtype=torch.int64), *adapt_ffn(*ffn, index))
    torch.testing.assert_close(y, dense_ffn(x, *ffn), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_an_expert_is_the_dense_ffn_with_the_other_neurons_silenced(bias: bool):
    w1, b1, w2, b2 = random_ffn(4, 12)
    ffn = (w1, b1, w2, b2) if bias else (w1, None, w2, None)
    x = randn(5, 4, seed=7)
    index = split_neurons(randn(12, seed=8), 3, 4, 2)
    experts = adapt_ffn(*ffn, index)
    assert [w is None for w in experts] == [False, not bias, False, not bias]
    for e in range(3):
        w2_kept = torch.zeros_like(w2)
        w2_kept[:, index[e]] = w2[:, index[e]]
        expected = dense_ffn(x, w1, ffn[1], w2_kept, ffn[3])
        y = moe_ffn(x, torch.full((5, 1), e), *experts)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_experts_are_untied():
    """Shared neurons are copies: changing one expert leaves the others and the dense layer alone."""
    ffn = random_ffn(3, 6)
    before = [w.clone() for w in ffn]
    experts = adapt_ffn(*ffn, split_neurons(torch.ones(6), 2, 3, 3))
    for w in experts:
        w[0].zero_()
        assert w[1].abs().min() > 0
    assert all(torch.equal(w, old) for w, old in zip(ffn, before, strict=True))
