"""Costs, against the paper's figures for BERT-base and against counts made by hand."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from moebert_kernels.models import (
    MoEBertConfig,
    MoEBertModel,
    count_parameters,
    encoder_flops_per_token,
    ffn_flops_per_token,
    parameters_used_per_token,
    replace_ffns,
)
from tests.tiny import HIDDEN, LAYERS, VOCAB, WIDTH, build, quartered, quarters


def test_bert_base_and_its_moebert():
    """109M parameters become 66M per token (Table 1 of arXiv 2204.07675); the encoder's work halves."""
    with torch.device("meta"):
        dense = BertModel(BertConfig())
        moe = MoEBertModel(MoEBertConfig())
    assert count_parameters(dense) == parameters_used_per_token(dense) == 109_482_240
    assert count_parameters(moe) == 109_565_184
    assert parameters_used_per_token(moe) == 66_987_264
    assert encoder_flops_per_token(dense) == 2 * 12 * (4 * 768**2 + 2 * 768 * 3072) == 2 * 84_934_656
    assert encoder_flops_per_token(moe) == 2 * 12 * (4 * 768**2 + 2 * 768 * 768) == 2 * 42_467_328
    assert ffn_flops_per_token(dense) == 4 * ffn_flops_per_token(moe) == 2 * 12 * 2 * 768 * 3072


def test_every_further_expert_a_gate_uses_counts():
    size = WIDTH // 4
    expert = 2 * HIDDEN * size + size + 3 * HIDDEN
    for top_k in (1, 2, 4):
        moe = quartered(build(BertModel), "gate-token", top_k=top_k)
        stored = count_parameters(build(BertModel)) + LAYERS * (3 * 3 * HIDDEN + 4 * HIDDEN)
        assert count_parameters(moe) == stored
        assert parameters_used_per_token(moe) == stored - LAYERS * (4 - top_k) * expert
        assert ffn_flops_per_token(moe) == 2 * LAYERS * (top_k * 2 * HIDDEN * size + 4 * HIDDEN)


def test_tied_parameters_count_once():
    model = build(BertForMaskedLM)
    untied = count_parameters(model.bert) + HIDDEN * HIDDEN + 3 * HIDDEN + VOCAB
    assert count_parameters(model) == untied


def test_in_place_models_cost_what_their_own_class_does():
    dense = build(BertModel)
    moe = quartered(dense)
    replace_ffns(dense, quarters())
    for cost in (count_parameters, parameters_used_per_token, ffn_flops_per_token, encoder_flops_per_token):
        assert cost(dense) == cost(moe)
