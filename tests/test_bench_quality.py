"""The comparison of contenders on tasks: small models, whole path."""

import pytest
import torch
from tiny_bert import WIDTH, batch, build
from transformers import BertForSequenceClassification, BertTokenizerFast
from typer.testing import CliRunner

from bench.quality.__main__ import app
from bench.quality.contenders import CONTENDERS, tie_shared
from bench.quality.records import read, settings_table, table
from bench.quality.remembered import RememberedTeacher
from bench.readme import update
from moebert_kernels.compress.adapt import split_neurons
from moebert_kernels.layer import MoEFFN
from moebert_kernels.models import count_parameters, to_moe

WORDS = [f"w{i}" for i in range(60)]


def test_tied_neurons_stay_alike_and_others_do_not():
    """What one stored copy would learn: the gradients of all copies, summed."""
    index_LEF = split_neurons(torch.rand(3, WIDTH), 4, 16, 6)
    student = to_moe(build(BertForSequenceClassification), index_LEF, num_shared_neurons=6)
    tie_shared(student, 6)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for step in range(3):
        student(**batch(seed=step), labels=torch.tensor([0, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in student.modules():
        if isinstance(module, MoEFFN):
            neurons_EFD = torch.cat(
                [module.w1_EFD, module.bias1_EF.unsqueeze(2), module.w2_EDF.transpose(1, 2)], dim=2
            )
            assert torch.equal(neurons_EFD[:, :6], neurons_EFD[:1, :6].expand(4, -1, -1))
            assert not torch.equal(neurons_EFD[0, 6:], neurons_EFD[1, 6:])


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


def test_all_contenders_run_resume_and_fill_the_table(tmp_path):
    model = build(BertForSequenceClassification, intermediate_size=60, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(tmp_path / "words.txt"), model_max_length=32).save_pretrained(tmp_path / "model")
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    for name, count in (("train.tsv", 40), ("dev.tsv", 16)):
        lines = [
            f"src\t{i % 2}\t\t{' '.join(WORDS[(i * j) % 60] for j in range(1, 8))}" for i in range(count)
        ]
        (folder / name).write_text("\n".join(lines) + "\n")
    call = [
        *("run", "--data", str(tmp_path / "glue"), "--out", str(tmp_path / "out")),
        *("--model", str(tmp_path / "model"), "--tasks", "cola", "--seeds", "1", "--train-rows", "32"),
        *("--max-length", "16", "--teacher-epochs", "1", "--epochs", "1", "--batch-size", "8"),
    ]
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
    assert runs["narrow"]["parameters_stored"] < count_parameters(model)
    lines = runner.invoke(app, ["table", str(file)], catch_exceptions=False).stdout.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3 + len(CONTENDERS)
    assert len({line.count("|") for line in rows}) == 1
    block = "<!-- bench:quality-{0}:begin -->\n<!-- bench:quality-{0}:end -->"
    shown = update(block.format("main") + block.format("other"), tmp_path)
    assert "\n".join(rows) in shown
    assert shown.count("not measured yet") == 1


def record(study: str, task: str, contender: str, seed: int, after: float, lr: float = 1e-4) -> dict:
    return {
        **{"study": study, "task": task, "contender": contender, "seed": seed, "metric": "m"},
        **{"teacher": {"m": 0.9}, "before": {"m": 0.5}, "after": {"m": after}, "largest_load": None},
        **{"parameters_stored": 1, "encoder_flops_per_token": 1, "train_rows": 1, "validation_rows": 1},
        "teacher_budget": {"epochs": 1, "bf16": False},
        "budget": {"epochs": 1, "learning_rate": lr, "distill_weight": 1, "batch_size": 1},
        "environment": {"commit": "c", "cpu": "x", "versions": {"torch": "2"}},
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
    assert cells(table(records), "random-4")[6] == "+3.00"


def test_settings_are_compared_with_the_same_runs_of_the_base_study():
    """Another seed, task or teacher must not count: only how it is trained differs."""
    fewer = record("fewer rows", "cola", "random-4", 0, 0.40)
    fewer["budget"] = fewer["budget"] | {"train_rows": 1}
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
