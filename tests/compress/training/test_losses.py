"""The distillation losses against python_ref, and what padding and accumulation may not do to them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moebert_kernels.compress.scoring.losses import label_loss, layer_loss, prediction_loss, symmetric_kl
from python_ref import distillation as ref

shapes = st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.integers(0, 10_000))


def prefix_mask(B, S, generator):
    """Real tokens first, at least one in a sequence."""
    return (torch.arange(S) < torch.randint(1, S + 1, (B, 1), generator=generator)).long()


def assert_same(ours, theirs_of, *tensors):
    """Values and gradients in float64, values in float32; tensors are the leaves, given by dtype."""
    leaves = [t.double().requires_grad_() for t in tensors]
    mine, expected = ours(*leaves), theirs_of(*leaves)
    torch.testing.assert_close(mine, expected)
    grads = torch.autograd.grad(mine, leaves, allow_unused=True, materialize_grads=True)
    expected_grads = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(grads, expected_grads)
    torch.testing.assert_close(ours(*(t.float() for t in tensors)), expected.float().detach())


@given(shapes)
def test_layer_loss_equals_the_reference(shape):
    B, S, D, seed = shape
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(6, B, S, D, generator=generator, dtype=torch.float64)
    mask_BS = prefix_mask(B, S, generator)

    def losses_of(function):
        return lambda *s: function(s[:3], s[3:], mask_BS)

    assert_same(losses_of(layer_loss), losses_of(ref.layer_loss), *states)


@given(
    shapes, st.sampled_from(["classification", "regression", "question_answering", "token_classification"])
)
def test_prediction_losses_equal_the_reference(shape, kind):
    B, S, C, seed = shape
    generator = torch.Generator().manual_seed(seed)
    mask_BS = prefix_mask(B, S, generator)

    def draw(*size):
        return 3 * torch.randn(size, generator=generator, dtype=torch.float64)

    if kind == "question_answering":
        tensors = [draw(B, S) for _ in range(4)]

        def losses_of(function):
            return lambda a, b, c, d: function(kind, (a, b), (c, d), mask_BS)
    else:
        size = (B, S, C) if kind == "token_classification" else (B, C)
        tensors = [draw(*size) for _ in range(2)]

        def losses_of(function):
            return lambda a, b: function(kind, a, b, mask_BS)

    assert_same(losses_of(prediction_loss), losses_of(ref.prediction_loss), *tensors)


def test_padding_enters_no_layer_loss():
    """The authors averaged over padding too. Whatever lies there, loss and gradient must not see it."""
    torch.manual_seed(0)
    mask_BS = torch.tensor([[1, 1, 0], [1, 0, 0]])
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    plain = student.clone().requires_grad_()
    expected = layer_loss([plain], [teacher], mask_BS)
    expected.backward()

    poisoned = student.masked_fill((mask_BS == 0).unsqueeze(-1), float("nan")).requires_grad_()
    loss = layer_loss([poisoned], [teacher], mask_BS)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(poisoned.grad, plain.grad)
    assert plain.grad[mask_BS == 0].abs().max() == 0


def test_symmetric_kl_of_saturated_logits_is_finite():
    """The authors took log(0) here: infinite loss on a confident teacher."""
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = symmetric_kl(student, torch.tensor([[-200.0, 200.0]]))
    loss.backward()
    torch.testing.assert_close(loss.item(), 400.0)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["question_answering", "token_classification"])
def test_a_sequence_of_padding_alone_gives_no_nan(kind):
    shape = (2, 3) if kind == "question_answering" else (2, 3, 4)
    student = torch.randn(shape, requires_grad=True)
    teacher = torch.randn(shape)
    mask_BS = torch.tensor([[0, 0, 0], [1, 1, 0]])
    outputs = [(logits, logits) if kind == "question_answering" else logits for logits in (student, teacher)]
    loss = prediction_loss(kind, *outputs, mask_BS)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad.isfinite().all()
    assert student.grad[mask_BS == 0].abs().max() == 0


def test_losses_are_float32_for_half_inputs():
    half = torch.randn(2, 3, 4).bfloat16()
    assert layer_loss([half], [half + 1]).dtype == torch.float32
    assert prediction_loss("classification", half[0], half[1]).dtype == torch.float32
    assert label_loss("classification", half[0], torch.tensor([0, 1, 2])).dtype == torch.float32


def test_label_loss_is_the_heads_own():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, -100])
    for smoothing in (0.0, 0.1):
        found = label_loss("classification", logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(found, F.cross_entropy(logits, labels, label_smoothing=smoothing))
    scores = torch.randn(4)
    found = label_loss("regression", logits[:, :1], scores)
    torch.testing.assert_close(found, F.mse_loss(logits[:, 0], scores))
    tokens, token_labels = torch.randn(2, 5, 3), torch.tensor([[0, 1, -100, 2, -100], [-100] * 5])
    found = label_loss("token_classification", tokens, token_labels)
    torch.testing.assert_close(found, F.cross_entropy(tokens.view(-1, 3), token_labels.view(-1)))
    start, end = torch.randn(2, 5), torch.randn(2, 5)
    positions = torch.tensor([1, 5]), torch.tensor([4, 3])  # 5 lies outside: the span was cut off
    expected = (F.cross_entropy(start[:1], positions[0][:1]) + F.cross_entropy(end, positions[1])) / 2
    torch.testing.assert_close(label_loss("question_answering", (start, end), positions), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_answers_are_chosen_among_real_positions(label_smoothing):
    """What a model gives at padding depends on how its batch was computed: it must not be in the loss."""
    torch.manual_seed(0)
    start, end = torch.randn(2, 3, 6).unbind()
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4]])).long()
    positions = torch.tensor([5, 1, 6]), torch.tensor([5, 0, 3])  # 6 lies outside
    smoothed = {"label_smoothing": label_smoothing}
    loss = label_loss("question_answering", (start, end), positions, mask, **smoothed)

    def alone(logits, row, position):
        real = logits[row, : mask[row].sum()]
        return F.cross_entropy(real, torch.tensor(position), **smoothed)

    expected = [
        torch.stack([alone(start, 0, 5), alone(start, 1, 1)]).mean(),
        torch.stack([alone(end, 0, 5), alone(end, 1, 0), alone(end, 2, 3)]).mean(),
    ]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    elsewhere = torch.where(mask.bool(), start, 99.0)
    torch.testing.assert_close(
        label_loss("question_answering", (elsewhere, end), positions, mask, **smoothed), loss
    )


def test_a_batch_without_labels_has_loss_zero():
    """A mean over nothing is NaN, and one NaN micro-batch spoils the whole accumulated step."""
    logits = torch.randn(2, 3, requires_grad=True)
    loss = label_loss("classification", logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


def test_mismatches_are_named():
    a, b = torch.zeros(1, 2, 4), torch.zeros(1, 2, 6)
    with pytest.raises(ValueError, match="3 states and teacher_states 2"):
        layer_loss([a] * 3, [a] * 2)
    with pytest.raises(ValueError, match=r"hidden state 1 is \(1, 2, 4\) in the student"):
        layer_loss([a, a], [a, b])
    with pytest.raises(ValueError, match="output_hidden_states"):
        layer_loss([], [])
    with pytest.raises(ValueError, match=r"kind must be one of .* got 'ranking'"):
        prediction_loss("ranking", a, a)
    with pytest.raises(ValueError, match=r"needs a \(start, end\) pair"):
        prediction_loss("question_answering", a, a)
    with pytest.raises(ValueError, match="needs one tensor"):
        prediction_loss("classification", (a, a), (a, a))


def test_several_labels_are_so_many_yes_or_no():
    """Stops a softmax over classes that do not exclude each other; no paper's loss, but that of its parts."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) * 40
    labels = (torch.rand(5, 3, generator=generator) < 0.5).float()
    student.requires_grad_()
    kind = "multi_label_classification"

    def yes_or_no(logits):
        return torch.stack([logits, torch.zeros_like(logits)], dim=-1)

    found = prediction_loss(kind, student, teacher)
    torch.testing.assert_close(found, symmetric_kl(yes_or_no(student), yes_or_no(teacher)))
    assert torch.autograd.grad(found, student)[0].isfinite().all()
    wanted = F.cross_entropy(yes_or_no(student).flatten(0, 1), 1 - labels.long().flatten())
    torch.testing.assert_close(label_loss(kind, student, labels), wanted)
