"""The MoEBERT models in use: routing and padding, losses, checkpointing, compilation, dtypes."""

from __future__ import annotations

import inspect
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from moebert_kernels import HashRouter, MoEFFN, RoutingPlan
from moebert_kernels.compress.training.distillation import without_dropout
from moebert_kernels.models import (
    GATE_ROUTINGS,
    HASH_ROUTINGS,
    ROUTINGS,
    MoEBertConfig,
    MoEBertForSequenceClassification,
)
from tests.tiny import LAYERS, VOCAB, batch, build, gradients, quartered


def moe_of(dense_class, routing: str = "hash-random", top_k: int = 1, **changes):
    return quartered(build(dense_class, **changes), routing, top_k=top_k)


@pytest.mark.parametrize("routing", HASH_ROUTINGS)
def test_tokens_go_where_the_tables_say(routing):
    model, inputs, routed = moe_of(BertModel, routing), batch(), []
    model(**inputs, router_outputs=routed)
    tables_LV = model.encoder.tables_LV
    assert tables_LV.shape == (LAYERS, VOCAB)
    for layer, routing_output in enumerate(routed):
        expected = tables_LV[layer][inputs["input_ids"]].masked_fill(inputs["attention_mask"] == 0, -1)
        assert torch.equal(routing_output.plan.expert_ids_TK.view_as(expected), expected)
        assert routing_output.gate_TK is None
        assert routing_output.balance_loss is None


def test_the_plans_of_all_layers_are_built_once(monkeypatch):
    """Under checkpointing too: recomputation takes the plan it was given and does not route again."""
    watched = Mock(wraps=RoutingPlan.from_input_ids)
    monkeypatch.setattr(RoutingPlan, "from_input_ids", watched)
    model = moe_of(BertModel).train()
    model.gradient_checkpointing_enable()
    model(**batch())[0].sum().backward()
    watched.assert_called_once()


def test_a_layer_equals_a_lone_moe_ffn_with_its_own_table():
    model, inputs = moe_of(BertModel), batch()
    hidden = {}
    layer = model.encoder.layer[1]
    layer.attention.register_forward_hook(lambda _module, _args, output: hidden.update(x=output[0]))
    out = model(**inputs, output_hidden_states=True, pack=False)
    ffn = MoEFFN(32, 16, 4, router=HashRouter(model.encoder.tables_LV[1], 4), norm_eps=1e-12)
    ffn.load_state_dict(layer.ffn.state_dict(), strict=False)
    expected = ffn(hidden["x"], input_ids=inputs["input_ids"], mask=inputs["attention_mask"])
    torch.testing.assert_close(out.hidden_states[2], expected)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", GATE_ROUTINGS)
def test_gates_route_every_real_token_to_k_experts(routing, top_k):
    model, inputs, routed = moe_of(BertModel, routing, top_k), batch(), []
    model(**inputs, router_outputs=routed)
    assert model.encoder.tables_LV is None
    real_T = inputs["attention_mask"].flatten().bool()
    for plan, gate_TK, balance_loss in routed:
        assert plan.top_k == top_k
        assert bool((plan.expert_ids_TK[real_T] >= 0).all())
        assert bool((plan.expert_ids_TK[~real_T] == -1).all())
        assert bool((gate_TK[real_T] > 0).all())
        assert balance_loss.dim() == 0
        if routing == "gate-sentence":
            for expert_ids_SK, real_S in zip(
                plan.expert_ids_TK.view(3, 9, top_k), inputs["attention_mask"].bool(), strict=True
            ):
                assert len(expert_ids_SK[real_S].unique(dim=0)) == 1


@st.composite
def padded_batches(draw):
    """(input_ids, attention_mask, lengths) of sentences, padded to the longest or further."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    shape = (len(lengths), max(lengths) + draw(st.integers(0, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    attention_mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return torch.randint(VOCAB, shape, generator=generator), attention_mask.long(), lengths


@settings(max_examples=12)
@given(st.sampled_from(ROUTINGS), padded_batches())
def test_padding_changes_nothing(routing, batch):
    """A sentence alone, without padding, gives what it gives in a padded batch, whatever pads it."""
    model = moe_of(BertForSequenceClassification, routing)
    input_ids, attention_mask, lengths = batch
    with torch.no_grad():
        together = model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        other_padding = torch.where(attention_mask.bool(), input_ids, 0)
        assert torch.equal(together.logits, model(other_padding, attention_mask=attention_mask).logits)
        for row, length in enumerate(lengths):
            alone = model(input_ids[row : row + 1, :length], output_hidden_states=True)
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
            for state, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(state[row, :length], expected[0], atol=1e-4, rtol=1e-4)


@settings(max_examples=10)
@given(padded_batches(), st.integers(1, 2))
def test_sentence_gates_get_the_gradient_of_a_batch_from_its_sentences_one_by_one(batch, top_k):
    """The authors' gate-sentence learned nothing at batch size 1: it left its probability out."""
    model = moe_of(BertForSequenceClassification, "gate-sentence", top_k).double()
    input_ids, attention_mask, lengths = batch
    labels = input_ids[:, 0] % 2
    gates = [layer.ffn.router.gate.weight for layer in model.bert.encoder.layer]

    def learned(rows: slice, length: int) -> list[torch.Tensor]:
        logits = model(input_ids[rows, :length], attention_mask=attention_mask[rows, :length]).logits
        loss = torch.nn.functional.cross_entropy(logits, labels[rows], reduction="sum")
        return list(torch.autograd.grad(loss, gates))

    together = learned(slice(None), input_ids.shape[1])
    alone = [learned(slice(row, row + 1), length) for row, length in enumerate(lengths)]
    for gate, of_rows in zip(together, zip(*alone, strict=True), strict=True):
        assert bool(gate.abs().sum() > 0)
        torch.testing.assert_close(gate, sum(of_rows), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_sentence_of_padding_alone_gives_finite_numbers(routing):
    model, inputs = moe_of(BertForSequenceClassification, routing).train(), batch()
    inputs["attention_mask"][2] = 0
    out = model(**inputs, labels=torch.tensor([0, 1, 0]), output_hidden_states=True)
    out.loss.backward()
    assert all(bool(state.isfinite().all()) for state in out.hidden_states)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_mask_that_is_not_of_tokens_leaves_every_token_routed():
    model, inputs, routed = moe_of(BertModel), batch(), []
    pairs_B1SS = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    out = model(inputs["input_ids"], pairs_B1SS, router_outputs=routed)
    assert bool((routed[0].plan.expert_ids_TK >= 0).all())
    torch.testing.assert_close(out[0], model(inputs["input_ids"])[0])


def test_arguments_by_position_are_routed_like_arguments_by_name():
    model, inputs = moe_of(BertModel), batch()
    by_position = model(inputs["input_ids"], inputs["attention_mask"])[0]
    assert torch.equal(by_position, model(**inputs)[0])


def test_inputs_embeds_need_token_ids_under_a_hash_and_none_under_a_gate():
    inputs = batch()
    for routing in ROUTINGS:
        model = moe_of(BertModel, routing)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        call = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        if routing in HASH_ROUTINGS:
            with pytest.raises(ValueError, match="pass input_ids; inputs_embeds alone cannot be routed"):
                model(**call)
        else:
            assert torch.equal(model(**call)[0], model(**inputs)[0])


def test_a_token_id_beyond_the_tables_is_an_error():
    model = moe_of(BertModel)
    model.encoder.tables_LV = model.encoder.tables_LV[:, :50]
    with pytest.raises(ValueError, match=r"input_ids must lie in \[0, 50\)"):
        model(torch.tensor([[1, 50]]))


@pytest.mark.parametrize(
    ("dense_class", "labels", "changes"),
    [
        (BertForSequenceClassification, {"labels": torch.tensor([0, 2, 1])}, {"num_labels": 3}),
        (BertForSequenceClassification, {"labels": torch.tensor([0.5, 2.0, 1.0])}, {"num_labels": 1}),
        (BertForSequenceClassification, {"labels": torch.eye(3)}, {"num_labels": 3}),
        (BertForTokenClassification, {"labels": torch.arange(27).view(3, 9) % 2}, {}),
        (BertForMaskedLM, {"labels": torch.arange(27).view(3, 9)}, {}),
        (
            BertForQuestionAnswering,
            {"start_positions": torch.tensor([1, 0, 3]), "end_positions": torch.tensor([2, 2, 8])},
            {},
        ),
    ],
)
def test_heads_add_the_balance_loss_while_a_gate_is_trained_and_only_then(dense_class, labels, changes):
    inputs = batch()
    for routing in ("hash-random", "gate-token"):
        model, routed = moe_of(dense_class, routing, **changes), []
        model.config.balance_loss_weight = 0.5
        plain = model(**inputs, **labels).loss
        with without_dropout(model.train()):
            loss = model(**inputs, **labels, router_outputs=routed).loss
            assert torch.equal(model(**inputs, **labels, return_dict=False)[0], loss)
        if routing == "gate-token":
            plain = plain + 0.5 * sum(r.balance_loss for r in routed) / LAYERS
        torch.testing.assert_close(loss, plain)
        assert model(**inputs).get("loss") is None


def test_the_balance_loss_reaches_the_gates():
    model = moe_of(BertForSequenceClassification, "gate-token").train()
    model.config.balance_loss_weight = 0.0
    routed = []
    model(**batch(), router_outputs=routed)
    torch.stack([r.balance_loss for r in routed]).mean().backward()
    for layer in model.bert.encoder.layer:
        assert layer.ffn.router.gate.weight.grad.abs().sum() > 0


def test_heads_keep_the_signature_a_trainer_reads():
    """Trainer drops the columns that forward's signature does not name."""
    names = list(inspect.signature(MoEBertForSequenceClassification.forward).parameters)
    assert names[:3] == ["self", "input_ids", "attention_mask"]
    assert "labels" in names


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradient_checkpointing_changes_no_gradient(routing, use_reentrant):
    """Dropout on: for rows of a packed batch, too, recomputation draws what they had.

    The balance loss, which leaves each layer beside the hidden states, is included.
    """
    model = moe_of(BertForSequenceClassification, routing).train()
    model.config.balance_loss_weight = 1.0
    inputs = {**batch(), "labels": torch.tensor([0, 1, 1])}
    inputs["attention_mask"][2, 3:] = 0
    expected = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    routed = []
    torch.testing.assert_close(gradients(model, **inputs, router_outputs=routed), expected)
    assert len(routed) == LAYERS


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(implementation):
    model, inputs = moe_of(BertModel), batch()
    expected = model(**inputs)[0]
    model.set_attn_implementation(implementation)
    out = model(**inputs, output_attentions=implementation == "eager")
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out[0][real], expected[real], atol=1e-5, rtol=1e-5)
    if implementation == "eager":
        assert [tuple(a.shape) for a in out.attentions] == [(3, 4, 9, 9)] * LAYERS


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])  # tables: below
def test_compiles_as_one_graph(routing):
    """Forward, with hidden states and routing handed out, and backward.

    transformers installs its capture hooks under a lock on the first call that wants hidden states, which
    no graph can hold: that call is made before compiling.
    """
    model, inputs = moe_of(BertForSequenceClassification, routing, num_hidden_layers=1), batch()
    expected = model(**inputs, output_hidden_states=True)
    compiled, routed = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    actual = compiled(**inputs, output_hidden_states=True, router_outputs=routed)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert len(actual.hidden_states) == 2
    assert [int(r.plan.counts_E.sum()) for r in routed] == [23]
    compiled.train()
    compiled(**inputs, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(layer.ffn.w1_EFD.grad.abs().sum() > 0 for layer in model.bert.encoder.layer)
    torch._dynamo.reset()


def test_a_compiled_base_model_gets_its_routing():
    model, inputs = moe_of(BertModel, num_hidden_layers=1), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(**inputs, pack=False)[0]
    actual = compiled(**inputs)[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    actual.sum().backward()
    assert all(layer.ffn.w1_EFD.grad.abs().sum() > 0 for layer in model.encoder.layer)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_the_tables_alone(dtype):
    model, inputs = moe_of(BertForSequenceClassification), batch()
    tables_LV, expected = model.bert.encoder.tables_LV.clone(), model(**inputs).logits
    model.to(dtype)
    assert model.bert.encoder.tables_LV.dtype == torch.int32
    assert torch.equal(model.bert.encoder.tables_LV, tables_LV)
    actual = model(**inputs).logits
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_autocast_runs():
    model, inputs = moe_of(BertForSequenceClassification, "gate-token").train(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert model.bert.encoder.layer[0].ffn.w1_EFD.grad.dtype == torch.float32


def test_masked_lm_stays_tied():
    model = moe_of(BertForMaskedLM)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize("routing", HASH_ROUTINGS)
def test_resizing_the_vocabulary_resizes_the_tables(routing):
    model, twin = moe_of(BertForMaskedLM, routing), moe_of(BertForMaskedLM, routing)
    before = model.bert.encoder.tables_LV.clone()
    for resized in (model, twin):
        resized.resize_token_embeddings(VOCAB + 200)
    after = model.bert.encoder.tables_LV
    assert after.shape == (LAYERS, VOCAB + 200)
    assert after.dtype == torch.int32
    assert torch.equal(after[:, :VOCAB], before)
    assert after[:, VOCAB:].unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(after, twin.bert.encoder.tables_LV)
    assert model(torch.tensor([[1, VOCAB + 199]])).logits.shape == (1, 2, VOCAB + 200)
    model.resize_token_embeddings(VOCAB - 10)
    assert torch.equal(model.bert.encoder.tables_LV, before[:, : VOCAB - 10])


def decayed_by_a_plain_trainer(model, folder):
    """Names of the parameters in the optimizer's groups that have a weight decay."""
    trainer = Trainer(model, TrainingArguments(folder, use_cpu=True, weight_decay=0.1))
    trainer.create_optimizer()
    groups = trainer.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_plain_trainer_decays_of_the_experts_their_matrices_alone(routing, tmp_path):
    """It goes by names, and decayed 4 biases and LayerNorms a layer while theirs did not tell."""
    expected = decayed_by_a_plain_trainer(build(BertForSequenceClassification), tmp_path)
    for index in range(LAYERS):
        layer = f"bert.encoder.layer.{index}."
        expected -= {layer + "intermediate.dense.weight", layer + "output.dense.weight"}
        expected |= {layer + "ffn.w1_EFD", layer + "ffn.w2_EDF"}
        if routing in GATE_ROUTINGS:
            expected |= {layer + "ffn.router.gate.weight"}
    student = moe_of(BertForSequenceClassification, routing)
    assert decayed_by_a_plain_trainer(student, tmp_path) == expected


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"expert_size": 0}, "expert_size must be at least 1"),
        ({"num_shared_neurons": 769}, r"num_shared_neurons must lie in \[0, expert_size=768\], got 769"),
        ({"routing": "random"}, "must be one of hash-random, hash-balance, hash-affinity, gate-token"),
        ({"routing": "gate-token", "top_k": 5}, r"top_k must lie in \[1, num_experts=4\], got 5"),
        ({"top_k": 2}, "hash-random gives each token one expert: top_k must be 1, got 2"),
        ({"balance_loss_weight": -1.0}, "balance_loss_weight must not be negative"),
        ({"hidden_act": "mish"}, "hidden_act must be one of"),
        ({"chunk_size_feed_forward": 1}, "chunk_size_feed_forward must be 0"),
        ({"is_decoder": True}, "MoEBERT is an encoder"),
    ],
)
def test_a_configuration_out_of_range_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        MoEBertConfig(**field)
