"""Training keeps what was nearest to the teacher on held-out rows, be it what it began with."""

import copy
import math

import pytest
import torch

from moebert_kernels.compress.training import distillation
from moebert_kernels.compress.training.distillation import DistillSettings, distill, without_dropout
from moebert_kernels.compress.training.divergence import divergence
from moebert_kernels.compress.training.finetuning import last_checkpoint
from moebert_kernels.errors import UserError
from tests.compress.toys import StopAt, make_rows, toy_bert
from tests.tiny import VOCAB, assert_same, build_family, each_family, quartered

SETTINGS = DistillSettings(epochs=3, batch_size=8, learning_rate=1e-3, seed=5)


def a_little_off(teacher, seed=1, by=0.02):
    """A student near its teacher, as a fitted one is."""
    student = copy.deepcopy(teacher).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return student


def train(folder, tokenizer, settings=SETTINGS, dropout=0.1, **options):
    """Returns the student as it was and as it is, what is known of the training, and how to measure."""
    teacher = toy_bert(0, dropout=dropout)
    student, rows, held_out = a_little_off(teacher), make_rows(64), make_rows(24, seed=1)
    before = copy.deepcopy(student)
    found = distill(student, teacher, rows, tokenizer, settings, folder, held_out=held_out, **options)
    return before, student, found, lambda model: divergence(model, teacher, held_out, tokenizer)


@pytest.mark.parametrize("learning_rate", [1e-4, 3e-3, 0.05])
def test_it_is_never_farther_than_it_began(tmp_path, tokenizer, learning_rate):
    """Stops a student that is worse for having been trained, and one that was better an epoch before."""
    said = []
    settings = DistillSettings(epochs=2.5, batch_size=8, learning_rate=learning_rate)
    before, student, found, distance = train(tmp_path, tokenizer, settings, say=said.append)
    distances, kept = found.nearest
    assert len(distances) == 4  # as it began, after two epochs and a half
    assert distances[0] == pytest.approx(distance(before))
    assert distance(student) == pytest.approx(min(distances))
    assert distances[kept] == min(distances)
    if learning_rate == 0.05:
        assert kept == 0
        assert said[-1].startswith("kept as it began: divergence")
        assert_same(student.state_dict(), before.state_dict())


def test_an_epoch_in_the_middle_is_kept(tmp_path, tokenizer, monkeypatch):
    """Stops keeping the last epoch's, or what the optimizer goes on to change."""
    distances, seen = iter([3.0, 2.0, 1.0, 1.5]), []

    def measured(student, *others, **options):
        seen.append(copy.deepcopy(student.state_dict()))
        return next(distances)

    monkeypatch.setattr(distillation, "divergence", measured)
    said = []
    _, student, found, _ = train(tmp_path, tokenizer, say=said.append)
    assert found.nearest == ([3.0, 2.0, 1.0, 1.5], 2)
    assert said[-1].startswith("kept as after epoch 2 of 3: divergence from the teacher on held-out rows 3, ")
    assert_same(student.state_dict(), seen[2])


def test_an_interrupted_run_keeps_what_an_undisturbed_one_does(tmp_path, tokenizer):
    """Stopped before the first checkpoint, at an epoch's end, and between a better epoch and a checkpoint."""
    settings = DistillSettings(epochs=3, batch_size=8, learning_rate=3e-3, seed=5)
    _, undisturbed, whole, _ = train(tmp_path / "whole", tokenizer, settings)
    for stopped_at in (1, 8, 9, 16, 23):
        cut = tmp_path / f"cut-{stopped_at}"
        with pytest.raises(KeyboardInterrupt):
            train(cut, tokenizer, settings, callbacks=[StopAt(stopped_at)])
        assert (last_checkpoint(cut) is None) == (stopped_at < 5)
        _, resumed, found, _ = train(cut, tokenizer, settings)
        assert found == whole
        assert_same(resumed.state_dict(), undisturbed.state_dict())


def test_a_student_that_puts_out_nothing_is_not_kept(tmp_path, tokenizer, monkeypatch):
    """Where the loss itself is still finite."""
    distances = iter([3.0, math.nan])
    monkeypatch.setattr(distillation, "divergence", lambda *models, **how: next(distances))
    with pytest.raises(UserError, match=r"diverged: on held-out rows.*lower learning rate"):
        train(tmp_path, tokenizer)


@pytest.mark.parametrize("family", each_family)
def test_without_dropout_training_computes_what_evaluation_does(family):
    """Stops a family whose dropout is somewhere else: its students would be trained on noise."""
    model = quartered(build_family(family, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    ids = torch.randint(5, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval()(ids).last_hidden_state
        model.train()
        with without_dropout(model):
            assert torch.equal(model(ids).last_hidden_state, expected)
        assert not torch.equal(model(ids).last_hidden_state, expected)
