"""The comparison of contenders on tasks: small models, whole path."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn import metrics
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from bench.quality.__main__ import app
from bench.quality.bootstrap import Interval, Resampled
from bench.quality.contenders import CONTENDERS
from bench.quality.records import read, read_rows
from bench.quality.remembered import RememberedLayers, RememberedTeacher
from bench.quality.study import largest_load
from bench.quality.tables import Contrasts, settings_table, table
from bench.readme import update
from moebert_kernels.compress.evaluation.quality import expert_load
from moebert_kernels.compress.experts.adaptation import split_neurons
from moebert_kernels.compress.experts.fitting import fit
from moebert_kernels.models import count_parameters, find_ffns, to_moe
from tests import tiny
from tests.tiny import WIDTH, batch, build

WORDS = [f"w{i}" for i in range(60)]


def test_a_remembered_teacher_says_what_the_teacher_says():
    """In whatever company and order its rows come again; and only new rows are computed."""
    teacher = build(BertForSequenceClassification).eval()
    remembered = RememberedTeacher(teacher)
    inputs = batch(seed=3)
    mask_BS = inputs["attention_mask"].bool()
    for rows in ([0, 1, 2], [2, 0], [1]):
        longest = int(mask_BS[rows].sum(1).max())
        features = {name: value[rows, :longest] for name, value in inputs.items()}
        with torch.no_grad():
            ours, theirs = remembered(**features), teacher(**features, output_hidden_states=True)
        torch.testing.assert_close(ours.logits, theirs.logits)
        for our_BSD, their_BSD in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            real_BS = mask_BS[rows, :longest]
            torch.testing.assert_close(our_BSD[real_BS], their_BSD[real_BS])
    remembered.teacher.forward = None  # from here on, memory alone
    remembered(**inputs)


def test_the_largest_load_is_that_of_the_experts_in_a_pass():
    """It is read off tables and token counts: what a pass of the student finds, padding left out."""
    index_LEF = split_neurons(torch.rand(3, WIDTH), 4, 9, 3)
    student = to_moe(
        build(BertForSequenceClassification, num_hidden_layers=3), index_LEF, num_shared_neurons=3
    )
    inputs = batch(seed=5)
    rows = Dataset.from_dict({name: inputs[name].tolist() for name in ("input_ids", "attention_mask")})
    assert largest_load(student, rows) == pytest.approx(4 * max(map(max, expert_load(student, [inputs]))))


def test_layers_from_memory_fit_a_student_as_the_teacher_does():
    """To the last bit, for the student that fills the memory and for those after it."""
    teacher = build(BertForSequenceClassification, num_hidden_layers=3).eval()
    batches = [batch(seed=seed) for seed in range(3)]

    def cut(num_experts: int) -> torch.nn.Module:
        scores_LF = torch.rand(3, WIDTH, generator=torch.Generator().manual_seed(0))
        index_LEF = split_neurons(scores_LF, num_experts, 9, 3)
        return to_moe(teacher, index_LEF, num_shared_neurons=3)

    students, wanted = [cut(4), cut(2)], [cut(4), cut(2)]
    for student in wanted:
        fit(student, teacher, batches)
    remembered = RememberedLayers(teacher)
    for ours, theirs in zip(students, wanted, strict=True):
        with remembered.answering():
            fit(ours, teacher, batches)
        state = theirs.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
        for ffn in find_ffns(teacher):  # from here on, memory alone
            ffn.layer.attention = None


@pytest.fixture
def glue(tmp_path) -> list[str]:
    """A call of `bench.quality run` on a small CoLA with a small model and one seed."""
    model = build(BertForSequenceClassification, intermediate_size=60, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer(tmp_path, WORDS, model_max_length=32).save_pretrained(tmp_path / "model")
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    for name, count in (("train.tsv", 40), ("dev.tsv", 16)):
        lines = [
            f"src\t{i % 2}\t\t{' '.join(WORDS[(i * j) % 60] for j in range(1, 8))}" for i in range(count)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")
    return [
        *("run", "--data", str(tmp_path / "glue"), "--out", str(tmp_path / "out")),
        *("--model", str(tmp_path / "model"), "--tasks", "cola", "--seeds", "1"),
        *("--max-length", "16", "--teacher-epochs", "1", "--batch-size", "8"),
    ]


def test_all_contenders_run_resume_and_fill_the_table(glue, tmp_path):
    call = [*glue, "--distill", "--epochs", "1", "--train-rows", "32"]
    runner = CliRunner()
    stopped = runner.invoke(app, [*call, "--limit", "0"], catch_exceptions=False)
    assert stopped.exit_code == 0
    assert not (tmp_path / "out" / "records").exists()
    result = runner.invoke(app, call, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = {path: path.read_bytes() for path in (tmp_path / "out" / "records" / "main" / "cola").iterdir()}
    assert {path.stem for path in found} == {f"{name}-seed0" for name in CONTENDERS}

    again = runner.invoke(app, call, catch_exceptions=False)
    assert again.exit_code == 0
    assert all(path.read_bytes() == before for path, before in found.items())

    collected = runner.invoke(
        app, ["collect", str(tmp_path / "out"), "--to", str(tmp_path / "quality")], catch_exceptions=False
    )
    assert collected.exit_code == 0
    file = tmp_path / "quality" / "main.jsonl"
    runs = {record["contender"]: record for record in read(file)}
    costs = {name: record["encoder_flops_per_token"] for name, record in runs.items()}
    assert len({cost for name, cost in costs.items() if name != "layers"}) == 1
    assert costs["layers"] == pytest.approx(costs["narrow"], rel=0.3)
    assert runs["affinity-4-tied"]["parameters_stored"] < runs["affinity-4"]["parameters_stored"]
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert runs["narrow"]["parameters_stored"] < count_parameters(dense)
    for name, contender in CONTENDERS.items():
        steps = ["cut", "fitted", "distilled"] if contender.can_be_fitted else ["cut", "distilled"]
        assert list(runs[name]["states"]) == steps
        # What training keeps is what was nearest to the teacher on rows held out of the training rows.
        training = runs[name]["training"]
        assert training["held_out"][training["kept_epoch"]] == min(training["held_out"])
        assert runs[name]["kept"] == "distilled"
        if contender.can_be_fitted:
            states = runs[name]["states"]
            assert states["fitted"]["divergence"] < states["cut"]["divergence"]
    kept = read_rows(file)
    for name, record in runs.items():  # what is kept of every row gives the record's figures again
        said_N, state = kept[f"cola/{name}/0/distilled/predictions"], record["states"]["distilled"]
        assert metrics.matthews_corrcoef(kept["cola/labels"], said_N) == pytest.approx(state["matthews"])
        assert (said_N == kept["cola/teacher"]).mean() == pytest.approx(state["agreement"])
        far_N = kept[f"cola/{name}/0/distilled/divergence"]
        assert far_N.mean(dtype=float) == pytest.approx(state["divergence"], rel=1e-2)
    lines = runner.invoke(app, ["table", str(file)], catch_exceptions=False).stdout.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    main = rows[: 3 + len(CONTENDERS)]
    assert {row.split("|")[1].strip() for row in main[3:]} == set(CONTENDERS)
    assert len({line.count("|") for line in main}) == 1
    block = "<!-- bench:quality-{0}:begin -->\n<!-- bench:quality-{0}:end -->"
    shown = update(block.format("main") + block.format("other"), tmp_path)
    assert "\n".join(main) in shown
    assert shown.count("not measured yet") == 1


def test_a_budget_of_an_eighth_is_cut_and_fitted_alone(glue):
    """The cost is the contenders' own; nothing is trained unless that is asked for. What processes beside
    each other have made is not made again."""
    folder = Path(glue[4]) / "records" / "sixth" / "cola"

    def call(*contenders: str, jobs: int) -> None:
        options = f"--contenders {','.join(contenders)} --cost 6 --study sixth --jobs {jobs}"
        assert CliRunner().invoke(app, [*glue, *options.split()], catch_exceptions=False).exit_code == 0

    call("narrow", jobs=2)
    made = (folder / "narrow-seed0.json").read_bytes()
    call("narrow", "affinity-4", jobs=1)
    assert (folder / "narrow-seed0.json").read_bytes() == made
    for name in ("narrow", "affinity-4"):
        path = folder / f"{name}-seed0.json"
        result = json.loads(path.read_text())["result"]
        assert list(result["states"]) == ["cut", "fitted"]
        assert (result["kept"], result["training"]) == ("fitted", None)
        assert result["fitting"]["rows"] == 36  # four of 40 are held out to choose by


def record(study: str, task: str, contender: str, seed: int, after: float, lr: float = 1e-4) -> dict:
    return {
        **{"study": study, "task": task, "contender": contender, "seed": seed, "metric": "m"},
        **{"teacher": {"m": 0.9}, "states": {"cut": {"m": 0.5}, "distilled": {"m": after}}},
        **{"kept": "distilled", "training": {"rows": 1}, "largest_load": None},
        **{"parameters_stored": 1, "encoder_flops_per_token": 1, "validation_rows": 1},
        "teacher_budget": {"epochs": 1, "bf16": False},
        "budget": {
            **{"cost": 4, "fit_rows": None},
            "training": {"epochs": 1, "learning_rate": lr, "distill_weight": 1, "batch_size": 1},
        },
        "environment": {"commit": "c", "cpu": "x", "devices": [], "versions": {"torch": "2"}},
    }


def cells(table: str, *start: str) -> list[str]:
    """Those of the first row that begins so."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return next(row for row in rows if tuple(row[: len(start)]) == start)


def test_the_gain_pairs_seeds_and_lets_tasks_weigh_alike():
    """A mean over all records would let the task with more seeds, or a lucky seed of one side, decide."""
    records = [
        *(record("s", "cola", "narrow", seed, after) for seed, after in ((0, 0.50), (1, 0.60), (2, 0.99))),
        *(record("s", "cola", "random-4", seed, after) for seed, after in ((0, 0.51), (1, 0.63))),
        record("s", "sst2", "narrow", 0, 0.80),
        record("s", "sst2", "random-4", 0, 0.84),
    ]
    # (mean of 1 and 3, and 4) / 2; one seed has no error
    assert cells(table(records), "random-4")[5] == "+3.00"


def test_settings_are_compared_with_the_same_runs_of_the_base_study():
    """Another seed, task or teacher must not count: only how it is trained differs."""
    fewer = record("fewer rows", "cola", "random-4", 0, 0.40)
    fewer["training"] = {"rows": 0}
    studies = {
        "main": [
            *(record("main", "cola", "random-4", seed, after) for seed, after in ((0, 0.50), (1, 0.90))),
            record("main", "mrpc", "random-4", 0, 0.70),
            record("main", "cola", "narrow", 0, 0.10),
        ],
        "faster": [
            record("faster", "cola", "random-4", 0, 0.53, lr=3e-4),
            record("faster", "mrpc", "random-4", 0, 0.71, lr=3e-4),
        ],
        "same budget": [record("same budget", "cola", "random-4", 0, 0.50)],
        "fewer rows": [fewer],
        "another teacher": [{**record("other", "cola", "random-4", 0, 0.99), "teacher": {"m": 0.8}}],
    }
    shown = settings_table(studies)
    assert cells(shown, "main", "random-4") == [
        "main",
        "random-4",
        "1",
        "1",
        "0.0001",
        "1",
        "50.0",
        "70.0",
        "–",
    ]
    assert cells(shown, "faster", "random-4")[4:] == ["0.0003", "1", "53.0", "71.0", "+2.00"]
    assert "narrow" not in shown
    assert "another teacher" not in shown
    assert "same budget" not in shown
    assert "fewer rows" not in shown


def test_records_of_before_the_fit_stay_readable(tmp_path):
    """They had no steps but two, and one budget."""
    old = record("s", "cola", "narrow", 0, 0.8)
    old |= {"before": old["states"]["cut"], "after": old["states"]["distilled"], "train_rows": 1}
    old["budget"] = old["budget"]["training"]
    for name in ("states", "kept", "training"):
        del old[name]
    (tmp_path / "s.jsonl").write_text(json.dumps(old) + "\n")
    (found,) = read(tmp_path / "s.jsonl")
    assert found == record("s", "cola", "narrow", 0, 0.8)
    assert read_rows(tmp_path / "s.jsonl") is None
    assert cells(table([found]), "narrow")[1] == "50.0 → 80.0"


SCORES = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "matthews": metrics.matthews_corrcoef,
    "pearson": lambda labels, said: np.corrcoef(labels, said)[0, 1],
}


@pytest.mark.parametrize("name", SCORES)
def test_a_resample_is_scored_as_if_its_rows_were_all(name):
    """Repeated rows count as often as they were drawn: what a metric makes of sums must be the metric."""
    random = np.random.default_rng(0)
    labels_N, first_N, second_N = random.integers(2, size=(3, 40))
    resampled = Resampled("cola", labels_N, labels_N, 2)
    found_R = resampled.metric(name, [first_N, second_N])
    wanted = [SCORES[name](labels_N, said_N) for said_N in (first_N, second_N)]
    assert found_R[0] == pytest.approx(np.mean(wanted))
    for resample in (1, 7):
        rows = np.repeat(np.arange(40), np.round(40 * resampled._share_RN[resample]).astype(int))
        wanted = [SCORES[name](labels_N[rows], said_N[rows]) for said_N in (first_N, second_N)]
        assert found_R[resample] == pytest.approx(np.dot(resampled._share_RS[resample], wanted))


def contrast(rows: dict, seeds: int) -> Interval:
    records = []
    for name in ("narrow", "affinity-4"):
        for seed in range(seeds):
            records.append({**record("s", "cola", name, seed, 0.5), "metric": "accuracy"})
    return Contrasts(records, rows).gain(Resampled.metric, "affinity-4", "narrow", ["cola"])


def test_an_interval_pairs_rows_and_counts_what_seeds_make_of_it():
    """Two models that err on the same rows differ by nothing, however few rows there are; an interval over
    rows alone would be sure of what only one seed says."""
    labels_N = np.arange(200) % 2
    wrong_N = np.where(np.arange(200) < 60, 1 - labels_N, labels_N)
    rows = {"cola/labels": labels_N, "cola/teacher": labels_N}
    for seed in range(4):
        for name in ("narrow", "affinity-4"):
            rows[f"cola/{name}/{seed}/distilled/predictions"] = wrong_N
    assert contrast(rows, 4) == pytest.approx((0, 0, 0))
    rows["cola/affinity-4/0/distilled/predictions"] = labels_N  # the first seed's alone is better
    found = contrast(rows, 4)
    assert found.found == pytest.approx(7.5)
    assert found.low == pytest.approx(0)
    assert found.high > 14
    one_seed = contrast(rows, 1)
    assert one_seed.found == pytest.approx(30)
    assert 20 < one_seed.low < 27
    assert 33 < one_seed.high < 40
