"""What the student is compared with: made as they should be, through the whole pipeline, with every seed."""

import json
import statistics
from dataclasses import replace

import pytest
import torch
from transformers import BertForSequenceClassification

from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.report.page import render_report
from moebert_kernels.compress.runs.pipeline import compress, stage_names
from moebert_kernels.compress.runs.variants import over_seeds
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.models import is_moe
from tests.compress.toys import SETTINGS, UNMEASURED, Progress, make_data, make_teacher, weights

# Unfitted: a tiny student that is fitted says what its teacher does, and training only moves it away.
EVERYTHING = replace(
    SETTINGS, epochs=1, fit=False, comparisons=("random", "narrow", "layers"), seed=3, seeds=2
)
NAMES = ["student", "random split", "narrow FFN", "fewer layers"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, not to be written to."""
    folder, calls = tmp_path_factory.mktemp("finished"), Progress()
    teacher = make_teacher(folder / "teacher")
    results = compress(EVERYTHING, make_data(), teacher, folder / "out", progress=calls)
    return folder, results, calls


def test_all_of_them_stand_in_the_results_with_every_seed(finished):
    folder, results, calls = finished
    assert read_json(folder / "out" / "results.json") == json.loads(json.dumps(results))
    models = {model["name"]: model for model in results["models"]}
    assert list(models) == ["teacher", *(n for name in NAMES for n in (f"{name} before distillation", name))]
    assert "spread" not in models["teacher"]
    for name in NAMES:
        model = models[name]
        values = [of_seed["quality"]["accuracy"] for of_seed in model["seeds"]]
        assert [of_seed["seed"] for of_seed in model["seeds"]] == [3, 4]
        assert model["quality"]["accuracy"] == pytest.approx(statistics.mean(values))
        assert model["spread"]["accuracy"] == pytest.approx(statistics.stdev(values))
        assert model["latency_ms"]["median"] > 0
        # What is drawn differs from seed to seed before distillation too; what is not is made once.
        assert ("seeds" in models[f"{name} before distillation"]) == (name in ("student", "random split"))
    order = list(dict.fromkeys(stage for stage, *_ in calls))
    assert order == list(results["timings_s"]) == stage_names(EVERYTHING)
    assert "distill fewer layers seed 4" in order
    assert "adapt fewer layers seed 4" not in order
    assert list(results["losses"]) == NAMES


def test_the_seeds_differ_and_the_first_is_kept(finished):
    out = finished[0] / "out"
    for folder in ("student", "random", "narrow", "layers"):
        first = out / "student" if folder == "student" else out / "work" / folder / "distilled"
        second = out / "work" / folder / f"seed-{EVERYTHING.seed + 1}" / "distilled"
        ours, others = weights(first), weights(second)
        assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_the_costs_are_those_of_the_student(finished):
    models = {model["name"]: model for model in finished[1]["models"]}
    student, narrow, fewer = (models[name] for name in ("student", "narrow FFN", "fewer layers"))
    for cost in ("encoder_flops_per_token", "ffn_flops_per_token"):
        assert narrow[cost] == student[cost]
    # A layer of the teacher costs 16,384 and the student 20,480: one layer is nearer than two.
    assert student["encoder_flops_per_token"] == 20480
    assert fewer["encoder_flops_per_token"] == 16384
    assert fewer["kept_layers"] == [2]
    assert "kept_layers" not in narrow


def test_the_narrow_model_has_the_most_important_neurons(finished):
    folder = finished[0]
    scores_LF = Importance.load(folder / "out" / "importance.safetensors").scores_LF
    teacher = BertForSequenceClassification.from_pretrained(folder / "teacher")
    narrow = BertForSequenceClassification.from_pretrained(folder / "out" / "work" / "narrow" / "adapted")
    assert narrow.config.intermediate_size == 16
    for layer, scores_F in enumerate(scores_LF):
        top_F = scores_F.topk(16).indices
        dense, kept = (model.bert.encoder.layer[layer].intermediate.dense for model in (teacher, narrow))
        assert torch.equal(kept.weight, dense.weight[top_F])
        assert torch.equal(kept.bias, dense.bias[top_F])


def test_the_dense_ones_load_as_any_model(finished):
    for folder, num_layers in (("narrow", 2), ("layers", 1)):
        where = finished[0] / "out" / "work" / folder / "distilled"
        model = BertForSequenceClassification.from_pretrained(where)
        assert model.config.num_hidden_layers == num_layers
        assert not is_moe(model.config)


def test_the_report_shows_every_model_and_its_spread(finished):
    page = render_report(finished[1])
    student = next(model for model in finished[1]["models"] if model["name"] == "student")
    assert f"{student['quality']['accuracy']:.3f} ± {student['spread']['accuracy']:.3f}" in page
    for name in NAMES:
        assert name in page


def test_interrupted_in_a_later_seed_it_goes_on_there_and_ends_the_same(finished, tmp_path):
    folder, results, _ = finished
    run, calls = (EVERYTHING, make_data(), folder / "teacher", tmp_path / "out"), Progress()
    with pytest.raises(KeyboardInterrupt):
        compress(*run, progress=Progress(("distill fewer layers seed 4", 2)))
    again = compress(*run, progress=calls)
    names = stage_names(EVERYTHING)
    assert calls.reused == names[: names.index("distill fewer layers seed 4")]
    for key in ("quality", "spread", "seeds"):
        assert [m.get(key) for m in again["models"]] == [m.get(key) for m in results["models"]]


def test_more_seeds_and_comparisons_leave_what_was_made(finished, tmp_path):
    """Who has a student may ask for company later: nothing is distilled twice."""

    def run(**changes):
        settings, calls = replace(EVERYTHING, **UNMEASURED, **changes), Progress()
        compress(settings, make_data(), finished[0] / "teacher", tmp_path / "out", progress=calls)
        return set(calls.done)

    first = run(comparisons=(), seeds=1)
    assert run(comparisons=("narrow",), seeds=2).isdisjoint(first)


def test_a_narrow_model_has_as_many_neurons_as_a_token_meets(tmp_path):
    """Two experts of 16 for every token cost what 32 dense neurons do."""
    teacher = make_teacher(tmp_path / "teacher")
    gated = {"routing": "gate-token", "top_k": 2}
    settings = replace(SETTINGS, epochs=0.1, comparisons=("narrow",), **gated, **UNMEASURED)
    compress(settings, make_data(), teacher, tmp_path / "out")
    narrow = BertForSequenceClassification.from_pretrained(tmp_path / "out" / "work" / "narrow" / "distilled")
    assert narrow.config.intermediate_size == 32


def test_one_seed_is_its_own_mean():
    record = {"quality": {"accuracy": 0.1 + 0.2}, "parameters_stored": 5}
    assert over_seeds([record], [0]) is record
    other = {"quality": {"accuracy": 0.5}, "parameters_stored": 5}
    assert over_seeds([record, other], [7, 8]) == {
        "parameters_stored": 5,
        "quality": {"accuracy": pytest.approx(0.4)},
        "spread": {"accuracy": pytest.approx(0.2 / 2**0.5)},
        "seeds": [{"seed": 7, "quality": record["quality"]}, {"seed": 8, "quality": other["quality"]}],
    }
