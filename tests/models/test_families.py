"""Every family of encoders with experts: the same numbers, saved and loaded, trained, refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormModel,
    T5Config,
    pipeline,
)

from moebert_kernels.compress.scoring.importance import compute_importance
from moebert_kernels.compress.training.distillation import without_dropout
from moebert_kernels.models import (
    GATE_ROUTINGS,
    MoEConfig,
    encoder_flops_per_token,
    find_ffns,
    is_moe,
    max_tokens,
    replace_ffns,
    to_moe,
)
from moebert_kernels.models.modeling import moe_classes
from python_ref import ffn as ref
from tests import tiny
from tests.tiny import (
    FAMILY,
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    all_neurons,
    auto_class,
    build_family,
    class_of,
    each_family,
    gradients,
    labels_for,
    quartered,
    quarters,
)


def batch() -> dict[str, torch.Tensor]:
    """Two sentences of 9 tokens, the second padded with the padding token's id from its sixth on."""
    input_ids = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    input_ids[1, 5:] = 1
    return {"input_ids": input_ids, "attention_mask": (input_ids != 1).long()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", each_family)
def test_experts_of_all_neurons_are_the_dense_model(name, head):
    dense, inputs = build_family(name, head).double(), batch()
    moe = to_moe(dense, all_neurons(), num_shared_neurons=WIDTH)
    assert type(moe) is moe_classes(FAMILY[name]).models[class_of(FAMILY[name], head)]
    with torch.no_grad():
        expected = dense(**inputs, output_hidden_states=True)
        actual = moe(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert actual.keys() == expected.keys()
    assert len(actual.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for key, value in expected.items():
        pairs = zip(actual[key], value, strict=True) if key == "hidden_states" else [(actual[key], value)]
        for ours, theirs in pairs:
            where = real if theirs.shape[:2] == real.shape else ...
            torch.testing.assert_close(ours[where], theirs[where], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", each_family)
def test_layers_compute_what_the_specification_does(name):
    """Each with its own random table; padding passes by."""
    moe, inputs = quartered(build_family(name).double()), batch()
    seen, routed = [], []
    layers = getattr(moe, FAMILY[name].encoder_name).layer
    for layer in layers:
        layer.ffn.register_forward_hook(lambda ffn, args, output: seen.append((ffn, args[0], output)))
    with torch.no_grad():
        moe(**inputs, router_outputs=routed, pack=False)  # layers see the batch as it is
    real_T = inputs["attention_mask"].flatten().bool()
    tables_LV = getattr(moe, FAMILY[name].encoder_name).tables_LV
    assert len(seen) == len(routed) == LAYERS
    for table_V, (ffn, x_BSD, y_BSD), routing in zip(tables_LV, seen, routed, strict=True):
        expert_ids_T = table_V[inputs["input_ids"].flatten()].masked_fill(~real_T, -1)
        assert torch.equal(routing.plan.expert_ids_TK[:, 0], expert_ids_T)
        expected_TD = ref.moe_ffn(
            x_BSD.flatten(0, 1),
            expert_ids_T.unsqueeze(1).long(),
            ffn.w1_EFD,
            ffn.bias1_EF,
            ffn.w2_EDF,
            ffn.bias2_ED,
            ln_w_ED=ffn.layernorm_weight_ED,
            ln_b_ED=ffn.layernorm_bias_ED,
            ln_eps=ffn.norm_eps,
        )
        torch.testing.assert_close(y_BSD.flatten(0, 1), expected_TD, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", each_family)
def test_round_trip_through_the_auto_classes_is_bit_for_bit(name, head, tmp_path):
    routing = "hash-random" if head in (None, "ForMaskedLM") else "gate-token"
    moe, inputs = quartered(build_family(name, head), routing), batch()
    moe.save_pretrained(tmp_path)
    reloaded = auto_class(head).from_pretrained(tmp_path)
    assert type(reloaded) is type(moe)
    assert isinstance(reloaded.config, MoEConfig)
    model_type = "moebert" if name == "Bert" else f"moe-{FAMILY[name].config.model_type}"
    assert reloaded.config.model_type == model_type
    tiny.assert_same(reloaded.state_dict(), moe.state_dict())
    torch.testing.assert_close(reloaded(**inputs)[0], moe(**inputs)[0])


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("name", each_family)
def test_heads_hand_routing_out_and_add_the_balance_loss(name, head):
    """MPNet's and DeBERTa's heads pass no further argument on to their base model."""
    moe, inputs, routed = quartered(build_family(name, head), "gate-token"), batch(), []
    inputs |= labels_for(head, inputs)
    plain = moe(**inputs).loss
    moe.config.balance_loss_weight = 0.5
    with without_dropout(moe.train()):
        loss = moe(**inputs, router_outputs=routed).loss
    assert len(routed) == LAYERS
    balance = torch.stack([routing.balance_loss for routing in routed]).mean()
    torch.testing.assert_close(loss - plain, 0.5 * balance, atol=1e-4, rtol=1e-4)
    assert moe(**batch(), return_dict=False)[0].requires_grad
    names = list(inspect.signature(type(moe).forward).parameters)
    assert names[:3] == ["self", "input_ids", "attention_mask"]


@pytest.mark.parametrize("name", each_family)
def test_attentions_are_handed_out_as_the_dense_model_does(name):
    dense, inputs = build_family(name, "ForSequenceClassification", attn_implementation="eager"), batch()
    moe = to_moe(dense, all_neurons(1), num_shared_neurons=WIDTH)
    expected = dense(**inputs, output_attentions=True).attentions
    actual = moe(**inputs, output_attentions=True).attentions
    assert len(actual) == len(expected) == LAYERS
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in each_family if FAMILY[name].model.supports_gradient_checkpointing]
)
@pytest.mark.parametrize("routing", ["hash-random", "gate-sentence"])
def test_gradient_checkpointing_changes_no_gradient(name, routing):
    moe, inputs = quartered(build_family(name, "ForTokenClassification"), routing).train(), batch()
    inputs |= labels_for("ForTokenClassification", inputs)
    expected = gradients(moe, **inputs)
    moe.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(moe, **inputs), expected)


@pytest.mark.parametrize("name", ["MPNet", "DistilBert"])
def test_compiles_as_one_graph(name):
    moe, inputs, routed = quartered(build_family(name, "ForMaskedLM", num_hidden_layers=2)), batch(), []
    expected = moe(**inputs, pack=False).logits
    compiled = torch.compile(moe, fullgraph=True, backend="eager")
    actual = compiled(**inputs, router_outputs=routed).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert len(routed) == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["Roberta", "MPNet", "DistilBert"])
def test_importance_of_every_layer_shape_is_the_papers(name):
    """One backward pass per batch against the gradients of each sample alone."""
    dense, inputs = build_family(name, "ForSequenceClassification").double(), batch()
    labels = torch.tensor([0, 1])
    scores_LF = compute_importance(dense, [{**inputs, "labels": labels}]).scores_LF
    expected_LF = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
    for sample in range(2):
        row = {key: value[sample : sample + 1] for key, value in inputs.items()}
        dense.zero_grad()
        dense(**row, labels=labels[sample : sample + 1]).loss.backward()
        for layer, found in enumerate(find_ffns(dense)):
            w1, w2 = found.w1.weight, found.w2.weight
            expected_LF[layer] += ((w1 * w1.grad).sum(1) + (w2 * w2.grad).sum(0)).abs().detach()
    torch.testing.assert_close(scores_LF, expected_LF.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", each_family)
def test_max_tokens_is_the_longest_row_a_model_takes(name):
    """RoBERTa's positions start behind the padding token's: its 514 take 512 tokens."""
    dense = build_family(name)
    longest = max_tokens(dense.config)
    assert longest == (38 if name in ("Roberta", "XLMRoberta", "Camembert", "Data2VecText", "MPNet") else 40)
    moe = quartered(dense)
    assert max_tokens(moe.config) == longest
    for model in (dense, moe):
        assert model(torch.full((1, longest), 7))[0].shape[1] == longest
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest + 1), 7))


def test_is_moe_tells_configurations_apart():
    dense = build_family("Roberta")
    assert not is_moe(dense.config)
    assert is_moe(quartered(dense).config)
    assert max_tokens(RobertaConfig(max_position_embeddings=514)) == 512
    assert max_tokens(GPT2Config(n_positions=99)) == 99
    with pytest.raises(ValueError, match="T5Config does not say how many tokens fit"):
        max_tokens(T5Config())


def small(config_class, **sizes):
    return config_class(vocab_size=10, num_hidden_layers=2, num_attention_heads=1, hidden_size=8, **sizes)


@pytest.mark.parametrize(
    ("model_class", "config", "found"),
    [
        (GPT2Model, GPT2Config(n_layer=2, n_head=1, n_embd=8, vocab_size=10), "2 x GPT2Block at h"),
        (
            AlbertModel,
            small(AlbertConfig, intermediate_size=8, embedding_size=8),
            "1 x AlbertLayerGroup at encoder.albert_layer_groups",
        ),
        (
            RobertaPreLayerNormModel,
            small(RobertaPreLayerNormConfig, intermediate_size=8),
            "2 x RobertaPreLayerNormLayer at encoder.layer",
        ),
    ],
)
def test_other_encoders_are_refused_with_what_was_looked_for_and_found(model_class, config, found):
    model = model_class(config)
    for refuse in (find_ffns, lambda model: replace_ffns(model, quarters()), quartered):
        with pytest.raises(ValueError, match=r"no dense feed-forward network.*looked for") as refused:
            refuse(model)
        message = str(refused.value)
        assert "BertLayer (intermediate.dense, output.dense, output.LayerNorm)" in message
        assert "TransformerBlock (ffn.lin1, ffn.lin2, output_layer_norm)" in message
        assert message.endswith(f"found {found}")


@pytest.mark.parametrize("routing", GATE_ROUTINGS)
def test_models_from_scratch_are_initialised(routing):
    size = {"n_layers": LAYERS, "dim": 32, "n_heads": 4, "hidden_dim": WIDTH, "vocab_size": VOCAB}
    classes = moe_classes(FAMILY["DistilBert"])
    config = classes.config(**size, routing=routing, expert_size=16, num_shared_neurons=0)
    moe = classes.models[FAMILY["DistilBert"].heads[0]](config)
    for layer in moe.distilbert.transformer.layer:
        assert 0.01 < layer.ffn.w1_EFD.std() < 0.03
        assert bool((layer.ffn.layernorm_weight_ED == 1).all())
    assert bool(moe(**batch()).logits.isfinite().all())


def test_resizing_the_vocabulary_resizes_the_tables():
    moe = quartered(build_family("DistilBert", "ForMaskedLM"))
    before = moe.distilbert.transformer.tables_LV.clone()
    moe.resize_token_embeddings(VOCAB + 9)
    assert moe.distilbert.transformer.tables_LV.shape == (LAYERS, VOCAB + 9)
    assert torch.equal(moe.distilbert.transformer.tables_LV[:, :VOCAB], before)


@pytest.mark.parametrize("name", each_family)
def test_experts_cost_what_their_neurons_do(name):
    """Quarters compute a quarter of the network; attention stays."""
    dense = build_family(name)
    saved = encoder_flops_per_token(dense) - encoder_flops_per_token(quartered(dense))
    assert saved == 2 * LAYERS * 2 * 32 * (WIDTH - WIDTH // 4)
    if name != "DebertaV2":  # whose attention may have projections of positions
        assert encoder_flops_per_token(dense) == 2 * LAYERS * (4 * 32 * 32 + 2 * 32 * WIDTH)


def test_text_classification_pipeline(tmp_path, caplog):
    tiny.tokenizer(tmp_path).save_pretrained(tmp_path)
    moe = quartered(build_family("MPNet", "ForSequenceClassification"))
    moe.save_pretrained(tmp_path)
    result = pipeline("text-classification", model=str(tmp_path), device="cpu")("w1 w2")[0]
    assert "is not supported" not in caplog.text
    inputs = AutoTokenizer.from_pretrained(tmp_path)("w1 w2", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    assert result["score"] == pytest.approx(float(moe(**inputs).logits.softmax(-1).max()), rel=1e-5)
