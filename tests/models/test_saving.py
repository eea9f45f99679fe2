"""Saved and loaded again: every bit, through the Auto classes, in pipelines, in a new process."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    pipeline,
)

from moebert_kernels import hash_random_tables
from moebert_kernels.models import ROUTINGS, MoEBertConfig, MoEBertForSequenceClassification, MoEBertModel
from tests import tiny
from tests.former_names import under_former_names
from tests.tiny import HEADS, LAYERS, VOCAB, assert_same, auto_class, batch, build, build_family, quartered


def moe_of(dense_class, routing: str = "hash-random", **changes):
    return quartered(build(dense_class, **changes), routing, seed=5)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_round_trip_is_bit_for_bit(head, routing, tmp_path):
    """The authors' checkpoints lost their hash tables: a reloaded model routed at random."""
    model, inputs = quartered(build_family("Bert", head), routing), batch()
    model.save_pretrained(tmp_path)
    reloaded = auto_class(head).from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert not reloaded.training
    assert_same(reloaded.state_dict(), model.state_dict())
    # Not bit for bit: a loaded file is aligned in its own way, and a GEMM rounds by alignment.
    torch.testing.assert_close(reloaded(**inputs)[0], model(**inputs)[0])
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")] == []
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any(name.endswith("tables_LV") for name in names) == routing.startswith("hash")
    assert any(name.endswith("gate.weight") for name in names) == routing.startswith("gate")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_with_former_names_loads_bit_for_bit(head, routing, tmp_path):
    """Students saved before parameters had today's names were refused as no whole models."""
    model = quartered(build_family("Bert", head), routing)
    model.save_pretrained(tmp_path)
    expected = model.state_dict()
    stored = under_former_names(load_file(tmp_path / "model.safetensors"))
    assert len(stored.keys() - expected.keys()) == 4 * LAYERS
    save_file(stored, tmp_path / "model.safetensors")
    loaded = auto_class(head).from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = auto_class(head).from_pretrained(tmp_path / "again")
    by_torch = copy.deepcopy(again)
    with torch.no_grad():
        for parameter in by_torch.parameters():
            parameter.zero_()
    by_torch.load_state_dict(under_former_names(expected), strict=True)
    for other in (loaded, again, by_torch):
        assert_same(other.state_dict(), expected)
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert not (stored.keys() - expected.keys()) & set(file.keys())


def test_the_configuration_comes_back_whole(tmp_path):
    model = moe_of(BertForSequenceClassification, "gate-sentence", num_labels=3, problem_type="regression")
    model.config.balance_loss_weight = 0.25
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MoEBertConfig
    ignored = ("_name_or_path", "architectures")
    saved = {k: v for k, v in model.config.to_dict().items() if k not in ignored}
    assert {k: v for k, v in config.to_dict().items() if k not in ignored} == saved
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "moebert"


def test_a_base_model_loads_from_a_heads_folder_and_the_other_way_round(tmp_path):
    head = moe_of(BertForSequenceClassification)
    head.save_pretrained(tmp_path / "head")
    base = MoEBertModel.from_pretrained(tmp_path / "head")
    assert torch.equal(base.encoder.tables_LV, head.bert.encoder.tables_LV)
    base.save_pretrained(tmp_path / "base")
    again = MoEBertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(again.bert.encoder.tables_LV, head.bert.encoder.tables_LV)
    torch.testing.assert_close(again.bert(**batch())[0], head.bert(**batch())[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_dtype_leaves_the_tables_alone(dtype, tmp_path):
    model = moe_of(BertForSequenceClassification)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    assert reloaded.dtype == dtype
    assert torch.equal(reloaded.bert.encoder.tables_LV, model.bert.encoder.tables_LV)


def test_loading_with_a_device_map(tmp_path):
    model, inputs = moe_of(BertForSequenceClassification), batch()
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, device_map="cpu")
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits)


def test_a_resized_model_comes_back_with_its_tables(tmp_path):
    model = moe_of(BertForMaskedLM)
    model.resize_token_embeddings(VOCAB + 7)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.bert.encoder.tables_LV, model.bert.encoder.tables_LV)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_model_from_scratch_is_initialised_and_the_seed_fixes_its_tables(routing):
    size = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = {**size, "expert_size": 16, "num_shared_neurons": 8, "routing": routing}
    models = [MoEBertModel(MoEBertConfig(**config, hash_seed=seed)) for seed in (1, 1, 2)]
    ffn = models[0].encoder.layer[0].ffn
    assert 0.015 < ffn.w1_EFD.std() < 0.025
    assert 0.015 < ffn.w2_EDF.std() < 0.025
    assert ffn.bias1_EF.abs().sum() == ffn.bias2_ED.abs().sum() == ffn.layernorm_bias_ED.abs().sum() == 0
    assert bool((ffn.layernorm_weight_ED == 1).all())
    if routing.startswith("gate"):
        assert 0.01 < ffn.router.gate.weight.std() < 0.03
        assert all(model.encoder.tables_LV is None for model in models)
        return
    first, again, other = (model.encoder.tables_LV for model in models)
    assert first.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(first, again)
    if routing == "hash-balance":
        assert torch.equal(first[0].bincount(), torch.full((4,), VOCAB // 4))
    else:
        assert not torch.equal(first, other)
        assert not torch.equal(first[0], first[1])


def test_tables_missing_from_a_checkpoint_are_those_of_the_seed(tmp_path):
    """On loading, a model is built without memory: tables not in the file were left uninitialised memory."""
    model = moe_of(BertModel)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("tables_LV")}
    model.save_pretrained(tmp_path, state_dict=state)
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(reloaded.encoder.tables_LV, hash_random_tables(LAYERS, VOCAB, 4, seed=5))


@pytest.fixture
def folder(tmp_path):
    """A saved classifier with labels and the tokenizer it would come with."""
    tiny.tokenizer(tmp_path).save_pretrained(tmp_path / "model")
    names = {"id2label": {0: "dull", 1: "fine"}, "label2id": {"dull": 0, "fine": 1}}
    moe_of(BertForSequenceClassification, **names).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_text_classification_pipeline(folder, caplog):
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    results = classify(["w1 w2 w3", "w4"], batch_size=2)
    assert {result["label"] for result in results} <= {"dull", "fine"}
    assert "is not supported" not in caplog.text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    logits = model(**tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")).logits
    scores = logits.softmax(-1).max(-1).values
    assert [result["score"] for result in results] == pytest.approx(scores.tolist(), rel=1e-5)
