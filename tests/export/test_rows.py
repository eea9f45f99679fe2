"""The encoder that is exported, in PyTorch: it holds no padding, and computes what the model does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moebert_kernels.errors import UserError
from moebert_kernels.export.encoder import RowEncoder
from moebert_kernels.export.heads import ExportedModel
from moebert_kernels.export.rows import rank_by_expert, real_rows
from moebert_kernels.models.families import HEADS
from tests.export.exported import batch, outputs_of, student, worst_difference
from tests.tiny import VOCAB, build_family, each_family

GATES = [("gate-token", 1), ("gate-token", 2), ("gate-sentence", 1), ("gate-sentence", 3)]


def worst(model, inputs) -> float:
    with torch.no_grad():
        outputs = ExportedModel(model).eval()(*inputs.values())
    return worst_difference(outputs, outputs_of(model, inputs), inputs["attention_mask"])


@pytest.mark.parametrize("head", [None, *HEADS])
@pytest.mark.parametrize("name", each_family)
def test_every_family_and_head_computes_what_the_model_does(name, head):
    """With a random table a layer, under every head; padding to more than the longest row changes nothing."""
    model = student(name, head)
    assert worst(model, batch([9, 5, 1])) < 3e-5
    assert worst(model, batch([9, 5, 1], longest=20)) < 3e-5


@pytest.mark.parametrize(("routing", "top_k"), GATES)
@pytest.mark.parametrize("name", ["Bert", "MPNet"])
def test_gates_choose_and_weigh_as_the_model_does(name, routing, top_k):
    for head in (None, "ForSequenceClassification", "ForTokenClassification"):
        assert worst(student(name, head, routing, top_k), batch([9, 5, 1, 4])) < 3e-5


@pytest.mark.parametrize("name", each_family)
def test_teachers_are_exported_too(name):
    assert worst(student(name, "ForSequenceClassification", "dense"), batch([9, 5, 1])) < 3e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"pos_att_type": ["c2p"], "share_att_key": True},
        {"pos_att_type": ["p2c"], "position_buckets": -1, "max_relative_positions": 6},
        {"relative_attention": False},
        {"position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        {"conv_kernel_size": 3, "conv_act": "gelu"},
    ],
)
def test_the_forms_of_deberta(changes):
    """Stops a form that a published DeBERTa has, such as the larger ones' convolution, from being lost."""
    assert worst(student("DebertaV2", None, **changes), batch([12, 7, 1])) < 3e-5


@pytest.mark.parametrize("hidden_act", ["gelu_new", "relu", "silu"])
def test_activations(hidden_act):
    for routing in ("hash-random", "dense"):
        assert worst(student("Bert", None, routing, hidden_act=hidden_act), batch([9, 5])) < 3e-5


def test_token_types_are_looked_at():
    model = student("Bert", "ForSequenceClassification")
    inputs = batch([9, 5, 1])
    inputs["token_type_ids"] = torch.arange(27).view(3, 9) % 2
    assert worst(model, inputs) < 3e-5
    assert not torch.equal(outputs_of(model, inputs)[0], outputs_of(model, batch([9, 5, 1]))[0])


@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "dense"])
def test_hidden_states_never_have_padding(routing):
    """Stops a product, an activation or a norm from being computed at padding."""
    model = ExportedModel(student("Bert", "ForTokenClassification", routing)).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.Linear) or type(module).__name__ in ("Linear", "Experts"):
            module.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
    with torch.no_grad():
        model(*batch([9, 5, 1], longest=30).values())
    assert len(seen) > 10
    assert set(seen) == {15}


def test_tables_that_agree_are_one():
    """Rows are gathered once for all layers then."""
    model = student("Bert", None)
    encoder = model.encoder
    encoder.tables_LV = encoder.tables_LV[:1].repeat(3, 1)
    assert RowEncoder(model).table_of_layer == [0, 0, 0]
    assert worst(model, batch([9, 5, 1])) < 3e-5


def test_rows_are_sorted_stably():
    expert_UN = torch.tensor([[2, 0, 2, 0, 3], [0, 0, 0, 0, 0]])
    rank_UN, counts_UE = rank_by_expert(expert_UN, 4)
    assert rank_UN.tolist() == [[2, 0, 3, 1, 4], [0, 1, 2, 3, 4]]
    assert counts_UE.tolist() == [[2, 0, 2, 1], [5, 0, 0, 0]]


def test_a_layout_knows_both_ways():
    layout = real_rows(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    assert layout.place_N.tolist() == [1, 2, 3]
    assert layout.row_T.tolist() == [0, 0, 1, 2, 2, 2]  # padding: its sequence's first
    moved = layout.moved(torch.tensor([2, 0, 1]))
    assert moved.place_N.tolist() == [2, 3, 1]
    assert moved.row_T[moved.place_N].tolist() == [0, 1, 2]
    assert layout.ordered_as(moved, torch.tensor([10.0, 20, 30])).tolist() == [20, 30, 10]


def test_the_model_stays_as_it_is():
    """Stops exporting from putting a model that is being trained into eval mode, or changing its weights."""
    model = student("Bert", "ForSequenceClassification").train()
    before = copy.deepcopy(model.state_dict())
    ExportedModel(model).eval()
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Bert", "MPNet"])
def test_padding_weighs_nothing_whatever_the_scores(name):
    """Stops the small number that masks padding from letting any through where scores are large."""
    model = student(name, None, "dense")
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if part.endswith(("query.weight", "key.weight", "attn.q.weight", "attn.k.weight")):
                weight.mul_(20)
            if part.endswith("relative_attention_bias.weight"):
                weight.mul_(50)
        alone, beside = (
            ExportedModel(model).eval()(*batch([5], longest=length).values())[0][0, :5] for length in (5, 30)
        )
    torch.testing.assert_close(beside, alone, atol=1e-4, rtol=1e-4)


def test_other_models_are_refused():
    from transformers import BertForNextSentencePrediction, GPT2Config, GPT2Model

    with pytest.raises(UserError, match=r"or have one of the heads .*, got BertForNextSentencePrediction"):
        ExportedModel(BertForNextSentencePrediction(build_family("Bert").config))
    with pytest.raises(UserError, match="GPT2Model holds 0"):
        ExportedModel(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=VOCAB)))


@pytest.mark.parametrize(
    ("name", "routing"),
    [("Bert", "gate-sentence"), ("MPNet", "hash-random"), ("DistilBert", "gate-sentence")],
)
def test_students_themselves_go_through_torch_export(name, routing):
    """Batch and length dynamic, the layer's operators in the graph."""
    model, inputs = student(name, "ForSequenceClassification", routing, num_hidden_layers=1), batch([9, 5, 1])
    batch_size, length = torch.export.Dim("batch"), torch.export.Dim("length", max=38)
    shapes = {key: {0: batch_size, 1: length} for key in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    assert any("moebert_kernels" in str(node.target) for node in program.graph.nodes)
    others = batch([4, 13, 2, 1, 7], seed=1)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**others).logits, model(**others).logits)
