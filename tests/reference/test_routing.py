"""python_ref.routing against tables, gates and orders worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from python_ref.routing import (
    gate_sentence,
    gate_token,
    hash_balance_table,
    hash_expert_ids,
    hash_random_tables,
    load_balance_loss,
    sort_by_expert,
)
from tests.reference.draws import randn


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_alike_alone(gate, x, w, mask):
    """What a sentence is given in a batch, it is given alone; rows come sentence by sentence."""
    together = gate(x, w, 1, mask)
    length = x.shape[1]
    for b in range(len(x)):
        alone = gate(x[b : b + 1], w, 1, mask[b : b + 1])
        torch.testing.assert_close(alone, tuple(part[length * b : length * (b + 1)] for part in together))


def test_random_tables_differ_by_layer_and_repeat_by_seed():
    tables = hash_random_tables(3, 4000, 4, torch.Generator().manual_seed(7))
    assert tables.shape == (3, 4000)
    assert tables.dtype == torch.int64
    assert torch.equal(tables, hash_random_tables(3, 4000, 4, torch.Generator().manual_seed(7)))
    assert not torch.equal(tables, hash_random_tables(3, 4000, 4, torch.Generator().manual_seed(8)))
    # Two layers agree on a quarter of the ids and an expert has a quarter of them: 1000 with deviation 27.
    assert (tables[0] == tables[1]).sum().item() == pytest.approx(1000, abs=150)
    for table in tables:
        assert table.bincount(minlength=4).tolist() == pytest.approx([1000] * 4, abs=150)


def test_balance_table_by_hand():
    # id 0 (5): expert 0, load 5. id 1 (3): expert 1, load 3. id 2 (3): expert 1, load 6.
    # id 3 (2): expert 0, load 7. Two ids each; ids 4 and 5, never seen: experts 0 and 1.
    assert hash_balance_table(torch.tensor([5, 3, 3, 2, 0, 0]), 2).tolist() == [0, 1, 1, 0, 0, 1]


def test_balance_table_takes_tokens_by_count_not_by_id():
    # id 2 (9): expert 0. id 1 (4): expert 1, load 4. id 3 (4): expert 1, load 8. id 0 (1): expert 1, load 9.
    assert hash_balance_table(torch.tensor([1, 4, 9, 4]), 2).tolist() == [1, 1, 0, 1]


def test_balance_table_breaks_a_tie_of_loads_by_number_of_ids():
    # id 0 (8): expert 0. ids 1, 2 (5): expert 1, load 10. ids 3, 4 (1): expert 0, load 10 with three ids.
    # id 5 (1): a tie of loads, and expert 1 has but two ids.
    assert hash_balance_table(torch.tensor([8, 5, 5, 1, 1, 1]), 2).tolist() == [0, 1, 1, 0, 0, 1]


def test_balance_table_spreads_ids_never_seen():
    """Stops every unseen id going to whichever expert has the least load, where it stays the least."""
    table = hash_balance_table(torch.tensor([10, 1] + [0] * 100), 2)
    assert table.bincount().tolist() == [51, 51]


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=60), experts=st.integers(1, 6))
def test_balance_table_is_balanced(counts: list[int], experts: int):
    table = hash_balance_table(torch.tensor(counts), experts)
    assert table.shape == (len(counts),)
    assert table.dtype == torch.int64
    load = torch.zeros(experts, dtype=torch.int64).index_add(0, table, torch.tensor(counts))
    # The last token that the fullest expert got went there because its load was then the least.
    assert load.max() - load.min() <= max(counts)


def test_hash_expert_ids_by_hand():
    table = torch.tensor([2, 0, 1])
    ids = hash_expert_ids(torch.tensor([[0, 1], [2, 0]]), table, torch.tensor([[1, 1], [1, 0]]))
    assert ids.tolist() == [[2], [0], [1], [-1]]
    assert table.tolist() == [2, 0, 1]


class TestGateToken:
    # Logits are (ln 2 x_0, ln 3 x_1, 0).
    w = tensor([[math.log(2), 0], [0, math.log(3)], [0, 0]])

    def test_by_hand(self):
        x = tensor([[[1, 0], [0, 1], [1, 1]]])
        ids, gate, probs = gate_token(x, self.w, 2, torch.tensor([[1, 1, 0]]))
        assert ids.tolist() == [[0, 1], [1, 0], [-1, -1]]  # the tie of token 0 goes to the lower expert
        torch.testing.assert_close(gate, tensor([[1 / 2, 1 / 4], [3 / 5, 1 / 5], [0, 0]]))
        third = [2 / 6, 3 / 6, 1 / 6]  # of the masked token, as of any other
        torch.testing.assert_close(probs, tensor([[2 / 4, 1 / 4, 1 / 4], [1 / 5, 3 / 5, 1 / 5], third]))

    def test_tokens_come_sentence_by_sentence(self):
        mask = torch.arange(4) < torch.tensor([[4], [2], [4]])
        assert_alike_alone(gate_token, randn(3, 4, 2), self.w, mask)

    def test_gradients_reach_gate_weights_through_the_chosen_probability(self):
        x, mask = randn(2, 3, 2).requires_grad_(), torch.tensor([[1, 1, 1], [1, 0, 0]])
        w = randn(3, 2, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w: gate_token(x, w, 2, mask)[1:], (x, w))
        gate_x = torch.autograd.grad(gate_token(x, w, 1, mask)[1].sum(), x)[0]
        assert (gate_x.abs().sum(dim=-1) > 0).tolist() == [[True, True, True], [True, False, False]]


class TestGateSentence:
    w = TestGateToken.w

    def test_by_hand(self):
        x = tensor([[[2, 0], [0, 2], [99, -99]]])  # the mean of the real tokens is (1, 1)
        ids, gate, probs = gate_sentence(x, self.w, 2, torch.tensor([[1, 1, 0]]))
        assert ids.tolist() == [[1, 0], [1, 0], [-1, -1]]
        torch.testing.assert_close(gate, tensor([[1 / 2, 1 / 3], [1 / 2, 1 / 3], [0, 0]]))
        torch.testing.assert_close(probs, tensor([[1 / 3, 1 / 2, 1 / 6]] * 3))

    def test_a_sentence_gives_the_same_alone_as_in_a_batch(self):
        """Stops the authors' batch size 1, where the gate's probability was left out."""
        x, mask = randn(3, 5, 2), torch.arange(5) < torch.tensor([[5], [2], [3]])
        assert_alike_alone(gate_sentence, x, self.w, mask)
        _, gate, _ = gate_sentence(x, self.w, 1, mask)
        assert (gate[mask.flatten()] < 1).all()

    def test_padding_enters_nothing(self):
        x, mask = randn(2, 4, 2), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
        before = gate_sentence(x, self.w, 2, mask)
        poisoned = x.masked_fill(mask[:, :, None] == 0, torch.nan)
        for a, b in zip(before, gate_sentence(poisoned, self.w, 2, mask), strict=True):
            assert torch.equal(a, b)
        ids, gate, probs = before
        assert (ids[4:] == -1).all()
        assert (gate[4:] == 0).all()
        torch.testing.assert_close(probs[4:], tensor([[1 / 3] * 3] * 4))

    def test_gradients(self):
        x, mask = randn(2, 3, 2).requires_grad_(), torch.tensor([[1, 1, 1], [1, 1, 0]])
        w = randn(3, 2, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w: gate_sentence(x, w, 2, mask)[1:], (x, w))


class TestLoadBalanceLoss:
    probs = tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0]])
    mask = torch.tensor([1, 1, 1, 0])

    def test_by_hand(self):
        # P = (1.7, 1.3) / 3, f = (2, 1) / 3: 2 (1.7 * 2 + 1.3) / 9 = 9.4 / 9
        ids = torch.tensor([[0], [0], [1], [-1]])
        assert load_balance_loss(self.probs, ids, self.mask).item() == pytest.approx(9.4 / 9, abs=1e-15)

    def test_f_counts_all_slots_of_real_tokens(self):
        # f = (2, 3) / 6, the empty slot counted: 2 (1.7 * 2 + 1.3 * 3) / 18 = 14.6 / 18
        ids = torch.tensor([[0, 1], [0, 1], [1, -1], [1, 0]])
        assert load_balance_loss(self.probs, ids, self.mask).item() == pytest.approx(14.6 / 18, abs=1e-15)

    def test_uniform_is_one_and_collapse_is_the_number_of_experts(self):
        ids = torch.arange(8)[:, None] % 4
        uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
        assert load_balance_loss(uniform, ids, torch.ones(8)).item() == pytest.approx(1, abs=1e-15)
        collapsed = tensor([[0, 0, 1, 0]] * 8)
        ids = torch.full((8, 1), 2)
        assert load_balance_loss(collapsed, ids, torch.ones(8)).item() == pytest.approx(4, abs=1e-15)

    def test_one_token_of_each_sentence_gives_the_authors_loss_over_sentences(self):
        x, mask = randn(6, 4, 2), torch.ones(6, 4)
        ids, _, probs = gate_sentence(x, randn(3, 2, seed=1), 1, mask)
        p_BE = torch.softmax(x.mean(dim=1) @ randn(3, 2, seed=1).T, dim=-1)
        f_E = torch.nn.functional.one_hot(p_BE.argmax(dim=-1), 3).double().mean(dim=0)
        first = torch.tensor([[1, 0, 0, 0]] * 6).flatten()
        torch.testing.assert_close(load_balance_loss(probs, ids, first), 3 * (p_BE.mean(dim=0) * f_E).sum())

    def test_no_real_token(self):
        probs = self.probs.clone().requires_grad_()
        loss = load_balance_loss(probs, torch.full((4, 1), -1), torch.zeros(4))
        assert loss.item() == 0
        assert torch.autograd.grad(loss, probs)[0].abs().max() == 0

    def test_gradient_by_hand(self):
        # d/dp_te = E f_e / T_real at real tokens, 0 at padding
        probs = self.probs.clone().requires_grad_()
        loss = load_balance_loss(probs, torch.tensor([[0], [0], [1], [-1]]), self.mask)
        expected = tensor([[4 / 9, 2 / 9]] * 3 + [[0, 0]])
        torch.testing.assert_close(torch.autograd.grad(loss, probs)[0], expected)


def test_sort_by_expert_by_hand():
    # slots 0 to 5 have experts 1, 0, none, 1, 0, none
    order, inverse, counts, offsets = sort_by_expert(torch.tensor([[1, 0], [-1, 1], [0, -1]]), 3)
    assert order.tolist() == [1, 4, 0, 3, 2, 5]
    assert inverse.tolist() == [2, 0, 4, 3, 1, 5]
    assert counts.tolist() == [2, 2, 0]
    assert offsets.tolist() == [0, 2, 4, 4]


@given(data=st.data(), tokens=st.integers(0, 30), top_k=st.integers(1, 3), experts=st.integers(1, 5))
def test_sort_by_expert_is_a_stable_permutation(data, tokens: int, top_k: int, experts: int):
    flat = data.draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    ids = torch.tensor(flat, dtype=torch.int32).reshape(tokens, top_k)
    order, inverse, counts, offsets = sort_by_expert(ids, experts)
    assert {order.dtype, inverse.dtype, counts.dtype, offsets.dtype} == {torch.int64}
    # Python's sorted is stable, so slots of one expert stay in order.
    assert order.tolist() == sorted(range(len(flat)), key=lambda s: experts if flat[s] < 0 else flat[s])
    assert order[inverse].tolist() == inverse[order].tolist() == list(range(len(flat)))
    assert counts.tolist() == [flat.count(e) for e in range(experts)]
    assert offsets[0] == 0
    for e in range(experts):
        assert all(flat[s] == e for s in order[offsets[e] : offsets[e + 1]])
    assert all(flat[s] == -1 for s in order[offsets[experts] :])
