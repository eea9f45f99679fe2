"""The comparison of routings on tasks: small models, whole path."""

import json

import torch
from tiny_bert import WIDTH, batch, build
from transformers import BertForSequenceClassification, BertTokenizerFast
from typer.testing import CliRunner

from bench.quality import CONTENDERS, app, tie_shared
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
                [module.w1_EFD, module.b1_EF.unsqueeze(2), module.w2_EDF.transpose(1, 2)], dim=2
            )
            assert torch.equal(neurons_EFD[:, :6], neurons_EFD[:1, :6].expand(4, -1, -1))
            assert not torch.equal(neurons_EFD[0, 6:], neurons_EFD[1, 6:])


def test_all_contenders_run_resume_and_fill_the_table(tmp_path):
    model = build(BertForSequenceClassification, intermediate_size=60)
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
    records = {path.stem: path.read_bytes() for path in (tmp_path / "out" / "records" / "cola").iterdir()}
    assert set(records) == {"teacher", "importance", *(f"{name}-seed0" for name in CONTENDERS)}
    runs = {name: json.loads(records[f"{name}-seed0"])["result"] for name in CONTENDERS}
    assert len({run["ffn_flops_per_token"] for run in runs.values()}) == 1
    assert runs["affinity-4-tied"]["parameters_stored"] < runs["affinity-4"]["parameters_stored"]
    assert runs["dense"]["parameters_stored"] < count_parameters(model)

    again = runner.invoke(app, call, catch_exceptions=False)
    assert again.exit_code == 0
    assert all(
        (tmp_path / "out" / "records" / "cola" / f"{n}.json").read_bytes() == r for n, r in records.items()
    )
    table = runner.invoke(app, ["table", str(tmp_path / "out")], catch_exceptions=False).stdout.splitlines()
    assert len(table) == 3 + len(CONTENDERS)
    assert len({line.count("|") for line in table}) == 1
