"""The folder that an export becomes, what is measured of it, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import moebert_kernels
from moebert_kernels import cli
from moebert_kernels.compress.data.tasks import CsvOptions, load_task
from moebert_kernels.compress.storage.sentence_encoder import load_sentence_encoder, save_sentence_encoder
from moebert_kernels.errors import UserError
from moebert_kernels.export import check, exporting
from moebert_kernels.export.check import Checker, Likeness, compare
from moebert_kernels.export.folder import Source, dense_config, open_source, write_beside
from moebert_kernels.export.quantize import quantize
from moebert_kernels.models import to_moe
from tests.export.exported import session, student, tokenizer
from tests.sentence_encoders import TEXTS, make_folder
from tests.tiny import WIDTH, all_neurons

# text-embeddings-inference: the inputs it can give, and of an embedder the outputs it knows.
TEI_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
ROBERTA_OFFSET = {"Roberta": "roberta", "XLMRoberta": "xlm-roberta", "Camembert": "camembert"}


def graph_of(folder, name="model.onnx"):
    return onnx.load(folder / "onnx" / name).graph


def names(values):
    return [value.name for value in values]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A student that classifies, as `moebert compress` leaves it."""
    folder = tmp_path_factory.mktemp("saved") / "student"
    model = student("Bert", "ForSequenceClassification", num_hidden_layers=1, id2label={0: "bad", 1: "good"})
    model.save_pretrained(folder)
    tokenizer(folder.parent).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(saved, tmp_path_factory):
    """`moebert export` of it with everything, on a table with labels."""
    folder = tmp_path_factory.mktemp("run")
    table = folder / "rows.csv"
    rows = [f"{text},{('bad', 'good')[i % 2]}" for i, text in enumerate(TEXTS)]
    table.write_text("\n".join(["text,label", *rows]))
    words = ["export", str(saved), "--output", str(folder / "served"), "--quantize", "int8", "--check"]
    found = CliRunner().invoke(cli.app, [*words, "--task", "csv", "--data", str(table)])
    assert found.exit_code == 0, found.output
    return folder / "served", found.output


def test_the_command_says_how_alike_the_graphs_are(run):
    _, output = run
    lines = output.splitlines()
    assert any(line.startswith("PyTorch: accuracy ") for line in lines)
    (fp32,) = [line for line in lines if line.startswith("model.onnx beside PyTorch: ")]
    assert "agreement 1.0000" in fp32
    assert float(fp32.split("largest difference ")[1].split(",")[0]) < 1e-4
    assert any("model_quantized.onnx beside PyTorch: largest difference" in line for line in lines)
    assert any(line.endswith("served: onnx/model.onnx, onnx/model_quantized.onnx") for line in lines)


def test_the_folder_is_the_dense_familys(run, saved):
    """What text-embeddings-inference, transformers.js and AutoConfig go by; nothing in it is ours."""
    folder, _ = run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    assert {"onnx/model.onnx", "onnx/model_quantized.onnx"} <= files
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForSequenceClassification"])
    assert "auto_map" not in config
    assert config["id2label"] == {"0": "bad", "1": "good"}  # TEI refuses a classifier without it
    assert config["max_position_embeddings"] == 40
    assert not {"num_experts", "routing", "expert_size", "balance_loss_weight"} & set(config)
    loaded = type(AutoConfig.from_pretrained(folder))
    assert (loaded.__name__, loaded.__module__.partition(".")[0]) == ("BertConfig", "transformers")
    assert "moe" not in (folder / "config.json").read_text().lower()


def test_graphs_lie_where_transformers_js_and_tei_look(run):
    for name in ("model.onnx", "model_quantized.onnx"):
        graph = graph_of(run[0], name)
        assert {"input_ids", "attention_mask"} <= set(names(graph.input)) <= TEI_INPUTS
        assert names(graph.output) == ["logits"]
        for value in graph.input:  # int64 and of any size: TEI and transformers.js send no other
            assert value.type.tensor_type.elem_type == onnx.TensorProto.INT64
            assert all(dim.dim_param for dim in value.type.tensor_type.shape.dim)


def test_the_tokenizer_is_one_file_for_all(run):
    """transformers.js and TEI read tokenizer.json alone, and tokenizer_config.json for what to do with it."""
    described = json.loads((run[0] / "tokenizer.json").read_text())
    assert described["model"]["vocab"]
    settings = json.loads((run[0] / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 38
    assert settings["tokenizer_class"]
    batch = AutoTokenizer.from_pretrained(run[0])(["w1 w2", "w3"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 4)
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([4, 3]))


def test_a_user_of_the_folder_needs_a_tokenizer_and_a_runtime(run, saved):
    folder, _ = run
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS[:5], padding=True, return_tensors="np")
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits
    for name, tolerance in (("model.onnx", 1e-4), ("model_quantized.onnx", 0.3)):
        (logits,) = session(folder / "onnx" / name).run(None, dict(inputs))
        np.testing.assert_allclose(logits, expected, atol=tolerance)


def test_sentence_encoders_keep_their_modules(tmp_path):
    """The states of tokens are there for tools that pool themselves, the embeddings for those that do not."""
    dense = load_sentence_encoder(make_folder(tmp_path / "dense", "MPNet", num_hidden_layers=1))
    moe = replace(dense, model=to_moe(dense.model, all_neurons(4, 1), num_shared_neurons=WIDTH))
    save_sentence_encoder(moe, tmp_path / "moe")
    served = moebert_kernels.export(moe, tmp_path / "served", check=TEXTS)
    found = served.graphs["model.onnx"]
    assert (found.kind, found.num_texts) == ("cosine", len(TEXTS))
    assert found.largest_difference < 1e-4
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert json.loads((tmp_path / "served" / name).read_text()) == json.loads(
            (tmp_path / "moe" / name).read_text()
        )
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mpnet", ["MPNetModel"])
    graph = session(tmp_path / "served" / "onnx" / "model.onnx")
    inputs = moe.tokenizer(TEXTS, padding=True, truncation=True, max_length=9, return_tensors="np")
    states, embeddings = graph.run(["last_hidden_state", "sentence_embedding"], dict(inputs))
    np.testing.assert_allclose(embeddings, moe.encode(TEXTS), atol=1e-5)
    assert states.shape == (*inputs["input_ids"].shape, 32)


def test_an_encoder_in_a_folder_of_its_own_comes_to_the_top(tmp_path):
    """Stops tools from missing the encoder that old versions of sentence_transformers put one folder down.

    sentence-transformers reads modules, and TEI the pooling, from the folders they always have.
    """
    folder = make_folder(tmp_path / "old", num_hidden_layers=1)
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != "modules.json":
            path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    moebert_kernels.export(folder, tmp_path / "served")
    served = tmp_path / "served"
    described = json.loads((served / "modules.json").read_text())
    assert [module["path"] for module in described[:2]] == ["", "1_Pooling"]
    pooling = json.loads((served / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True
    top = {path.name for path in served.iterdir()}
    assert {"config.json", "tokenizer.json", "sentence_bert_config.json", "onnx"} <= top
    assert json.loads((served / "config.json").read_text())["architectures"] == ["BertModel"]
    outputs = graph_of(served).output
    assert names(outputs) == ["last_hidden_state", "sentence_embedding"]
    assert {value.type.tensor_type.elem_type for value in outputs} == {onnx.TensorProto.FLOAT}


def test_labels_have_names_in_the_configuration(tmp_path):
    """Stops text-embeddings-inference from refusing a classifier whose labels nobody has named."""
    write_beside(Source(student("Roberta", "ForSequenceClassification")), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}


@pytest.mark.parametrize("family", list(ROBERTA_OFFSET))
def test_families_that_skip_positions_keep_their_model_type(family, tmp_path):
    """TEI adds the offset of RoBERTa's positions for these exact names."""
    dense_config(student(family, "ForSequenceClassification", num_hidden_layers=1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == ROBERTA_OFFSET[family]
    assert config["pad_token_id"] == 1


@pytest.mark.parametrize("name", ["Roberta", "DistilBert", "DebertaV2"])
def test_configurations_of_students_and_teachers_are_one(name):
    moe, dense = (student(name, "ForTokenClassification", routing) for routing in ("hash-random", "dense"))
    ours, theirs = dense_config(moe).to_dict(), dense_config(dense).to_dict()
    assert ours == theirs
    assert ours["architectures"] == [f"{name}ForTokenClassification"]


def test_token_types_are_an_input_where_the_tokenizer_makes_them(tmp_path):
    words = tokenizer(tmp_path)
    assert Source(student("Bert", None), words).takes_token_types
    assert not Source(student("Bert", None, type_vocab_size=1), words).takes_token_types
    assert not Source(student("DistilBert", None), words).takes_token_types
    words.model_input_names = ["input_ids", "attention_mask"]
    assert not Source(student("Bert", None), words).takes_token_types


def test_nothing_is_left_of_an_export_that_fails(saved, tmp_path, monkeypatch):
    def fail(*_):
        (tmp_path / "seen").write_text(str([path.name for path in tmp_path.iterdir()]))
        raise RuntimeError("the exporter's")

    monkeypatch.setattr(exporting, "write_graph", fail)
    with pytest.raises(RuntimeError, match="the exporter's"):
        moebert_kernels.export(saved, tmp_path / "served")
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]


def test_what_is_refused(saved, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="quantize must be int8 or None, got 'int4'"):
        moebert_kernels.export(saved, tmp_path / "new", quantize="int4")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output_dir: .*held holds notes\.txt"):
        moebert_kernels.export(saved, tmp_path / "held")
    with pytest.raises(UserError, match="model: there is no folder"):
        moebert_kernels.export(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(UserError, match="tokenizer must be given with a model"):
        moebert_kernels.export(student("Bert", None), tmp_path / "new", check=TEXTS)
    with pytest.raises(UserError, match="check must have a text at least"):
        moebert_kernels.export(saved, tmp_path / "new", check=[])
    with pytest.raises(UserError, match="model must be a model, a SentenceEncoder or a folder, got int 3"):
        moebert_kernels.export(3, tmp_path / "new")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    with pytest.raises(UserError, match=r"needs onnxscript, which is not .*'moebert-kernels\[export\]'"):
        moebert_kernels.export(saved, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held"]
    assert [path.name for path in (tmp_path / "held").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", "held"], "--output: held holds notes.txt: give a new or an empty output folder"),
        (["--output", "new", "--data", "x.txt"], "--data is for --check, or to measure --quantize on"),
        (["--output", "new", "--quantize", "int4"], "int8"),
    ],
)
def test_the_command_names_options(saved, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "notes.txt").write_text("mine")
    found = CliRunner().invoke(cli.app, ["export", str(saved), *words])
    assert found.exit_code == 2
    assert expected in " ".join(found.stderr.split())


def test_likeness_is_of_what_a_head_says():
    logits = [np.array([0.1, 0.9]), np.array([0.8, 0.2])]
    found = compare([np.array([0.2, 0.7]), np.array([0.1, 0.2])], logits, "agreement")
    assert (found.kind, found.alike, found.num_texts) == ("agreement", 0.5, 2)
    assert found.largest_difference == pytest.approx(0.7)
    tokens = [np.array([[1.0, 0], [0, 1], [1, 0]])]
    assert compare([np.array([[1.0, 0], [1, 0], [1, 0]])], tokens, "agreement").alike == pytest.approx(2 / 3)
    answers = [np.array([[1.0, 0], [0, 1]]), np.array([[1.0, 0], [0, 1]])]
    others = [answers[0], np.array([[1.0, 1], [0, 0]])]
    assert compare(others, answers, "answers").alike == 0.5
    labels = [np.array([1.0, -1, 2, 3])]
    assert compare([np.array([1.0, 1, 1, 1])], labels, "labels").alike == 0.75
    scores = [np.array([1.0]), np.array([2.0]), np.array([4.0])]
    assert compare([2 * score for score in scores], scores, "correlation").alike == pytest.approx(1)
    assert compare([-score for score in scores], scores, "correlation").alike == pytest.approx(-1)
    assert compare([scores[0]] * 3, [scores[0]] * 3, "correlation").alike == 1
    assert compare([np.array([3.0, 4])], [np.array([4.0, 3])], "cosine").alike == pytest.approx(0.96)


def test_layers_that_cost_most_stay_in_32_bits(run, tmp_path):
    """One after the other, the costliest alone first, until what is left is alike enough."""
    graph, target = run[0] / "onnx" / "model.onnx", tmp_path / "small.onnx"
    alike = iter([0.90, 0.97, 0.95, 0.99])  # all; each half of the layer alone; without the second
    tried = []

    class Scripted:
        def measure(self, path):
            tried.append(path.stat().st_size)
            return Likeness(0.1, "agreement", next(alike), 8)

    said: list[str] = []
    found, kept = quantize(graph, target, Scripted(), say=said.append)
    assert (found.alike, kept) == (0.99, ("feed-forward of layer 1",))
    assert tried[0] < tried[3] == tried[1]
    assert "int8 throughout: " in said[0]
    assert said[1] == "kept in 32 bits: feed-forward of layer 1"
    alike = iter([0.5] * 9)  # stops the graph called quantized from having nothing in int8, or all of it
    found, kept = quantize(graph, target, Scripted(), say=said.append)
    assert (found.alike, kept) == (0.5, ("attention of layer 1",))
    assert sum(node.op_type == "MatMulInteger" for node in onnx.load(target).graph.node) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


def test_trials_are_on_a_part_of_many_rows(saved, run, monkeypatch):
    monkeypatch.setattr(check, "MOST_TRIED", 7)
    checker = Checker(open_source(saved, None), TEXTS)
    graph = run[0] / "onnx" / "model.onnx"
    found = checker.measure(graph)
    assert (found.num_texts, found.alike) == (6, 1.0)
    assert found.largest_difference < 1e-4
    assert checker.check(graph).num_texts == len(TEXTS)


def test_rows_of_another_task_are_refused(saved, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("\n".join(["text,label", *(f"{text},{i % 3}" for i, text in enumerate(TEXTS))]))
    rows = load_task("csv", str(table), csv=CsvOptions())
    with pytest.raises(UserError, match="label"):
        Checker(open_source(saved, None), rows)
