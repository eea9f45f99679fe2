"""python_ref.distillation against losses worked by hand and torch's own losses."""

import math

import pytest
import torch
from torch.nn import functional

from python_ref.distillation import layer_loss, prediction_loss, symmetric_kl, total_loss
from tests.reference.draws import randn


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


class TestLayerLoss:
    def test_by_hand(self):
        # The real token's differences are (1, 3) and (2, 0): (1 + 9) / 2 + (4 + 0) / 2
        student = [torch.tensor([[[1.0, 3.0], [50.0, 60.0]]]), torch.tensor([[[5.0, 1.0], [70.0, 80.0]]])]
        teacher = [torch.zeros(1, 2, 2), torch.tensor([[[3.0, 1.0], [0.0, 0.0]]])]
        assert layer_loss(student, teacher, torch.tensor([[1, 0]])).item() == 7.0

    def test_without_padding_it_is_torchs_mse_summed_over_states(self):
        student, teacher = randn(4, 2, 3, 5), randn(4, 2, 3, 5, seed=1)
        expected = sum(functional.mse_loss(s, t) for s, t in zip(student, teacher, strict=True))
        torch.testing.assert_close(layer_loss(list(student), list(teacher), torch.ones(2, 3)), expected)

    def test_every_real_token_weighs_the_same_whatever_its_sentence(self):
        student, teacher = torch.zeros(2, 3, 1), torch.tensor([[[3.0], [0], [0]], [[0], [0], [0]]])
        # A sentence of 1 token with error 9, one of 3 tokens with none: 9 / 4; a mean of sentences is 9 / 2
        mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
        assert layer_loss([student], [teacher], mask).item() == 2.25

    def test_padding_enters_nothing(self):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        student, teacher = randn(1, 2, 3, 5), randn(1, 2, 3, 5, seed=1)
        clean = layer_loss(list(student), list(teacher), mask)
        student[0][mask == 0] = torch.nan
        student = student.requires_grad_()
        loss = layer_loss(list(student), list(teacher), mask)
        assert loss.item() == clean.item()
        gradient = torch.autograd.grad(loss, student)[0][0]
        assert (gradient[mask == 0] == 0).all()
        assert (gradient[mask == 1] != 0).all()

    def test_gradients(self):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        states = [randn(2, 3, 2, seed=seed).requires_grad_() for seed in range(4)]
        assert torch.autograd.gradcheck(lambda *s: layer_loss(s[:2], s[2:], mask), states)

    def test_different_depths_are_refused(self):
        with pytest.raises(ValueError, match="student_states has 1 states, teacher_states 2"):
            layer_loss([torch.zeros(1, 1, 1)], [torch.zeros(1, 1, 1)] * 2, torch.ones(1, 1))


class TestSymmetricKL:
    def test_by_hand(self):
        # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 (1/4 ln 2 - 1/4 ln 2/3) = 1/8 ln 3; the second sample agrees.
        student = torch.tensor([log(1 / 2, 1 / 2), [3.0, 1.0]])
        teacher = torch.tensor([log(1 / 4, 3 / 4), [7.0, 5.0]])
        assert symmetric_kl(student, teacher).item() == pytest.approx(math.log(3) / 16, rel=1e-6)

    def test_is_half_of_torchs_kl_both_ways(self):
        student, teacher = randn(6, 4), randn(6, 4, seed=1)
        log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        there = functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        back = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        torch.testing.assert_close(symmetric_kl(student, teacher), (there + back) / 2)
        torch.testing.assert_close(symmetric_kl(teacher, student), symmetric_kl(student, teacher))

    def test_saturated_probabilities_stay_finite(self):
        """Stops log(0): p = (1, 0) and q = (0, 1) to float precision, log-probabilities 0 and -2000."""
        student = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
        loss = symmetric_kl(student, -student.detach())
        assert loss.item() == 2000.0
        # dL/dlogit = 1/2 (p_c (d_c - <p, d>) + p_c - q_c) with d = log p - log q = (2000, -2000)
        assert torch.autograd.grad(loss, student)[0].tolist() == [[0.5, -0.5]]

    def test_gradients(self):
        assert torch.autograd.gradcheck(
            symmetric_kl, (randn(3, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_())
        )


class TestPredictionLoss:
    def test_classification_is_the_symmetric_kl(self):
        student, teacher = randn(6, 4), randn(6, 4, seed=1)
        assert prediction_loss("classification", student, teacher) == symmetric_kl(student, teacher)

    def test_regression_by_hand(self):
        student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [1.0]])
        assert prediction_loss("regression", student, teacher).item() == 5.0  # (9 + 1) / 2

    def test_question_answering_averages_start_and_end(self):
        # start: 1/8 ln 3 as above; end: agrees
        student = (torch.tensor([log(1 / 2, 1 / 2)]), torch.tensor([[0.0, 4.0]]))
        teacher = (torch.tensor([log(1 / 4, 3 / 4)]), torch.tensor([[1.0, 5.0]]))
        loss = prediction_loss("question_answering", student, teacher)
        assert loss.item() == pytest.approx(math.log(3) / 16, rel=1e-6)

    def test_question_answering_without_padding_positions(self):
        """The second sample has two positions: with the third it would be another distribution."""
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        student, teacher = (randn(2, 3), randn(2, 3, seed=1)), (randn(2, 3, seed=2), randn(2, 3, seed=3))
        expected = sum(
            symmetric_kl(s[:1], t[:1]) + symmetric_kl(s[1:, :2], t[1:, :2])
            for s, t in zip(student, teacher, strict=True)
        )
        torch.testing.assert_close(
            prediction_loss("question_answering", student, teacher, mask), expected / 4
        )
        all_real = prediction_loss("question_answering", student, teacher, torch.ones(2, 3))
        torch.testing.assert_close(all_real, prediction_loss("question_answering", student, teacher))

    def test_token_classification_is_a_mean_over_real_tokens(self):
        student = torch.tensor([[log(1 / 2, 1 / 2), log(0.1, 0.9)], [log(0.3, 0.7), log(0.3, 0.7)]])
        teacher = torch.tensor([[log(1 / 4, 3 / 4), log(0.9, 0.1)], [log(0.3, 0.7), log(0.3, 0.7)]])
        # Three real tokens: 1/8 ln 3, 0, 0
        loss = prediction_loss("token_classification", student, teacher, torch.tensor([[1, 0], [1, 1]]))
        assert loss.item() == pytest.approx(math.log(3) / 24, rel=1e-6)

    def test_token_classification_without_mask_takes_every_token(self):
        student, teacher = randn(2, 3, 4), randn(2, 3, 4, seed=1)
        torch.testing.assert_close(
            prediction_loss("token_classification", student, teacher),
            prediction_loss("token_classification", student, teacher, torch.ones(2, 3)),
        )

    def test_unknown_kinds_and_wrong_forms_are_refused(self):
        one = torch.zeros(1, 2)
        with pytest.raises(ValueError, match="kind is 'ranking', expected one of classification"):
            prediction_loss("ranking", one, one)
        with pytest.raises(ValueError, match="question_answering expects student and teacher as tuples"):
            prediction_loss("question_answering", one, one)
        with pytest.raises(ValueError, match="classification expects student and teacher as one tensor"):
            prediction_loss("classification", (one, one), (one, one))

    def test_gradients_with_a_mask(self):
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        logits = [randn(2, 3, seed=seed).requires_grad_() for seed in range(4)]
        assert torch.autograd.gradcheck(
            lambda a, b, c, d: prediction_loss("question_answering", (a, b), (c, d), mask), logits
        )


def test_total_loss_by_hand():
    ce, layer, prediction = torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.25)
    assert total_loss(ce, layer, prediction, 3.0).item() == 7.25  # 0.5 + 3 (2 + 0.25)
