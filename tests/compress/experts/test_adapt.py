import copy

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from moebert_kernels.compress.experts.adaptation import (
    adapt,
    default_sizes,
    random_scores,
    split_neurons,
    token_counts,
)
from moebert_kernels.compress.experts.affinity import split_by_affinity
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.scoring.token_scores import TokenScores
from moebert_kernels.errors import UserError
from python_ref import adaptation
from tests import tiny
from tests.compress.toys import Progress


@pytest.mark.parametrize(
    ("width", "num_experts", "expected"),
    [(3072, 4, (768, 512)), (1536, 4, (384, 256)), (4096, 4, (1024, 683)), (10, 3, (3, 2)), (2, 2, (1, 1))],
)
def test_default_sizes_are_the_papers_proportions(width, num_experts, expected):
    assert default_sizes(width, num_experts) == expected
    split_neurons(torch.rand(1, width), num_experts, *expected)


def test_more_experts_than_neurons_are_refused():
    with pytest.raises(UserError, match="num_experts must be 1 to the 4 neurons of a layer, got 5"):
        default_sizes(4, 5)


@given(data=st.data())
def test_the_split_equals_the_reference(data):
    num_experts = data.draw(st.integers(1, 5))
    num_shared = data.draw(st.integers(0, 6))
    own = data.draw(st.integers(0 if num_shared else 1, 4))
    width = num_experts * own + num_shared + data.draw(st.integers(0, 5))
    # Few distinct scores: ties must fall the same way.
    score = st.sampled_from([0.0, 1.0, 2.0, 3.5])
    scores = st.lists(score, min_size=width, max_size=width)
    importance_LF = torch.tensor(data.draw(st.lists(scores, min_size=1, max_size=3)))
    sizes = (num_experts, num_shared + own, num_shared)
    index_LEF = split_neurons(importance_LF, *sizes)
    assert index_LEF.dtype == torch.int64
    expected = torch.stack([adaptation.split_neurons(importance_F, *sizes) for importance_F in importance_LF])
    assert torch.equal(index_LEF, expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 2, 1), "num_experts must be at least 1, got 0"),
        ((2, 11, 11), "expert_size must be 1 to the dense width 10, got 11"),
        ((2, 0, 0), "expert_size must be 1 to the dense width 10, got 0"),
        ((2, 4, 5), "num_shared must be 0 to the expert size 4, got 5"),
        ((2, 4, -1), "num_shared must be 0 to the expert size 4, got -1"),
        ((4, 4, 1), "4 experts of 4 neurons, 1 of them shared, need 13 neurons, but .* layers have 10"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        split_neurons(torch.rand(2, 10), *sizes)


@pytest.mark.parametrize(
    ("importance_LF", "message"),
    [
        (torch.rand(10), r"must be floating point \[L, F\], got torch.float32 \(10,\)"),
        (torch.ones(2, 10).long(), r"must be floating point \[L, F\], got torch.int64 \(2, 10\)"),
        (torch.rand(2, 10).index_fill(1, torch.tensor(3), float("nan")), "must be finite"),
        (torch.rand(2, 10).index_fill(1, torch.tensor(3), float("inf")), "must be finite"),
    ],
)
def test_importance_that_cannot_be_sorted_is_refused(importance_LF, message):
    """NaN was sorted as the most important."""
    with pytest.raises(UserError, match=f"importance_LF {message}"):
        split_neurons(importance_LF, 2, 4, 1)


def test_random_scores_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    scores_LF = random_scores(3, 50, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(scores_LF, random_scores(3, 50, seed=1))
    assert not torch.equal(scores_LF, random_scores(3, 50, seed=2))
    orders = scores_LF.argsort(1)
    assert torch.equal(orders.sort(1).values, torch.arange(50).expand(3, -1))
    assert not torch.equal(orders[0], orders[1])


def test_token_counts_leave_padding_out():
    rows = Dataset.from_dict({"input_ids": [[1, 2, 2], [4, 0, 0]], "attention_mask": [[1, 1, 1], [1, 0, 0]]})
    assert token_counts(rows, 6).tolist() == [0, 1, 2, 0, 1, 0]
    assert token_counts(rows.remove_columns("attention_mask"), 6).tolist() == [2, 1, 2, 0, 1, 0]
    with pytest.raises(UserError, match="token ids from 0 to 4, but the model's vocabulary has 4"):
        token_counts(rows.remove_columns("attention_mask"), 4)


VOCAB = 30


@pytest.fixture
def teacher():
    sizes = {**tiny.SMALLER, "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12}
    options = {"num_labels": 3, "initializer_range": 0.5}
    return tiny.initialised(BertForSequenceClassification, **sizes, **options).eval()


def test_one_expert_of_all_neurons_computes_what_the_teacher_does(teacher):
    input_ids = torch.arange(2, 12).view(2, 5)
    moe = adapt(teacher, random_scores(2, 12), num_experts=1, expert_size=12, num_shared=0)
    torch.testing.assert_close(moe(input_ids).logits, teacher(input_ids).logits, rtol=1e-4, atol=1e-5)


def test_adapt_fills_in_the_papers_sizes_and_leaves_the_teacher(teacher):
    before = copy.deepcopy(teacher.state_dict())
    moe = adapt(teacher, Importance(random_scores(2, 12), "m", "t", 1), num_experts=2)
    assert (moe.config.num_experts, moe.config.expert_size, moe.config.num_shared_neurons) == (2, 6, 4)
    assert moe.config.routing == "hash-random"
    tiny.assert_same(teacher.state_dict(), before)


def test_experts_hold_the_neurons_of_the_split(teacher):
    scores_LF = random_scores(2, 12, seed=3)
    moe = adapt(teacher, scores_LF, num_experts=3, expert_size=4, num_shared=2)
    index_LEF = split_neurons(scores_LF, 3, 4, 2)
    w1_EFD = [value for name, value in moe.state_dict().items() if name.endswith("w1_EFD")]
    for layer in range(2):
        dense_FD = teacher.bert.encoder.layer[layer].intermediate.dense.weight
        assert torch.equal(w1_EFD[layer], dense_FD[index_LEF[layer]])


def test_hash_balance_needs_token_counts_and_follows_them(teacher):
    with pytest.raises(UserError, match="token_counts_V"):
        adapt(teacher, random_scores(2, 12), routing="hash-balance")
    counts_V = torch.zeros(VOCAB, dtype=torch.long)
    counts_V[:4] = 100
    moe = adapt(teacher, random_scores(2, 12), routing="hash-balance", token_counts_V=counts_V)
    plans = []
    moe(torch.arange(4)[None], router_outputs=plans)
    assert all(sorted(output.plan.counts_E.tolist()) == [1, 1, 1, 1] for output in plans)


def test_scores_of_another_model_are_refused(teacher):
    with pytest.raises(UserError, match="3 layers of 12 neurons, but the model has 2 of 12"):
        adapt(teacher, random_scores(3, 12))


def test_affinity_takes_neurons_and_tables_from_one_split(teacher):
    generator = torch.Generator().manual_seed(0)
    tokens = TokenScores(torch.rand(2, VOCAB, 12, generator=generator), torch.arange(VOCAB))
    importance = Importance(tokens.scores_LGF.sum(1), "m", "t", 1, tokens)
    counts_V = torch.arange(1, VOCAB + 1)
    sizes = {"num_experts": 4, "expert_size": 6, "num_shared": 2}  # more neurons than there are, if dealt out
    how, done = {"routing": "hash-affinity", "seed": 3, "token_counts_V": counts_V}, Progress()
    moe = adapt(teacher, importance, **sizes, **how, progress=done)
    split = split_by_affinity(importance, counts_V, **sizes, seed=3)
    assert done == [(1, 2), (2, 2)]
    assert (moe.config.routing, moe.config.num_shared_neurons) == ("hash-affinity", 2)
    assert torch.equal(moe.bert.encoder.tables_LV, split.tables_LV)
    for layer in range(2):
        dense_FD = teacher.bert.encoder.layer[layer].intermediate.dense.weight
        w1_EFD = moe.bert.encoder.layer[layer].ffn.w1_EFD
        assert torch.equal(w1_EFD, dense_FD[split.index_LEF[layer]])


def test_affinity_says_what_it_lacks(teacher):
    counted = {"token_counts_V": torch.ones(VOCAB).long()}
    for options, message in (
        ({}, "hash-affinity needs token_counts_V"),
        (counted, "importance --per-token"),
        ({**counted, "expert_size": 13}, "expert_size must be 1 to the dense width 12, got 13"),
    ):
        with pytest.raises(UserError, match=message):
            adapt(teacher, random_scores(2, 12), routing="hash-affinity", **options)
