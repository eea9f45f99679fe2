"""Models whose experts store the neurons they share once: surgery, costs, checkpoints, and the joint fit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from moebert_kernels.compress.experts.adaptation import adapt, random_scores
from moebert_kernels.compress.experts.fitting import RARE, RIDGE, fit
from moebert_kernels.compress.training.distillation import without_dropout
from moebert_kernels.errors import UserError
from moebert_kernels.models import (
    MoEBertConfig,
    MoEBertModel,
    count_parameters,
    encoder_flops_per_token,
    find_ffns,
    parameters_used_per_token,
    replace_ffns,
)
from moebert_kernels.models.surgery import to_moe
from python_ref import fitting as ref
from python_ref.ffn import activation
from tests import tiny
from tests.compress.experts.layers import batches, calls_of, experts_of, tokens
from tests.tiny import OWN, SHARED


def tied_and_untied(model_class=BertForSequenceClassification, **options):
    teacher = tiny.build(model_class)
    return [
        to_moe(teacher, tiny.some_shared(), num_shared_neurons=SHARED, tie_shared=tie, **options)
        for tie in (True, False)
    ]


@torch.no_grad()
def test_a_tied_student_begins_as_the_untied_one():
    tied, untied = tied_and_untied()
    batch = tiny.batch()
    torch.testing.assert_close(tied(**batch).logits, untied(**batch).logits)
    stored = 2 * tiny.HIDDEN + 1
    saved = tiny.LAYERS * 3 * SHARED * stored
    assert count_parameters(tied) == count_parameters(untied) - saved
    assert parameters_used_per_token(tied) == parameters_used_per_token(untied)
    assert encoder_flops_per_token(tied) == encoder_flops_per_token(untied)


def test_in_place_all_neurons_in_common_are_tied_by_default():
    model = tiny.build(BertModel)
    replace_ffns(model, tiny.some_shared(), tie_shared=True)
    assert model.config.num_shared_neurons == SHARED
    assert {ffn.num_shared for ffn in experts_of(model)} == {SHARED}


def test_bert_base_stores_81_million():
    """In place of 110 million; of those a token uses, none less."""
    with torch.device("meta"):
        tied, untied = (MoEBertModel(MoEBertConfig(tie_shared=tie)) for tie in (True, False))
    assert count_parameters(untied) == 109_565_184
    assert count_parameters(tied) == 109_565_184 - 12 * 3 * 512 * (2 * 768 + 1) == 81_235_200
    assert parameters_used_per_token(tied) == parameters_used_per_token(untied) == 66_987_264


@torch.no_grad()
def test_a_checkpoint_round_trip(tmp_path):
    """It is smaller by the copies; one from before there was `tie_shared` is untied."""
    tied, untied = tied_and_untied()
    batch = tiny.batch()
    for name, model in (("tied", tied), ("untied", untied)):
        model.save_pretrained(tmp_path / name)
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("untied", "tied")]
    copies = tiny.LAYERS * 3 * SHARED * (2 * tiny.HIDDEN + 1)
    assert sizes[0] - sizes[1] == pytest.approx(4 * copies, abs=1500)  # the names take their bytes
    config = tmp_path / "untied" / "config.json"
    config.write_text(config.read_text().replace('"tie_shared": false,', ""))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "untied")
    assert torch.equal(again(**batch).logits, untied(**batch).logits)


def test_from_scratch_every_weight_is_drawn():
    model = MoEBertModel(MoEBertConfig(**tiny.bert_config().to_diff_dict(), **SIZES))
    for ffn in experts_of(model):
        for weight in (ffn.shared_w1_CD, ffn.shared_w2_DC, ffn.w1_EFD, ffn.w2_EDF):
            assert weight.detach().std().item() == pytest.approx(0.02, rel=0.3)
        assert not ffn.shared_bias1_C.any()


SIZES = {"expert_size": SHARED + OWN, "num_shared_neurons": SHARED, "tie_shared": True}


def test_what_cannot_be_tied_is_refused():
    teacher = tiny.build(BertModel)
    with pytest.raises(ValueError, match=r"num_shared_neurons must lie in \[0, 6\]"):
        to_moe(teacher, tiny.some_shared(), num_shared_neurons=7, tie_shared=True)
    message = "num_shared_neurons must be less than expert_size=9 with tie_shared"
    with pytest.raises(ValueError, match=message):
        MoEBertConfig(expert_size=9, num_shared_neurons=9, tie_shared=True)
    with pytest.raises(UserError, match="must be less than the expert size 8 to be tied"):
        adapt(teacher, random_scores(3, 64), expert_size=8, num_shared=8, tie_shared=True)


def test_adapt_ties_the_most_important():
    teacher = tiny.build(BertModel)
    scores_LF = random_scores(tiny.LAYERS, tiny.WIDTH)
    student = adapt(teacher, scores_LF, tie_shared=True)
    for ffn, dense, scores_F in zip(experts_of(student), find_ffns(teacher), scores_LF, strict=True):
        best = scores_F.argsort(descending=True)[:11]
        assert torch.equal(ffn.shared_w1_CD, dense.w1.weight[best])
        assert torch.equal(ffn.shared_w2_DC, dense.w2.weight[:, best])
        assert ffn.w1_EFD.shape[1] == tiny.WIDTH // 4 - 11


def test_training_moves_shared_neurons_by_what_all_tokens_say():
    """Their gradient is the sum of what the copies of an untied student get."""
    tied, untied = (model.train() for model in tied_and_untied())
    for model in (tied, untied):
        with without_dropout(model):
            model(**tiny.batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    for mine, theirs in zip(experts_of(tied), experts_of(untied), strict=True):
        index_EF = tiny.some_shared()[0]
        where = [(row == neuron).nonzero().item() for neuron in range(SHARED) for row in index_EF]
        copies = torch.tensor(where).view(SHARED, 4)
        order = index_EF[0][index_EF[0] < SHARED]
        summed = torch.stack([theirs.w1_EFD.grad[range(4), copies[neuron]].sum(0) for neuron in order])
        torch.testing.assert_close(mine.shared_w1_CD.grad, summed, rtol=1e-3, atol=1e-5)


def strengths(a_TF, weight_T, expert_T, num_experts, ridge, rare):
    """lambda_E: 0 for an expert without tokens."""
    lambda_E = torch.zeros(num_experts, dtype=torch.float64)
    for e in expert_T.unique():
        mine = expert_T == e
        lambda_E[e] = ref.strength(a_TF[mine], weight_T[mine], ridge, rare)
    return lambda_E


@torch.no_grad()
def fit_by_reference(student, teacher, rows):
    """The student fitted by the definition, a layer at a time, each on what the whole student gives it."""
    real_T = torch.cat([batch["attention_mask"].flatten() for batch in rows]) != 0
    for dense, ffn in zip(find_ffns(teacher), experts_of(student), strict=True):
        sums, _, _ = zip(*calls_of(dense.norm, teacher, rows), strict=True)
        given, arguments, _ = zip(*calls_of(ffn, student, rows), strict=True)
        s_TD, x_TD = tokens(sums)[real_T], tokens(given)[real_T]
        expert_T = torch.cat([how["routing"].plan.expert_ids_TK for how in arguments])[real_T, 0]
        weight_T = ref.token_weights(s_TD, dense.norm.eps)
        shared_TC = x_TD @ ffn.shared_w1_CD.T + ffn.shared_bias1_C
        own_TF = (ffn.w1_EFD[expert_T] @ x_TD[:, :, None])[:, :, 0] + ffn.bias1_EF[expert_T]
        a_TF = activation("gelu")(torch.cat([shared_TC, own_TF], 1))
        lambda_E = strengths(a_TF, weight_T, expert_T, ffn.num_experts, RIDGE, RARE)
        as_is = ffn.shared_w2_DC, ffn.w2_EDF, ffn.bias2_ED
        fitted = ref.fit_tied_output(a_TF, expert_T, s_TD - x_TD, weight_T, *as_is, lambda_E)
        for parameter, value in zip(as_is, fitted, strict=True):
            parameter.copy_(value)
    return student


@pytest.mark.parametrize("absent", [None, 2])
@torch.no_grad()
def test_the_fit_is_the_reference(absent):
    """Also where an expert has no tokens: it stays as it is."""
    teacher = tiny.build(BertForSequenceClassification).double()
    student = to_moe(teacher, tiny.some_shared(), num_shared_neurons=SHARED, tie_shared=True)
    tables_LV = student.bert.encoder.tables_LV
    if absent is not None:
        tables_LV[tables_LV == absent] = 0
    before = copy.deepcopy(student)
    expected = fit_by_reference(copy.deepcopy(student), teacher, batches())
    fit(student, teacher, batches())
    torch.testing.assert_close(student.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-9)
    if absent is not None:
        old, new = (experts_of(model)[0].w2_EDF[absent] for model in (before, student))
        assert torch.equal(old, new)


@given(
    rows=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    ridge=st.floats(1e-4, 10),
    seed=st.integers(0, 99),
)
def test_the_reference_is_the_minimum(rows, sizes, ridge, seed):
    """Of the formula summed over experts; so the first sums together are never larger than before."""
    (C, F, E), D = sizes, 3
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a_TF, r_TD = randn(rows, C + F), randn(rows, D)
    expert_T = torch.randint(E, (rows,), generator=generator)
    weight_T = ref.token_weights(r_TD, 1e-3)
    as_is = randn(D, C), randn(E, D, F), randn(E, D)
    lambda_E = strengths(a_TF, weight_T, expert_T, E, ridge, ridge)

    def formula(shared_DC, w2_EDF, b2_ED, penalty=1.0):
        total = 0.0
        for e in range(E):
            mine = expert_T == e
            w_DF = torch.cat([shared_DC, w2_EDF[e]], 1)
            total += float(ref.weighted_error(a_TF[mine], r_TD[mine], weight_T[mine], w_DF, b2_ED[e]))
            moved = (shared_DC - as_is[0], w2_EDF[e] - as_is[1][e], b2_ED[e] - as_is[2][e])
            total += penalty * float(lambda_E[e]) * sum(float(m.square().sum()) for m in moved)
        return total

    fitted = ref.fit_tied_output(a_TF, expert_T, r_TD, weight_T, *as_is, lambda_E)
    assert formula(*fitted, penalty=0) <= formula(*as_is) * (1 + 1e-9)
    for step in (1e-3, 1e-1):
        other = [value + step * randn(*value.shape) for value in fitted]
        assert formula(*fitted) <= formula(*other) * (1 + 1e-9)
