"""Dense encoders made smaller: the numbers of the parts that were kept, and plain transformers models."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from moebert_kernels.models import (
    encoder_flops_per_token,
    evenly_spaced_layers,
    ffn_flops_per_token,
    find_ffns,
    keep_layers,
    layers_of_equal_cost,
    narrow_ffns,
)
from moebert_kernels.models.families import find_base
from tests.tiny import HIDDEN, LAYERS, WIDTH, batch, build_family, each_family, quartered

HEAD = "ForSequenceClassification"
FEW = 24


def index_of_few(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(WIDTH, generator=generator)[:FEW] for _ in range(LAYERS)])


@torch.no_grad()
def states(model):
    return model(**batch(), output_hidden_states=True)


@pytest.mark.parametrize("name", each_family)
def test_a_narrow_model_is_the_dense_one_without_the_other_neurons(name):
    teacher, index_LF = build_family(name, HEAD).double(), index_of_few()
    before = states(teacher).logits
    narrow = narrow_ffns(teacher, index_LF)
    assert torch.equal(states(teacher).logits, before)
    assert ffn_flops_per_token(narrow) == LAYERS * 4 * FEW * HIDDEN
    for ffn, index_F in zip(find_ffns(teacher), index_LF, strict=True):
        others = torch.ones(WIDTH, dtype=torch.bool)
        others[index_F] = False
        ffn.w2.weight.data[:, others] = 0
    torch.testing.assert_close(states(narrow).logits, states(teacher).logits)


@pytest.mark.parametrize("name", each_family)
def test_kept_layers_are_run_one_after_the_other(name):
    teacher = build_family(name, HEAD).double()
    fewer = keep_layers(teacher, [0, 2])
    assert len(find_ffns(teacher)) == LAYERS
    base, family = find_base(teacher)
    encoder = getattr(base, family.encoder_name)
    encoder.layer[1].forward = lambda hidden_states, *args, **kwargs: (
        hidden_states if family.name not in ("MPNet", "DebertaV2") else (hidden_states, None)
    )
    expected, found = states(teacher), states(fewer)
    assert len(found.hidden_states) == 3
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("name", each_family)
@pytest.mark.parametrize("how", ["narrow", "layers"])
def test_they_are_saved_and_loaded_as_models_of_transformers(name, how, tmp_path):
    teacher = build_family(name, HEAD)
    small = narrow_ffns(teacher, index_of_few()) if how == "narrow" else keep_layers(teacher, [1, 2])
    small.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(teacher)
    torch.testing.assert_close(states(loaded).logits, states(small).logits)


def test_what_is_made_of_a_frozen_teacher_can_be_trained():
    """Distillation freezes its teacher: the next student cut from it was frozen too, but for its experts."""
    teacher = build_family("Bert", HEAD).requires_grad_(False)
    for model in (narrow_ffns(teacher, index_of_few()), keep_layers(teacher, [1]), quartered(teacher)):
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("num_layers", "num_kept", "kept"),
    [
        (12, 6, [1, 3, 5, 7, 9, 11]),
        (6, 3, [1, 3, 5]),
        (12, 5, [1, 3, 6, 8, 11]),
        (3, 1, [2]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_layers_are_kept_at_even_distances_up_to_the_last(num_layers, num_kept, kept):
    assert evenly_spaced_layers(num_layers, num_kept) == kept


def test_so_many_layers_are_kept_as_cost_the_same():
    teacher = build_family("Bert", HEAD)
    cost = encoder_flops_per_token(teacher)
    for share, kept in ((0.0, [2]), (0.34, [2]), (0.6, [0, 2]), (0.9, [0, 1, 2]), (2.0, [0, 1, 2])):
        assert layers_of_equal_cost(teacher, round(share * cost)) == kept


@pytest.mark.parametrize(
    ("index_LF", "message"),
    [
        (torch.zeros(LAYERS, 4), "must be integer"),
        (torch.zeros(LAYERS + 1, 4, dtype=torch.long), r"\[L=3, F\]"),
        (torch.full((LAYERS, 1), WIDTH), r"neurons in \[0, 64\)"),
        (torch.zeros(LAYERS, 0, dtype=torch.long), "at least one"),
        (torch.zeros(LAYERS, 2, dtype=torch.long), "twice"),
    ],
)
def test_neurons_that_do_not_fit_are_refused(index_LF, message):
    with pytest.raises(ValueError, match=message):
        narrow_ffns(build_family("Bert"), index_LF)


@pytest.mark.parametrize("kept", [[], [0, 3], [1, 0], [-1], [1, 1]])
def test_layers_that_do_not_fit_are_refused(kept):
    with pytest.raises(ValueError, match=r"rising indices of layers in \[0, 3\)"):
        keep_layers(build_family("Bert"), kept)
