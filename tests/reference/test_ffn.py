"""python_ref.ffn against numbers worked by hand, torch's own layers and finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from python_ref.ffn import activation, dense_ffn, moe_ffn
from tests.reference.draws import randn

TORCH_ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
    "silu": nn.SiLU(),
}


def random_experts(num_experts: int, hidden: int, neurons: int) -> list[torch.Tensor]:
    """W1, b1, W2, b2, LayerNorm weight and bias."""
    shapes = [(neurons, hidden), (neurons,), (hidden, neurons), (hidden,), (hidden,), (hidden,)]
    return [randn(num_experts, *shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", TORCH_ACTIVATIONS)
def test_activation_is_torchs_up_to_six_sigma(name: str):
    h = torch.linspace(-6, 6, 241, dtype=torch.float64, requires_grad=True)
    theirs = TORCH_ACTIVATIONS[name](h)
    ours = activation(name)(h)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    upstream = randn(241)
    grads = [torch.autograd.grad(y, h, upstream) for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-14)


def test_gelu_is_the_erf_form():
    """Stops the tanh form being taken for BERT's: they part by up to 5e-4, too little for loose tests."""
    one = torch.ones(1, dtype=torch.float64)
    assert activation("gelu")(one).item() == pytest.approx(0.8413447460685429, abs=1e-15)  # Phi(1)
    assert abs((activation("gelu_tanh")(one) - activation("gelu")(one)).item()) > 1e-4


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="'swish', expected one of gelu"):
        activation("swish")


def test_dense_ffn_by_hand():
    # h = (1*3 + 2*-1 + 0.5, -1*3 + 0*-1 + 1) = (1.5, -2); relu: (1.5, 0); y = (1*1.5 + 10, 3*1.5 + 20)
    y = dense_ffn(
        torch.tensor([[3.0, -1.0]]),
        torch.tensor([[1.0, 2.0], [-1.0, 0.0]]),
        torch.tensor([0.5, 1.0]),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([10.0, 20.0]),
        "relu",
    )
    assert y.tolist() == [[11.5, 24.5]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TORCH_ACTIVATIONS)
def test_dense_ffn_is_two_linear_layers(name: str, bias: bool):
    fc1, fc2 = nn.Linear(5, 7, bias=bias).double(), nn.Linear(7, 5, bias=bias).double()
    x = randn(4, 5)
    expected = fc2(TORCH_ACTIVATIONS[name](fc1(x)))
    torch.testing.assert_close(dense_ffn(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, name), expected)


def test_dense_ffn_gradients():
    weights = [w[0].requires_grad_() for w in random_experts(1, 3, 4)[:4]]
    assert torch.autograd.gradcheck(dense_ffn, (randn(2, 3, seed=9).requires_grad_(), *weights))


class TestByHand:
    """Two experts of one neuron: z_0(x) = (2 relu(x_0), 1), z_1(x) = (5, 3 relu(x_1 - 1))."""

    weights = (
        torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]),
        torch.tensor([[0.0], [-1.0]]),
        torch.tensor([[[2.0], [0.0]], [[0.0], [3.0]]]),
        torch.tensor([[0.0, 1.0], [5.0, 0.0]]),
    )
    # z_0 = (2, 1), (0, 1), (14, 1); z_1 = (5, 3), (5, 9), (5, 21)
    x = torch.tensor([[1.0, 2.0], [-1.0, 4.0], [7.0, 8.0]])
    one_each = torch.tensor([[0], [1], [-1]])
    ln_w = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ln_b = torch.tensor([[10.0, 20.0], [0.0, 0.5]])
    residual = torch.tensor([[0.0, 3.0], [0.0, 0.0], [3.0, 4.0]])

    def normed(self, **options):
        options |= {"residual_TD": self.residual, "ln_w_ED": self.ln_w, "ln_b_ED": self.ln_b}
        return moe_ffn(self.x, self.one_each, *self.weights, activation="relu", **options)

    def test_gate_weighs_each_slot(self):
        ids = torch.tensor([[0, 1], [1, -1], [-1, -1]])
        gate = torch.tensor([[0.5, 0.25], [2.0, 7.0], [1.0, 1.0]])
        y = moe_ffn(self.x, ids, *self.weights, gate_TK=gate, activation="relu")
        # 0.5 (2, 1) + 0.25 (5, 3); 2 (5, 9); nothing
        assert y.tolist() == [[2.25, 1.25], [10.0, 18.0], [0.0, 0.0]]

    def test_without_gate_a_slot_weighs_one_over_k_even_alone(self):
        ids = torch.tensor([[0, 1], [1, -1], [1, 1]])
        y = moe_ffn(self.x, ids, *self.weights, activation="relu")
        # ((2, 1) + (5, 3)) / 2; (5, 9) / 2; the same expert twice
        assert y.tolist() == [[3.5, 2.0], [2.5, 4.5], [5.0, 21.0]]

    def test_norm_takes_the_experts_own_weights(self):
        y = self.normed(ln_eps=0.0)
        # LN of (2, 4) and of (5, 9) is (-1, 1); then 1, 2, +10, +20 and 3, 4, +0, +0.5; no expert: residual
        assert y.tolist() == [[9.0, 22.0], [-3.0, 4.5], [3.0, 4.0]]

    def test_gate_comes_after_the_norm_and_spares_tokens_without_expert(self):
        y = self.normed(gate_TK=torch.tensor([[0.5], [2.0], [9.0]]), ln_eps=0.0)
        assert y.tolist() == [[4.5, 11.0], [-6.0, 9.0], [3.0, 4.0]]

    def test_residual_is_the_input_unless_given(self):
        norm = {"ln_w_ED": self.ln_w, "ln_eps": 0.0}
        y = moe_ffn(self.x, self.one_each, *self.weights, activation="relu", **norm)
        # Token 1: LN of (5 - 1, 9 + 4) is (-1, 1), no norm bias; token 2: x
        assert y[1:].tolist() == [[-3.0, 4.0], [7.0, 8.0]]

    def test_eps_is_added_to_the_variance(self):
        y = self.normed(ln_eps=3.0)
        # (2, 4) has variance 1: (-1, 1) / sqrt(1 + 3)
        assert y[0].tolist() == [9.5, 21.0]


@given(
    tokens=st.sampled_from([0, 1, 2, 7, 13]),
    experts=st.integers(1, 4),
    top_k=st.integers(1, 3),
    name=st.sampled_from(sorted(TORCH_ACTIVATIONS)),
)
def test_experts_that_are_the_whole_dense_ffn_are_the_dense_ffn(
    tokens: int, experts: int, top_k: int, name: str
):
    dense = [w[0] for w in random_experts(1, 4, 6)[:4]]
    x = randn(tokens, 4, seed=20)
    ids = torch.randint(experts, (tokens, top_k), generator=torch.Generator().manual_seed(21))
    y = moe_ffn(x, ids, *(w.expand(experts, *w.shape) for w in dense), activation=name)
    torch.testing.assert_close(y, dense_ffn(x, *dense, name), rtol=1e-12, atol=1e-12)


class AuthorsExpert(nn.Module):
    """moebert/utils.py, FeedForward, in eval mode."""

    def __init__(self, hidden: int, neurons: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(hidden, neurons), nn.Linear(neurons, hidden)
        self.norm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc2(nn.functional.gelu(self.fc1(x))) + x)


def test_moe_ffn_is_the_authors_experts_with_all_gradients():
    """Token by token through their modules, and back: outputs and every parameter's gradient."""
    torch.manual_seed(0)
    experts = nn.ModuleList([AuthorsExpert(4, 6) for _ in range(3)]).double()
    for expert in experts:
        nn.init.normal_(expert.norm.weight)
        nn.init.normal_(expert.norm.bias)
    x = randn(9, 4).requires_grad_()
    gate = randn(9, 2, seed=1).requires_grad_()
    ids = torch.tensor([[0, 1], [1, 0], [2, 2], [0, 2], [2, -1], [-1, 1], [1, 2], [0, 1], [2, 0]])
    rows = []
    for t in range(9):
        slots = [gate[t, k] * experts[ids[t, k]](x[t]) for k in range(2) if ids[t, k] >= 0]
        rows.append(torch.stack(slots).sum(dim=0))
    upstream = randn(9, 4, seed=2)
    parameters = [x, gate, *experts.parameters()]
    expected = torch.stack(rows)
    expected_grads = torch.autograd.grad(expected, parameters, upstream)

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([expert.get_parameter(name) for expert in experts])

    y = moe_ffn(
        x,
        ids,
        *map(stacked, ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
        gate_TK=gate,
        ln_w_ED=stacked("norm.weight"),
        ln_b_ED=stacked("norm.bias"),
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, parameters, upstream), expected_grads)


@pytest.mark.parametrize("norm", [False, True])
def test_moe_ffn_gradients(norm: bool):
    w1, b1, w2, b2, ln_w, ln_b = random_experts(3, 3, 2)
    x, gate, r = randn(5, 3, seed=10), randn(5, 2, seed=11), randn(5, 3, seed=12)
    ids = torch.tensor([[0, 2], [2, 0], [-1, -1], [0, -1], [2, 2]])  # expert 1 has no token

    def plain(x, gate, w1, b1, w2, b2):
        return moe_ffn(x, ids, w1, b1, w2, b2, gate_TK=gate)

    def normed(x, gate, w1, b1, w2, b2, r, ln_w, ln_b):
        return moe_ffn(
            x, ids, w1, b1, w2, b2, gate_TK=gate, residual_TD=r, ln_w_ED=ln_w, ln_b_ED=ln_b, ln_eps=1e-3
        )

    arguments = [x, gate, w1, b1, w2, b2, *([r, ln_w, ln_b] if norm else [])]
    assert torch.autograd.gradcheck(normed if norm else plain, [a.requires_grad_() for a in arguments])


def test_expert_without_tokens_has_zero_gradient_not_none():
    experts = [w.requires_grad_() for w in random_experts(2, 3, 4)[:4]]
    moe_ffn(randn(3, 3, seed=5), torch.zeros(3, 1, dtype=torch.int64), *experts).sum().backward()
    for w in experts:
        assert w.grad is not None
        assert w.grad[0].abs().max() > 0
        assert w.grad[1].abs().max() == 0


@pytest.mark.parametrize("norm", [False, True])
def test_what_a_token_without_expert_holds_enters_nothing(norm: bool):
    """Padding may hold anything, NaN included, and so may its gate."""
    w1, b1, w2, b2, ln_w, ln_b = random_experts(2, 3, 4)
    x, gate = randn(3, 3, seed=5), randn(3, 1, seed=6)
    ids = torch.tensor([[0], [-1], [1]])
    real = torch.tensor([0, 2])
    kwargs = {"ln_w_ED": ln_w, "ln_b_ED": ln_b} if norm else {}
    clean = moe_ffn(x[real], ids[real], w1, b1, w2, b2, gate_TK=gate[real], **kwargs)
    x[1], gate[1] = torch.nan, torch.nan
    y = moe_ffn(x, ids, w1, b1, w2, b2, gate_TK=gate, **kwargs)
    torch.testing.assert_close(y[real], clean, rtol=0, atol=0)
    assert y[1].isnan().all() if norm else (y[1] == 0).all()


def test_biases_of_none_are_zero_biases():
    w1, b1, w2, b2, ln_w, ln_b = random_experts(2, 3, 4)
    x, ids = randn(3, 3, seed=5), torch.tensor([[0], [1], [0]])
    zeros = [torch.zeros_like(b) for b in (b1, b2, ln_b)]
    without = moe_ffn(x, ids, w1, None, w2, None, ln_w_ED=ln_w)
    with_zeros = moe_ffn(x, ids, w1, zeros[0], w2, zeros[1], ln_w_ED=ln_w, ln_b_ED=zeros[2])
    torch.testing.assert_close(without, with_zeros, rtol=0, atol=0)


def test_arguments_that_cannot_be_meant():
    w1, b1, w2, b2, _, ln_b = random_experts(2, 3, 4)
    x, ids = randn(2, 3), torch.tensor([[0], [2]])
    with pytest.raises(ValueError, match="expert_ids_TK has 2, expected -1 to 1"):
        moe_ffn(x, ids, w1, b1, w2, b2)
    for kwargs in ({"residual_TD": x}, {"ln_b_ED": ln_b}):
        with pytest.raises(ValueError, match="ln_w_ED is None"):
            moe_ffn(x, ids.clamp(max=1), w1, b1, w2, b2, **kwargs)
