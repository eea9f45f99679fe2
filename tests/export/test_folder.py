"""The exported folder has what serving tools look for, by the names they look for it under."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from transformers import AutoConfig, AutoTokenizer  # noqa: E402

import moebert_kernels  # noqa: E402
from moebert_kernels.compress.storage.sentence_encoder import load_sentence_encoder  # noqa: E402
from moebert_kernels.export.folder import dense_config  # noqa: E402
from tests.export.exported import student, tokenizer  # noqa: E402

# text-embeddings-inference: which pooled or classified output it takes, and the inputs it can give.
TEI_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
TEI_OUTPUTS = {"sentence_embedding", "last_hidden_state", "token_embeddings", "logits"}
ROBERTA_OFFSET = {"Roberta": "roberta", "XLMRoberta": "xlm-roberta", "Camembert": "camembert"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    model = student("Bert", "ForSequenceClassification", num_hidden_layers=1)
    moebert_kernels.export(model, folder / "served", tokenizer=tokenizer(folder), quantize="int8")
    return folder / "served"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder")
    source = folder / "source"
    student("Bert", None, num_hidden_layers=1).save_pretrained(source)
    tokenizer(folder).save_pretrained(source)
    names = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(names.items())
    ]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    encoder = load_sentence_encoder(source)
    moebert_kernels.export(replace(encoder, max_length=38), folder / "served")
    return folder / "served"


def graph_of(folder, name="model.onnx"):
    return onnx.load(folder / "onnx" / name).graph


def names(values):
    return [value.name for value in values]


@pytest.mark.parametrize("name", ["model.onnx", "model_quantized.onnx"])
def test_graphs_lie_where_transformers_js_and_tei_look(classifier, name):
    graph = graph_of(classifier, name)
    assert set(names(graph.input)) <= TEI_INPUTS
    assert {"input_ids", "attention_mask"} <= set(names(graph.input))
    assert names(graph.output) == ["logits"]
    for value in graph.input:  # int64 and of any size: TEI and transformers.js send no other
        assert value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        assert all(dim.dim_param for dim in value.type.tensor_type.shape.dim)


def test_outputs_of_an_embedder_are_those_tei_knows(embedder):
    graph = graph_of(embedder)
    assert names(graph.output) == ["last_hidden_state", "sentence_embedding"]
    assert set(names(graph.output)) <= TEI_OUTPUTS
    for value in graph.output:
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_config_says_what_the_dense_family_says(classifier):
    """Tools choose by these keys; none of them knows a model type of ours."""
    config = json.loads((classifier / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"]  # TEI refuses a classifier without it
    assert config["max_position_embeddings"]
    assert not [name for name in config if "expert" in name or "routing" in name]
    assert "auto_map" not in config


@pytest.mark.parametrize("family", list(ROBERTA_OFFSET))
def test_families_that_skip_positions_keep_their_model_type(family, tmp_path):
    """TEI adds the offset of RoBERTa's positions for these exact names."""
    dense_config(student(family, "ForSequenceClassification", num_hidden_layers=1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == ROBERTA_OFFSET[family]
    assert config["pad_token_id"] == 1


def test_the_tokenizer_is_one_file_for_all(classifier):
    """transformers.js and TEI read tokenizer.json alone, and tokenizer_config.json for what to do with it."""
    described = json.loads((classifier / "tokenizer.json").read_text())
    assert described["model"]["vocab"]
    settings = json.loads((classifier / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 38
    assert settings["tokenizer_class"]


def test_transformers_alone_reads_config_and_tokenizer(classifier):
    assert type(AutoConfig.from_pretrained(classifier)).__module__.startswith("transformers.")
    batch = AutoTokenizer.from_pretrained(classifier)(["w1 w2", "w3"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 4)
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([4, 3]))


def test_an_embedder_has_its_modules(embedder):
    """sentence-transformers reads them, and TEI the pooling, from the folders they always have."""
    modules = json.loads((embedder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling"]
    pooling = json.loads((embedder / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True
    assert json.loads((embedder / "config.json").read_text())["architectures"] == ["BertModel"]
