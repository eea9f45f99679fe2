"""python_ref.importance: the definition by hand, and the closed form equal to the definition."""

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from python_ref.ffn import activation
from python_ref.importance import importance_by_activations, importance_by_sample_gradients


def test_definition_by_hand():
    """y = 3 relu(2 x) + 5 relu(-x); the losses are y(1), -y(2), y(-3)."""
    w1, w2 = torch.tensor([[2.0], [-1.0]]).requires_grad_(), torch.tensor([[3.0, 5.0]]).requires_grad_()

    def loss_of_sample(i: int) -> torch.Tensor:
        x, sign = [(1.0, 1.0), (2.0, -1.0), (-3.0, 1.0)][i]
        return sign * (w2 @ torch.relu(w1 * x)).sum()

    # Neuron 0: |2*3 + 3*2| = 12, |2*-6 + 3*-4| = 24, 0. Summed before the absolute value it would be 12.
    # Neuron 1: 0, 0, |-1*-15 + 5*3| = 30.
    assert importance_by_sample_gradients(loss_of_sample, 3, [(w1, w2)]).tolist() == [[36.0, 30.0]]


def test_definition_keeps_layers_apart():
    """y = u_2 w_2 u_1 w_1 x: every weight times its gradient is y, so both layers have |2 y| a sample."""
    weights = [torch.tensor([[value]], requires_grad=True) for value in (2.0, 3.0, -0.5, 4.0)]
    inputs = [1.0, -2.0]

    def loss_of_sample(i: int) -> torch.Tensor:
        y = torch.full((1, 1), inputs[i])
        for w in weights:
            y = w @ y
        return y.sum()

    pairs = [(weights[0], weights[1]), (weights[2], weights[3])]
    # y = -12 and 24: 2 (12 + 24) = 72 in both layers
    assert importance_by_sample_gradients(loss_of_sample, 2, pairs).tolist() == [[72.0], [72.0]]


def test_closed_form_by_hand():
    # Neuron 0, b = 1. Sample 4: (5 - 1) 2 + 3 * 1 = 11 and (1 - 1) 9 + 2 * -7 = -14, |-3|.
    #                 Sample 7: (0 - 1) 6 + 0 * 5, |-6|.
    # Neuron 1, b = 0. Sample 4: 1 * 1 + 1 * 1 = 2 and -2 * 1 + 0 * 3 = -2, |0|. Sample 7: 2 * 2 + 1 * 1 = 5.
    importance = importance_by_activations(
        h_TF=torch.tensor([[5.0, 1.0], [0.0, 2.0], [1.0, -2.0]]),
        dLdh_TF=torch.tensor([[2.0, 1.0], [6.0, 2.0], [9.0, 1.0]]),
        a_TF=torch.tensor([[3.0, 1.0], [0.0, 1.0], [2.0, 0.0]]),
        dLda_TF=torch.tensor([[1.0, 1.0], [5.0, 1.0], [-7.0, 3.0]]),
        b1_F=torch.tensor([1.0, 0.0]),
        sample_of_token=torch.tensor([4, 7, 4]),
    )
    assert importance.tolist() == [3.0 + 6.0, 0.0 + 5.0]


@dataclass
class Layer:
    """A transformer layer with one attention head and post-norm, as BERT's."""

    q_DD: torch.Tensor
    k_DD: torch.Tensor
    w1_FD: torch.Tensor
    b1_F: torch.Tensor | None
    w2_DF: torch.Tensor
    b2_D: torch.Tensor | None


class Encoder:
    """A small BERT: attention mixes the tokens of a sample, padding is masked out, a mean is classified."""

    def __init__(self, layers: int, hidden: int, neurons: int, act: str, bias: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.act = activation(act)
        self.layers = [
            Layer(
                randn(hidden, hidden),
                randn(hidden, hidden),
                randn(neurons, hidden),
                randn(neurons) if bias else None,
                randn(hidden, neurons),
                randn(hidden) if bias else None,
            )
            for _ in range(layers)
        ]
        self.head_CD = randn(3, hidden)

    def losses(self, x_BSD: torch.Tensor, mask_BS: torch.Tensor, labels_B: torch.Tensor):
        """Per-sample losses and, for each layer, the activations before and after sigma."""
        seen = []
        hidden = (x_BSD.shape[-1],)
        linear, norm = torch.nn.functional.linear, torch.nn.functional.layer_norm
        for layer in self.layers:
            scores_BSS = linear(x_BSD, layer.q_DD) @ linear(x_BSD, layer.k_DD).mT / hidden[0] ** 0.5
            attention_BSS = scores_BSS.masked_fill(~mask_BS[:, None, :], -torch.inf).softmax(dim=-1)
            x_BSD = norm(x_BSD + attention_BSS @ x_BSD, hidden)
            h_BSF = linear(x_BSD, layer.w1_FD, layer.b1_F)
            a_BSF = self.act(h_BSF)
            seen.append((h_BSF, a_BSF))
            x_BSD = norm(x_BSD + linear(a_BSF, layer.w2_DF, layer.b2_D), hidden)
        mean_BD = (x_BSD * mask_BS[:, :, None]).sum(dim=1) / mask_BS.sum(dim=1, keepdim=True)
        logits_BC = linear(mean_BD, self.head_CD)
        return torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none"), seen


def closed_form(encoder: Encoder, x_BSD, mask_BS, labels_B) -> torch.Tensor:
    losses_B, seen = encoder.losses(x_BSD, mask_BS, labels_B)
    gradients = torch.autograd.grad(losses_B.sum(), [tensor for pair in seen for tensor in pair])
    batch, length = mask_BS.shape
    sample_of_token = torch.arange(batch).repeat_interleave(length)
    rows = []
    for i, (h, a) in enumerate(seen):
        tokens = [t.detach().flatten(0, 1) for t in (h, gradients[2 * i], a, gradients[2 * i + 1])]
        b1 = encoder.layers[i].b1_F
        rows.append(importance_by_activations(*tokens, None if b1 is None else b1.detach(), sample_of_token))
    return torch.stack(rows)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    extra_padding=st.integers(0, 2),
    layers=st.integers(1, 3),
    hidden=st.integers(2, 5),
    neurons=st.integers(1, 7),
    act=st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_one_backward_pass_equals_the_definition(
    lengths: list[int],
    extra_padding: int,
    layers: int,
    hidden: int,
    neurons: int,
    act: str,
    bias: bool,
    seed: int,
):
    """The definition sees each sample alone, unpadded; the closed form a padded batch, whole or in halves."""
    encoder = Encoder(layers, hidden, neurons, act, bias, seed)
    batch, longest = len(lengths), max(lengths) + extra_padding
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, longest, hidden, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (batch,), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def loss_of_sample(i: int) -> torch.Tensor:
        losses, _ = encoder.losses(
            x[i : i + 1, : lengths[i]], mask[i : i + 1, : lengths[i]], labels[i : i + 1]
        )
        return losses[0]

    weights = [(layer.w1_FD, layer.w2_DF) for layer in encoder.layers]
    expected = importance_by_sample_gradients(loss_of_sample, batch, weights)
    assert expected.shape == (layers, neurons)
    assert not expected.requires_grad

    torch.testing.assert_close(closed_form(encoder, x, mask, labels), expected, rtol=1e-9, atol=1e-11)
    parts = [
        closed_form(encoder, x[i], mask[i], labels[i]) for i in torch.arange(batch).tensor_split(2) if len(i)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), expected, rtol=1e-9, atol=1e-11)


def test_the_bias_is_not_part_of_the_neurons_weight():
    """Stops h in place of h - b1, which agrees whenever a test has zero biases."""
    encoder = Encoder(1, 3, 4, "gelu", True, seed=0)
    x = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask, labels = torch.ones(1, 2).bool(), torch.tensor([1])
    with_bias = closed_form(encoder, x, mask, labels)
    losses, [(h, a)] = encoder.losses(x, mask, labels)
    dLdh, dLda = torch.autograd.grad(losses.sum(), (h, a))
    tokens = [t.detach().flatten(0, 1) for t in (h, dLdh, a, dLda)]
    ignoring = importance_by_activations(*tokens, None, torch.zeros(2, dtype=torch.int64))
    assert (with_bias[0] - ignoring).abs().min() > 1e-6


def test_samples_are_not_mixed():
    """Two samples whose products cancel keep both their shares."""
    one = torch.ones(2, 1)
    opposite = torch.tensor([[1.0], [-1.0]])
    apart = importance_by_activations(one, opposite, one, opposite, None, torch.tensor([0, 1]))
    together = importance_by_activations(one, opposite, one, opposite, None, torch.tensor([0, 0]))
    assert apart.tolist() == [4.0]
    assert together.tolist() == [0.0]
