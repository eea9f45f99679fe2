"""Evaluation: official metrics however rows are batched, and where the tokens went."""

import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score
from tiny_bert import LAYERS, VOCAB, build, quarters
from transformers import BertForSequenceClassification, BertTokenizerFast

from moebert_kernels.compress.evaluate import batches, evaluate, expert_load
from moebert_kernels.compress.tasks import Task, TaskData
from moebert_kernels.models import to_moe


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCAB - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


def make_rows(n=30):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCAB, (3 + i % 9,), generator=generator).tolist() for i in range(n)]
    masks = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": [i % 2 for i in range(n)]})


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_metric_does_not_depend_on_batching(tokenizer, batch_size):
    model, rows = build(BertForSequenceClassification), make_rows()
    model.train()  # evaluation must switch dropout off by itself
    data = TaskData(Task("toy", "classification", ("a", "b"), ("accuracy",), "accuracy"), rows, rows)
    calls = []
    found = evaluate(model, data, tokenizer, batch_size=batch_size, progress=lambda *c: calls.append(c))
    with torch.no_grad():
        one_by_one = [int(model(torch.tensor([ids])).logits.argmax()) for ids in rows["input_ids"]]
    assert found == {"accuracy": accuracy_score(rows["labels"], one_by_one)}
    assert calls[-1] == (30, 30)


def test_expert_load_counts_real_tokens(tokenizer):
    rows = make_rows()
    tables_LV = torch.stack([torch.arange(VOCAB) * (layer + 1) % 4 for layer in range(LAYERS)]).int()
    model = to_moe(
        build(BertForSequenceClassification), quarters(), num_shared_neurons=0, tables_LV=tables_LV
    )
    load = expert_load(model, batches(rows, tokenizer, batch_size=8))
    tokens = torch.tensor([token for ids in rows["input_ids"] for token in ids])
    for layer, shares in enumerate(load):
        counts = torch.bincount(tables_LV[layer, tokens], minlength=4)
        assert shares == pytest.approx((counts / len(tokens)).tolist())
    with pytest.raises(ValueError, match="at least one batch"):
        expert_load(model, [])
