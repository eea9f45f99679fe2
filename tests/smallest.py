"""The smallest models there are, in folders: for tests that load one after the other."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import BertForSequenceClassification, BertModel

from tests import tiny

WORDS = tiny.WORDS[:20]
VOCAB = len(tiny.SPECIAL_TOKENS) + len(WORDS)
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "id2label": {0: "low", 1: "high"},
}


def smallest(head=BertForSequenceClassification):
    return tiny.initialised(head, **SIZES)


def save_tokenizer(folder: Path) -> None:
    tiny.tokenizer(folder, WORDS, model_max_length=16).save_pretrained(folder)


def save_sentence_encoder(folder: Path) -> None:
    smallest(BertModel).save_pretrained(folder)
    save_tokenizer(folder)
    parts = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in parts]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    options = {"max_seq_length": 12, "do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(options))
