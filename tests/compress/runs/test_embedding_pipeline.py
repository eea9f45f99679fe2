"""`compress` for sentence-embedding models, on a tiny one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import spearmanr

from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.data.sentences import load_sentences
from moebert_kernels.compress.evaluation.likeness import embedding_likeness
from moebert_kernels.compress.report.page import render_report
from moebert_kernels.compress.report.terminal import results_table
from moebert_kernels.compress.runs.pipeline import compress, stage_names
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.storage.sentence_encoder import load_sentence_encoder
from moebert_kernels.errors import UserError
from moebert_kernels.models import is_moe
from tests.compress.toys import UNMEASURED, Progress, weights
from tests.sentence_encoders import TEXTS, make_folder
from tests.tiny import assert_same

SETTINGS = CompressSettings(epochs=3, batch_size=8, measure_length=8, learning_rate=3e-3, comparisons=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    make_folder(folder / "teacher")
    (folder / "sentences.txt").write_text("\n".join(3 * TEXTS))
    return folder


def make_data(folder):
    data = load_sentences(folder / "sentences.txt")
    scores = [len({*a.split()} & {*b.split()}) for a, b in zip(TEXTS[:12], TEXTS[12:], strict=True)]
    pairs = Dataset.from_dict({"text": TEXTS[:12], "text_pair": TEXTS[12:], "label": scores})
    task = replace(data.task, main_metric="spearman_pairs")
    return replace(data, task=task, further_validation={"pairs": pairs})


@pytest.fixture(scope="module")
def finished(folder):
    """A run with scored pairs, not to be written to."""
    said = []
    results = compress(SETTINGS, make_data(folder), folder / "teacher", folder / "out", say=said.append)
    return folder / "out", results, said


def test_results_say_what_the_student_is_worth(folder, finished):
    output, results, said = finished
    assert read_json(output / "results.json") == json.loads(json.dumps(results))
    models = {model["name"]: model["quality"] for model in results["models"]}
    assert list(models) == ["teacher", "student before distillation", "student"]
    assert models["teacher"]["cosine"] == pytest.approx(1)
    assert models["teacher"]["similarity_spearman"] == pytest.approx(1)
    assert 0.9 < models["student before distillation"]["cosine"] < 1
    assert 0.9 < models["student"]["cosine"] < 1
    distances = results["fitting"]["student"]["divergence"]
    assert set(distances) == {"cut", "fitted", "distilled"}
    assert distances[results["fitting"]["student"]["kept"]] == min(distances.values())
    assert set(results["losses"]["student"][0]) == {"step", "layer", "embedding", "total"}
    assert results["settings"]["max_length"] == 9  # where the teacher cuts sentences
    assert list(results["timings_s"]) == stage_names(SETTINGS)
    assert len(results["training_load_NLE"]["student"]) == 3
    epochs = [f"distill student, epoch {n} of 3" for n in (1, 2, 3)]
    assert [sentence.split(":")[0] for sentence in said][:4] == ["fit student", *epochs]
    page = render_report(results)
    assert "embedding: squared distance from the teacher" in page
    assert "fine-tuned teacher" not in page
    assert results_table(results).row_count == 3
    assert Importance.load(output / "importance.safetensors").model == "teacher"


def test_sentence_transformers_finds_the_same(folder, finished):
    """The student as its users load it, against the figures in results.json."""
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    output, results, _ = finished
    data = make_data(folder)
    for name, where in (("teacher", folder / "teacher"), ("student", output / "student")):
        quality = next(model["quality"] for model in results["models"] if model["name"] == name)
        model = package.SentenceTransformer(str(where), device="cpu")
        pairs = data.further_validation["pairs"]
        ours, others = (model.encode(pairs[column]) for column in ("text", "text_pair"))
        expected = spearmanr((ours * others).sum(1), pairs["label"]).statistic
        assert quality["spearman_pairs"] == pytest.approx(expected, abs=1e-6)
        teacher = package.SentenceTransformer(str(folder / "teacher"), device="cpu")
        texts = data.validation["text"]
        cosine = (model.encode(texts) * teacher.encode(texts)).sum(1).mean()
        assert quality["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert is_moe(load_sentence_encoder(output / "student").model.config)


def test_interrupted_and_started_again_it_ends_the_same(folder, finished, tmp_path):
    run, calls = (SETTINGS, make_data(folder), folder / "teacher", tmp_path / "out"), Progress()
    with pytest.raises(KeyboardInterrupt):
        compress(*run, progress=Progress(("distill student", 14)))
    results = compress(*run, progress=calls)
    names = stage_names(SETTINGS)
    assert calls.reused == names[: names.index("distill student")]
    for key in ("losses", "training_load_NLE", "expert_load_LE"):
        assert results[key] == finished[1][key]
    assert_same(weights(tmp_path / "out" / "student"), weights(finished[0] / "student"))


def test_a_changed_pooling_is_another_teacher(folder, tmp_path):
    """Its file lies in a folder of its own, which the fingerprint of a plain model does not see."""
    make_folder(tmp_path / "teacher", pooling="mean")
    settings = replace(SETTINGS, epochs=0.2, **UNMEASURED)
    run = (settings, make_data(folder), tmp_path / "teacher", tmp_path / "out")
    compress(*run)
    (tmp_path / "teacher" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    calls = Progress()
    with pytest.warns(UserWarning, match="holds a run with other settings or data"):
        compress(*run, progress=calls)
    assert "importance" not in calls.reused
    assert load_sentence_encoder(tmp_path / "out" / "student").pooling == "cls"


def test_another_routing_and_models_of_equal_cost(folder, tmp_path):
    comparisons = ("random", "narrow", "layers")
    settings = replace(SETTINGS, epochs=0.2, routing="hash-affinity", comparisons=comparisons, **UNMEASURED)
    data = load_sentences(folder / "sentences.txt")
    results = compress(settings, data, folder / "teacher", tmp_path / "out")
    assert len(results["models"]) == 3 + 2 * len(comparisons)
    for model in results["models"]:
        assert set(model["quality"]) == {"cosine", "similarity_spearman"}
    assert set(results["training_load_NLE"]) == {"student", "random split"}
    render_report(results)


def test_training_brings_embeddings_nearer_to_the_teachers(folder, tmp_path):
    """Unfitted: a tiny student that is fitted is as good as its teacher, and is kept as it was."""
    settings = replace(SETTINGS, epochs=1, routing="gate-sentence", fit=False, **UNMEASURED)
    data = load_sentences(folder / "sentences.txt")
    results = compress(settings, data, folder / "teacher", tmp_path / "out")
    cosine = {model["name"]: model["quality"]["cosine"] for model in results["models"]}
    assert cosine["student before distillation"] + 0.01 < cosine["student"] < 1


def test_folders_that_are_no_teacher_are_refused(folder, finished, tmp_path):
    data = make_data(folder)
    for teacher, message in (
        (finished[0] / "student", "is a MoE already"),
        (tmp_path / "nowhere", "no .*modules.json: give the folder of a sentence_transformers model"),
    ):
        with pytest.raises(UserError, match=message):
            compress(SETTINGS, data, teacher, tmp_path / "out")
    with pytest.raises(UserError, match="max_length is 999"):
        compress(replace(SETTINGS, max_length=999), data, folder / "teacher", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_agreement_of_known_embeddings():
    theirs_ND = np.array([[1.0, 0], [0, 2], [1, 1]])
    same = embedding_likeness(5 * theirs_ND, theirs_ND)
    assert same == {"cosine": pytest.approx(1), "similarity_spearman": pytest.approx(1)}
    turned = embedding_likeness(theirs_ND @ np.array([[0.0, 1], [-1, 0]]), theirs_ND)
    assert turned == {"cosine": pytest.approx(0), "similarity_spearman": pytest.approx(1)}
    assert embedding_likeness(np.ones((3, 2)), theirs_ND)["similarity_spearman"] == 0
