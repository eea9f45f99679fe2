"""Packed batches: what a model gives for real tokens, losses and gradients are those of the padded form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_kernels.compress.training.distillation import without_dropout
from moebert_kernels.models import Pack, packed, to_moe, why_not_packed
from moebert_kernels.models.config import GATE_ROUTINGS
from moebert_kernels.models.packed_attention import PACKED_SDPA
from tests.tiny import (
    FAMILY,
    HEADS,
    LAYERS,
    PADDING,
    VOCAB,
    all_neurons,
    assert_same,
    build_family,
    each_family,
    gradients,
    labels_for,
    quartered,
)

each_packed_family = [name for name in each_family if FAMILY[name].attends_by_interface]


def moe(name: str = "Bert", head: str | None = None, routing: str = "hash-random", **changes):
    return quartered(build_family(name, head, **changes), routing)


def batch_of(mask: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCAB, mask.shape, generator=generator)
    return {"input_ids": input_ids.masked_fill(mask == 0, PADDING), "attention_mask": mask}


def mask_of(*lengths: int) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()


def is_packed(model, **inputs) -> bool:
    """Whether a call computes rows: told by the shapes that the first feed-forward half is called with."""
    shapes = set()
    _, norm, *_ = (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    hook = norm.register_forward_hook(lambda _, args, output: shapes.add(output.shape[:2]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    (shape,) = shapes
    return shape != inputs["attention_mask"].shape


masks = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda lengths: mask_of(*lengths)),
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4).map(
        lambda rows: torch.tensor(rows).long()  # holes, padding in front, nothing but padding
    ),
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4).map(
        lambda rows: torch.tensor([[True, *row] for row in rows])  # holes behind a first token
    ),
)


@given(
    name=st.sampled_from(each_family),
    head=st.sampled_from(HEADS),
    routing=st.sampled_from(["hash-random", *GATE_ROUTINGS]),
    implementation=st.sampled_from(["sdpa", "sdpa", "eager"]),
    mask=masks,
    options=st.fixed_dictionaries(
        {},
        optional={
            "output_hidden_states": st.just(True),
            "return_dict": st.just(False),
            "token_type_ids": st.just(True),
            "position_ids": st.just(True),
        },
    ),
    seed=st.integers(0, 99),
)
def test_real_tokens_get_what_they_get_in_the_padded_form(
    name, head, routing, implementation, mask, options, seed
):
    model = moe(name, head, routing)
    if name in each_packed_family:
        model.set_attn_implementation(implementation)
    inputs, options = batch_of(mask, seed), dict(options)
    if options.pop("token_type_ids", False) and name not in ("DistilBert", "MPNet", "DebertaV2"):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if options.pop("position_ids", False) and name != "DistilBert":
        inputs["position_ids"] = torch.arange(mask.shape[1]).flip(0).unsqueeze(0) + 2
    routed, expected_routed = [], []
    with torch.no_grad():
        expected = model(**inputs, **options, pack=False, router_outputs=expected_routed)
        actual = model(**inputs, **options, router_outputs=routed)
    assert type(actual) is type(expected)
    if not isinstance(actual, tuple):
        assert list(actual) == list(expected)  # heads go by the order
        actual, expected = actual.to_tuple(), expected.to_tuple()
    for ours, theirs in zip(flat(actual), flat(expected), strict=True):
        assert_real_close(ours, theirs, mask)
    for ours, theirs in zip(routed, expected_routed, strict=True):
        assert torch.equal(ours.plan.expert_ids_TK, theirs.plan.expert_ids_TK)
        assert torch.equal(ours.plan.order_S, theirs.plan.order_S)
        if theirs.gate_TK is not None:
            torch.testing.assert_close(ours.gate_TK, theirs.gate_TK, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.balance_loss, theirs.balance_loss, atol=1e-4, rtol=1e-4)


def flat(output):
    for part in output:
        yield from part if isinstance(part, tuple) else (part,)


def assert_real_close(ours, theirs, mask):
    assert ours.shape == theirs.shape
    real = mask != 0 if ours.shape[:2] == mask.shape else ...
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", each_family)
def test_which_families_are_packed(name):
    model, inputs = moe(name), batch_of(mask_of(9, 3, 5))
    expected = name in each_packed_family
    assert is_packed(model, **inputs) == expected
    assert (why_not_packed(model) is None) == (why_not_packed(build_family(name)) is None) == expected
    if not expected:
        assert name in why_not_packed(model)


def test_hidden_states_are_0_at_padding():
    inputs = batch_of(mask_of(9, 3, 5))
    output = moe()(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    assert output.hidden_states[-1] is output.last_hidden_state
    for state in output.hidden_states:
        assert not state[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (mask_of(9, 9), "nothing to gain"),
        (mask_of(9, 3).flip(1), "the first place of a sequence is read, and is padding"),
        (torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "a sequence of nothing but padding is read, too"),
        (mask_of(*[40] * 9, 39), "next to nothing to gain"),
    ],
)
def test_batches_that_are_computed_as_they_are(mask, why):
    model, inputs = moe(), batch_of(mask)
    assert not is_packed(model, **inputs), why
    with torch.no_grad():
        assert_same(model(**inputs).to_tuple(), model(**inputs, pack=False).to_tuple())


def test_a_call_that_asks_for_attentions_is_computed_as_it_is():
    inputs = batch_of(mask_of(9, 3))
    model = moe(attn_implementation="eager")
    assert len(model(**inputs, output_attentions=True).attentions) == LAYERS
    assert not is_packed(moe(), **inputs, output_attentions=True)


@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 1, 9, 9)])
def test_masks_of_other_shapes_say_nothing_about_padding(shape):
    inputs = batch_of(mask_of(9, 3))
    inputs["attention_mask"] = torch.ones(shape, dtype=torch.bool)
    model = moe()
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], model(**inputs, pack=False)[0])
        assert model(input_ids=inputs["input_ids"])[0].all()


@pytest.mark.parametrize("name", each_packed_family)
def test_embeddings_in_the_place_of_ids(name):
    """RoBERTa's kin number their positions otherwise then."""
    model, mask = moe(name, routing="gate-token"), mask_of(9, 3, 5)
    embeds = model.get_input_embeddings()(batch_of(mask)["input_ids"]).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=mask, pack=False)[0]
        actual = model(inputs_embeds=embeds, attention_mask=mask)[0]
    assert not actual[mask == 0].any()
    assert_real_close(actual, expected, mask)


def assert_gradients_close(actual, expected):
    """To 2e-4 of the largest of each parameter's."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        torch.testing.assert_close(actual[name] / scale, gradient / scale, atol=2e-4, rtol=0)


@pytest.mark.parametrize("at_padding", [False, True])
@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_losses_and_gradients_are_those_of_the_padded_form(name, head, at_padding):
    """Of labels at padding, too, and of answers, which are chosen among all places: these are not packed."""
    model, mask = moe(name, head).double().train(), mask_of(9, 3, 5)
    inputs = batch_of(mask)
    inputs |= labels_for(head, inputs)
    per_token = head in ("ForTokenClassification", "ForMaskedLM")
    if per_token and not at_padding:
        inputs["labels"][mask == 0] = -100
    with without_dropout(model):
        expected = gradients(model, **inputs, pack=False)
        assert_gradients_close(gradients(model, **inputs), expected)
    read_at_padding = head == "ForQuestionAnswering" or (at_padding and per_token)
    assert is_packed(model, **inputs) != read_at_padding


def test_dropout_leaves_as_many_rows_and_scales_them():
    """Training draws other numbers than in the padded form, and keeps the mean."""
    model = moe("Bert").train()
    inputs = batch_of(mask_of(9, 3, 5))
    with torch.no_grad():
        states = [model(**inputs, output_hidden_states=True).hidden_states[0] for _ in range(400)]
        expected = copy.deepcopy(model).eval()(**inputs, output_hidden_states=True).hidden_states[0]
    real = inputs["attention_mask"] != 0
    error = torch.stack(states).mean(0)[real] - expected[real]
    assert error.abs().mean() < 0.02 * expected[real].abs().mean()


def test_bfloat16_and_autocast():
    model, inputs = moe("Bert", "ForSequenceClassification", "gate-sentence"), batch_of(mask_of(9, 3, 5))
    with torch.no_grad():
        expected = model(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model(**inputs).logits.float()
        half = model.to(torch.bfloat16)(**inputs).logits.float()
    for actual in (under_autocast, half):
        assert (actual - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    model, inputs = moe(), batch_of(mask_of(9, 3, 5))
    assert model.config._attn_implementation == "sdpa"
    expected = model(**inputs)[0]
    assert model.config._attn_implementation == PACKED_SDPA
    model.save_pretrained(tmp_path)
    assert PACKED_SDPA not in (tmp_path / "config.json").read_text()
    reloaded = type(model).from_pretrained(tmp_path)
    assert reloaded.config._attn_implementation == "sdpa"
    assert torch.equal(reloaded(**inputs)[0], expected)


def test_a_batch_without_padding_is_the_same_to_packed_attention():
    """A model keeps the implementation that packed a batch: without a pack it must be SDPA, mask and all."""
    model, left = moe(), batch_of(mask_of(9, 3).flip(1))
    full = {"input_ids": batch_of(mask_of(9, 9))["input_ids"]}
    with torch.no_grad():
        before = [model(**inputs)[0] for inputs in (full, left)]
        model(**batch_of(mask_of(9, 3)))
        assert model.config._attn_implementation == PACKED_SDPA
        after = [model(**inputs)[0] for inputs in (full, left)]
    assert_same(after, before)


@pytest.mark.parametrize("name", each_packed_family)
def test_a_dense_model_packs_where_it_is_told_to(name):
    dense, inputs = build_family(name, "ForSequenceClassification"), batch_of(mask_of(9, 3, 5))
    moe_model = to_moe(dense, all_neurons(1), num_shared_neurons=64)
    with torch.no_grad():
        expected = dense(**inputs, output_hidden_states=True)
        with packed(dense), packed(dense):  # once is enough
            assert is_packed(dense, **inputs)
            actual = dense(**inputs, output_hidden_states=True)
            as_tuple = dense(**inputs, return_dict=False)
        with packed(moe_model):
            torch.testing.assert_close(moe_model(**inputs).logits, actual.logits, atol=1e-4, rtol=1e-4)
        assert not is_packed(dense, **inputs)
    assert dense.config._attn_implementation == "sdpa"
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(as_tuple[0], expected.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_real_close(ours, theirs, inputs["attention_mask"])
        assert not ours[inputs["attention_mask"] == 0].any()


def test_whoever_leaves_first_ends_nobody_elses_packing():
    """Of two threads with one teacher, the second's batches were computed padded once the first had done."""
    dense, inputs = build_family("Bert", "ForSequenceClassification"), batch_of(mask_of(9, 3, 5))
    with packed(dense):
        first, second = packed(dense), packed(dense)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert is_packed(dense, **inputs)
    assert is_packed(dense, **inputs)
    second.__exit__(None, None, None)
    assert not is_packed(dense, **inputs)
    assert dense.config._attn_implementation == "sdpa"


def test_a_dense_model_that_cannot_pack_says_why():
    for model, message in (
        (build_family("MPNet"), "MPNetModel cannot be packed: the attention of MPNet is its own"),
        (build_family("Bert", attn_implementation="eager"), "='eager' cannot be given rows; 'sdpa' can"),
        (torch.nn.Linear(2, 2), "must hold exactly one of"),
    ):
        with pytest.raises(ValueError, match=message), packed(model):
            pass


@pytest.mark.parametrize("routing", ["hash-random", "gate-token", "gate-sentence"])
@pytest.mark.parametrize("max_tokens", [None, 17, 20, 27, 999])
def test_a_pack_that_is_given(routing, max_tokens):
    """With a bound too, which leaves rows that no token has."""
    mask = mask_of(9, 3, 5)
    model = moe("Bert", "ForSequenceClassification", routing, num_hidden_layers=1)
    inputs, pack = batch_of(mask), Pack.from_mask(mask, max_tokens=max_tokens)
    assert pack.num_rows == {None: 17, 999: 27}.get(max_tokens, max_tokens)
    routed, expected_routed = [], []
    with torch.no_grad():
        expected = model(**inputs, pack=False, output_hidden_states=True, router_outputs=expected_routed)
        actual = model(**inputs, pack=pack, output_hidden_states=True, router_outputs=routed)
        kept = model(**inputs, pack=pack.with_rows_kept(), output_hidden_states=True)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for ours, rows_ND, theirs in zip(
        actual.hidden_states, kept.hidden_states, expected.hidden_states, strict=True
    ):
        assert_real_close(ours, theirs, mask)
        assert rows_ND.shape == (pack.num_rows, 32)
        assert torch.equal(pack.padded(rows_ND), ours)
    for ours, theirs in zip(routed, expected_routed, strict=True):
        assert torch.equal(ours.plan.expert_ids_TK, theirs.plan.expert_ids_TK)


def test_gradients_with_rows_that_no_token_has():
    mask = mask_of(9, 3, 5)
    model = moe("Bert", "ForSequenceClassification", "gate-sentence").double().train()
    inputs = {**batch_of(mask), "labels": torch.tensor([0, 1, 1])}
    with without_dropout(model):
        expected = gradients(model, **inputs, pack=False)
        actual = gradients(model, **inputs, pack=Pack.from_mask(mask, max_tokens=25))
    assert_gradients_close(actual, expected)


def test_more_tokens_than_rows_are_not_left_out_in_silence():
    """Without asking the device nothing can be raised: everything is NaN, sequences without any row too."""
    mask = mask_of(9, 9, 9)
    for head in ("ForSequenceClassification", "ForTokenClassification"):
        outputs = moe("Bert", head)(**batch_of(mask), pack=Pack.from_mask(mask, max_tokens=10))
        assert bool(outputs.logits.isnan().all())


def test_nothing_but_padding_gives_0():
    mask = torch.zeros(2, 4, dtype=torch.long)
    states = moe()(**batch_of(mask), pack=Pack.from_mask(mask), output_hidden_states=True).hidden_states
    assert not any(bool(state.any()) for state in states)


def test_an_empty_sequence_among_others_takes_no_part():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    model, inputs = moe(), batch_of(mask)
    for max_tokens in (None, 8):
        actual = model(**inputs, pack=Pack.from_mask(mask, max_tokens=max_tokens))[0]
        assert_real_close(actual, model(**inputs, pack=False)[0], mask)
        assert not actual[1].any()


def test_packs_that_do_not_fit_are_refused():
    model, inputs = moe(), batch_of(mask_of(9, 3))
    pack = Pack.from_mask(inputs["attention_mask"])
    shapes = r"pack is of a batch of shape \(2, 8\), got tokens of shape \(2, 9\)"
    with pytest.raises(ValueError, match=shapes):
        model(**inputs, pack=Pack.from_mask(mask_of(8, 3)))
    with pytest.raises(TypeError, match="pack must be a Pack, False or None, got bool"):
        model(**inputs, pack=True)
    with pytest.raises(ValueError, match="attentions are of the padded form alone"):
        model(**inputs, pack=pack, output_attentions=True)
    with pytest.raises(ValueError, match="the attention of MPNet is its own"):
        moe("MPNet")(**inputs, pack=pack)
    with pytest.raises(ValueError, match=r"mask must have shape \[B, S\], got \(9,\)"):
        Pack.from_mask(torch.ones(9, dtype=torch.bool))
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        Pack.from_mask(mask_of(9, 3), max_tokens=0)


@pytest.mark.parametrize(("routing", "max_tokens"), [("hash-random", None), ("gate-sentence", 20)])
def test_a_given_pack_compiles_as_one_graph(routing, max_tokens):
    mask = mask_of(9, 3, 5)
    model = moe("Bert", "ForSequenceClassification", routing, num_hidden_layers=1)
    inputs, pack = batch_of(mask), Pack.from_mask(mask, max_tokens=max_tokens)
    expected = model(**inputs, pack=pack).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, pack=pack).logits, expected, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()
