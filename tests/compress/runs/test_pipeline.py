"""The whole pipeline on a tiny BERT: what it writes, what it reuses, and that it survives interruption."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM

from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.data.tasks import tokenize
from moebert_kernels.compress.experts.adaptation import token_counts
from moebert_kernels.compress.runs import run
from moebert_kernels.compress.runs.pipeline import compress, stage_names
from moebert_kernels.compress.runs.stages import Stage
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.storage.artifacts import exclusive, fingerprint, replace_whole, write_json
from moebert_kernels.compress.training import distillation as distill
from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertForSequenceClassification
from tests.compress.toys import (
    SETTINGS,
    UNMEASURED,
    Progress,
    assert_same_outcome,
    make_data,
    make_teacher,
    weights,
)
from tests.tiny import assert_same


@pytest.fixture
def teacher(tmp_path):
    return make_teacher(tmp_path / "teacher")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, not to be written to."""
    folder, calls = tmp_path_factory.mktemp("finished"), Progress()
    teacher = make_teacher(folder / "teacher")
    results = compress(SETTINGS, make_data(), teacher, folder / "out", progress=calls)
    return folder / "out", results, calls


def test_results_hold_what_the_report_needs(finished):
    output, results, _ = finished
    assert read_json(output / "results.json") == json.loads(json.dumps(results))
    assert results["format"] == 1
    assert results["task"] == {
        "name": "toy",
        "kind": "classification",
        "main_metric": "accuracy",
        "train_rows": 48,
        "validation_rows": 24,
        "constant_score": pytest.approx(max(np.bincount(make_data().validation["label"])) / 24),
    }
    expected = {"expert_size": 16, "num_shared": 11, "importance_rows": 48, "labels": False, "dropout": False}
    assert expected.items() <= results["settings"].items()
    models = {model["name"]: model for model in results["models"]}
    students = [
        name for kept in ("student", "random split") for name in (f"{kept} before distillation", kept)
    ]
    assert list(models) == ["teacher", *students]
    for model in models.values():
        assert 0 <= model["quality"]["accuracy"] <= 1
        assert model["latency_ms"]["batch_size"] == 1
        assert model["throughput_per_s"]["batch_size"] == 32
        for timing in (model["latency_ms"], model["throughput_per_s"]):
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
            assert timing["sequence_length"] == 16
    assert results["measuring"]["dtype"] == "float32"
    assert models["student"]["ffn_flops_per_token"] * 4 == models["teacher"]["ffn_flops_per_token"]
    assert models["student"]["parameters_used_per_token"] < models["teacher"]["parameters_stored"]
    for shares in results["expert_load_LE"]:
        assert len(shares) == 4
        assert sum(shares) == pytest.approx(1)
    assert list(results["training_load_NLE"]) == ["student", "random split"]
    for name in ("student", "random split"):
        first, second = results["training_load_NLE"][name]
        assert first == second  # by a hash, the same rows go the same way
        assert all(len(shares) == 4 and sum(shares) == pytest.approx(1) for shares in first)
        curve = results["losses"][name]
        assert [point["step"] for point in curve] == list(range(1, 13))
        assert set(curve[0]) == {"step", "layer", "prediction", "total"}  # fitted, so without labels
    for curve in results["importance"]["share_curve_LQ"]:
        assert curve[0] == 0
        assert curve[-1] == pytest.approx(1)
        assert curve[50] > 0.5
    assert results["importance"]["num_samples"] == 48
    assert list(results["timings_s"]) == stage_names(SETTINGS)


def test_fit_is_told_of_and_the_better_student_is_kept(finished):
    """On rows held out of the training rows, the student is never farther from the teacher than fitted."""
    output, results, _ = finished
    assert list(results["fitting"]) == ["student", "random split"]
    for name in ("student", "random split"):
        fitting = results["fitting"][name]
        assert fitting["rows"] == 44  # four are held out
        assert all(fitted < cut for cut, fitted in zip(fitting["cut_L"], fitting["fitted_L"], strict=True))
        distances = fitting["divergence"]
        assert distances["fitted"] < distances["cut"]
        assert distances["distilled"] == min(fitting["epochs"])
        nearer = min(("fitted", "distilled"), key=distances.__getitem__)
        assert fitting["kept"] == nearer
    kept = results["fitting"]["student"]["kept"]
    assert_same(weights(output / "student"), weights(output / "work" / "student" / kept))


@pytest.mark.parametrize("is_nearer", [True, False])
def test_what_is_kept_is_said_and_evaluated(teacher, tmp_path, monkeypatch, is_nearer):
    """Stops a student that is worse for having been trained."""
    # Cut, fitted; as training begins, after two epochs.
    distances = iter([3.0, 2.0, 2.0, 1.0 if is_nearer else 2.5, 3.5])
    for module in (run, distill):
        monkeypatch.setattr(module, "divergence", lambda *models, **how: next(distances))
    said = []
    settings = replace(SETTINGS, epochs=2, comparisons=(), **UNMEASURED)
    results = compress(settings, make_data(), teacher, tmp_path / "out", say=said.append)
    kept = "distilled" if is_nearer else "fitted"
    assert results["fitting"]["student"]["kept"] == kept
    assert results["fitting"]["student"]["divergence"]["distilled"] == (1.0 if is_nearer else 2.5)
    told = "as after epoch 1 of 2" if is_nearer else "as it began"
    assert f"distill student, kept {told}: " in " ".join(said)
    output = tmp_path / "out"
    assert_same(weights(output / "student"), weights(output / "work" / "student" / kept))


def test_without_training_it_ends_with_the_fit_and_goes_on_from_there(teacher, tmp_path):
    """Stops a student/ that is left from the run before, of the other kind."""
    output = tmp_path / "out"
    trained = replace(SETTINGS, epochs=1, comparisons=("narrow", "layers"), **UNMEASURED)
    untrained = replace(trained, distill=False)

    def again(settings):
        calls = Progress()
        results = compress(settings, make_data(), teacher, output, progress=calls)
        assert list(results["timings_s"]) == stage_names(settings)
        return results, calls.done

    results, done = again(untrained)
    assert done == stage_names(untrained)
    assert [m["name"] for m in results["models"]] == ["teacher", "student", "narrow FFN", "fewer layers"]
    assert list(results["fitting"]) == ["student", "narrow FFN"]
    assert results["losses"] == {}
    fitted = weights(output / "student")
    _, done = again(trained)
    assert "fit student" not in done
    assert "distill student" in done
    _, done = again(untrained)
    assert {name.split()[0] for name in done} <= {"save", "expert", "evaluate"}
    assert_same(weights(output / "student"), fitted)


def test_progress_tells_the_truth(finished):
    _, _, calls = finished
    order = list(dict.fromkeys(name for name, *_ in calls))
    assert order == stage_names(SETTINGS)
    for name in order:
        counts = [(done, total) for stage, done, total in calls if stage == name]
        assert counts[0] == (0, 1)
        assert counts[-1][0] == counts[-1][1] > 0
        own = counts[1:]
        assert len({total for _, total in own}) == 1
        assert [done for done, _ in own] == sorted(done for done, _ in own)
    assert ("distill student", 12, 12) in calls
    assert ("importance", 48, 48) in calls


def test_the_student_folder_holds_a_model_and_nothing_else(finished):
    output, _, _ = finished
    names = {path.name for path in (output / "student").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    training = ("optimizer", "scheduler", "rng_state", "training_args")
    assert not {name for name in names if name.startswith(training)}
    adapted = weights(output / "work" / "student" / "adapted")
    assert weights(output / "student").keys() == adapted.keys()
    assert not list((output / "work").rglob("checkpoint-*"))
    assert not list(output.rglob(".unfinished-*"))


def test_interrupted_and_started_again_it_ends_the_same(finished, teacher, tmp_path):
    """Three times, each further on. In other stages, and killed, in test_killed.py."""
    names, output = stage_names(SETTINGS), tmp_path / "out"
    for interrupted_at in (("importance", 32), ("fit student", 2), ("distill student", 9)):
        with pytest.raises(KeyboardInterrupt):
            compress(SETTINGS, make_data(), teacher, output, progress=Progress(interrupted_at))
        assert not (output / "results.json").exists()
    calls = Progress()
    compress(SETTINGS, make_data(), teacher, output, progress=calls)
    assert_same_outcome(finished[0], output)
    assert calls.reused == names[: names.index("distill student")]
    first_step = next(c for c in calls if c[0] == "distill student" and c[2] == 12)
    assert first_step[1] == 5  # the last checkpoint, not the start


def test_unchanged_stages_are_reused_and_changed_ones_are_not(tmp_path):
    """And where there is something to learn, layers come nearer to the teacher's."""
    teacher = make_teacher(tmp_path / "teacher", initializer_range=0.2)
    # Unfitted: where the fitted student is kept, what comes after has nothing new to work on.
    output, settings = tmp_path / "out", replace(SETTINGS, epochs=1, comparisons=(), fit=False)

    def again(data=None, **changes):
        calls = Progress()
        compress(replace(settings, **changes), data or make_data(), teacher, output, progress=calls)
        return calls.done

    everything = stage_names(settings)
    assert again() == everything
    curve = read_json(output / "results.json")["losses"]["student"]
    assert curve[-1]["layer"] < 0.9 * curve[0]["layer"]
    assert again() == []
    assert again(distill_weight=2.0) == everything[4:]
    assert again(distill_weight=2.0, **UNMEASURED) == []
    unmeasured = read_json(output / "results.json")
    assert unmeasured["measuring"] is None
    assert all(m["latency_ms"] is m["throughput_per_s"] is None for m in unmeasured["models"])
    assert "measure" not in unmeasured["timings_s"]
    changes = {"distill_weight": 2.0, "measure_length": 8}
    assert again(**changes) == ["measure"]
    changed = replace(make_data(), validation=make_data(seed=1).validation)
    evaluations = [name for name in everything if name.startswith("evaluate")]
    assert again(changed, **changes) == [*evaluations, "expert load", "measure"]
    shutil.rmtree(output / "student")
    assert again(changed, **changes) == ["save student"]
    shutil.rmtree(output / "work" / "student" / "distilled")
    assert "distill student" in again(changed, **changes)


def test_regression_and_learned_gates_run_through(tmp_path):
    teacher = make_teacher(tmp_path / "teacher", num_labels=1)
    gated = {"routing": "gate-token", "top_k": 2, "labels": True}
    settings = replace(SETTINGS, epochs=1, comparisons=(), **gated, **UNMEASURED)
    results = compress(settings, make_data(kind="regression"), teacher, tmp_path / "out")
    assert results["task"]["kind"] == "regression"
    assert set(results["models"][0]["quality"]) == {"pearson", "spearman"}
    for point in results["losses"]["student"]:
        assert point["balance"] >= 0.9
        weighted = point["ce"] + point["layer"] + point["prediction"] + 0.01 * point["balance"]
        assert point["total"] == pytest.approx(weighted, rel=1e-4)


def test_balanced_hashing_counts_the_training_tokens(teacher, tmp_path):
    settings = replace(SETTINGS, epochs=0.1, routing="hash-balance", comparisons=(), **UNMEASURED)
    results = compress(settings, make_data(), teacher, tmp_path / "out")
    for shares in results["expert_load_LE"]:
        assert max(shares) - min(shares) < 0.15


def test_affinity_makes_neurons_and_tables_together_and_is_served_as_any_hash(teacher, tmp_path):
    """The comparison keeps a drawn table: scores drawn at random know no tokens."""
    settings = replace(SETTINGS, epochs=0.1, routing="hash-affinity", **UNMEASURED)
    output, calls = tmp_path / "out", Progress()
    compress(settings, make_data(), teacher, output, progress=calls)
    assert ("adapt student", 1, 2) in calls
    tokens = Importance.load(output / "importance.safetensors").tokens
    assert tokens.group_V.shape == (45,)
    student = MoEBertForSequenceClassification.from_pretrained(output / "student")
    assert student.config.routing == "hash-affinity"
    adapted = weights(output / "work" / "student" / "adapted")
    tables_LV = student.bert.encoder.tables_LV
    assert torch.equal(adapted["bert.encoder.tables_LV"], tables_LV)
    counts_V = token_counts(tokenize(make_data(), AutoTokenizer.from_pretrained(teacher), 16).train, 45)
    for table_V in tables_LV.long():
        load_E = torch.zeros(4, dtype=torch.long).index_add_(0, table_V, counts_V)
        assert int(load_E.max()) <= 1.1 * int(counts_V.sum()) / 4
    assert read_json(output / "work" / "random" / "distilled" / "config.json")["routing"] == "hash-random"
    compress(settings, make_data(), teacher, output, progress=calls)
    assert {"importance", "adapt student"} <= set(calls.reused)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"routing": "hash"}, "routing must be one of hash-random"),
        ({"epochs": 0}, "epochs must be more than 0, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be more than 0, got nan"),
        ({"learning_rate": 1e9}, r"learning_rate must be less than 1, got 1e\+09: a step moves every weight"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"distill_weight": -1}, "distill_weight must not be negative"),
        ({"top_k": 2}, "top_k must be 1"),
        ({"routing": "gate-token", "top_k": 5}, "must not exceed the 4 experts"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"comparisons": ("best",)}, "comparisons must be from random, narrow, layers; got 'best'"),
    ],
)
def test_senseless_settings_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(SETTINGS, **changes)


def test_what_cannot_work_is_said_before_any_work(teacher, tmp_path):
    output = tmp_path / "out"

    def refused(sentence, settings=SETTINGS, data=None, teacher=teacher, output=output):
        with pytest.raises(UserError, match=sentence):
            compress(settings, data or make_data(), teacher, output)
        assert not output.exists() or not list(output.glob("work/**/*"))

    refused("^teacher_dir: there is no folder", teacher=tmp_path / "nowhere")
    refused("not a model for classification", teacher=make_teacher(tmp_path / "mlm", head=BertForMaskedLM))
    for routing in ("hash-random", "hash-affinity"):
        wide = replace(SETTINGS, routing=routing, expert_size=40, num_shared=6)
        refused("need 142 neurons", settings=wide)
    refused("max_length is 64", settings=replace(SETTINGS, max_length=64))
    refused("has 2 outputs", data=make_data(kind="regression"))
    refused("already holds a model", output=teacher)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=r"^output_dir: .* is a file; give a folder"):
        compress(SETTINGS, make_data(), teacher, file)
    (output / "student").mkdir(parents=True)
    (output / "student" / "thesis.tex").write_text("years of work")
    refused("holds student, which no run of this command has made")
    assert (output / "student" / "thesis.tex").exists()
    assert os.listdir(output) == ["student"]


def test_damaged_teachers_are_refused(teacher, tmp_path):
    (teacher / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        compress(SETTINGS, make_data(), teacher, tmp_path / "out")


def test_a_second_run_on_the_same_folder_is_told_so(teacher, tmp_path):
    with exclusive(tmp_path / "out"), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        compress(SETTINGS, make_data(), teacher, tmp_path / "out")


def test_the_lock_of_a_killed_process_does_not_stay(tmp_path):
    child = os.fork()
    if child == 0:
        with exclusive(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with exclusive(tmp_path):
        pass


def test_files_and_folders_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with replace_whole(target) as fresh:
        fresh.mkdir()
        (fresh / "weights").write_text("first")

    def write_half():
        with replace_whole(target) as fresh:
            fresh.mkdir()
            (fresh / "weights").write_text("half of the sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (target / "weights").read_text() == "first"
    with replace_whole(target) as fresh:
        fresh.mkdir()
        (fresh / "other").write_text("second")
    assert [path.name for path in target.iterdir()] == ["other"]

    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [float("nan")])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "a.json"}


def test_a_stage_counts_the_time_of_interrupted_attempts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stage = Stage(tmp_path / "stage.json", fingerprint("a"))

    def work():
        now[0] += 7
        if now[0] < 110:
            raise KeyboardInterrupt
        return "result"

    with pytest.raises(KeyboardInterrupt):
        stage.run(work)
    assert stage.run(work) == "result"
    assert stage.seconds == 14
    assert stage.run(work) == "result"
    assert stage.seconds == 14
    assert Stage(tmp_path / "stage.json", fingerprint("b")).seconds == 0


def test_share_curves_of_known_scores():
    scores = torch.tensor([[1.0, 4.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    curves = Importance(scores, "m", "t", 1).share_curve_LQ(points=5)
    assert curves == [[0, 0.5, 0.75, 0.875, 1], [0, 0, 0, 0, 0]]
