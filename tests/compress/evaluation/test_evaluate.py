"""Evaluation: the same however rows are batched, and where the tokens went."""

import pytest
import torch
from datasets import Dataset
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

from moebert_kernels.compress.data.tasks import EncodedData, EncodedRows, Task
from moebert_kernels.compress.evaluation.quality import batches, evaluate, expert_load, predict
from tests import tiny
from tests.tiny import LAYERS, VOCAB, build, quartered


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path)


def make_rows(n=30):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, VOCAB, (3 + i % 9,), generator=generator).tolist() for i in range(n)]
    masks = [[1] * len(row) for row in ids]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": [i % 2 for i in range(n)]})


HEADS = {
    BertForSequenceClassification: lambda output: output.logits[0],
    BertForTokenClassification: lambda output: output.logits[0],
    BertForQuestionAnswering: lambda output: torch.stack([output.start_logits, output.end_logits], -1)[0],
}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predictions_do_not_depend_on_batching(tokenizer, batch_size, head):
    """In the rows' order, and without what the model says of padding."""
    model, rows = build(head), make_rows()
    model.train()  # it must switch dropout off by itself
    calls = []
    found = predict(model, rows, tokenizer, batch_size=batch_size, progress=lambda *c: calls.append(c))
    assert calls[-1] == (30, 30)
    for ids, output in zip(rows["input_ids"], found, strict=True):
        with torch.no_grad():
            alone = HEADS[head](model(torch.tensor([ids])))
        torch.testing.assert_close(torch.from_numpy(output), alone, rtol=1e-4, atol=1e-4)


def test_every_validation_set_is_scored_under_its_name(tokenizer):
    rows = make_rows()
    sets = {"": rows, "other": rows.select(range(4))}
    task = Task("toy", "classification", ("a", "b"), ("rows", "first"), "rows")

    def scored(rows):
        return EncodedRows(rows, lambda outputs: {"rows": len(outputs), "first": float(outputs[0][0])})

    calls = []
    found = evaluate(
        build(BertForSequenceClassification),
        EncodedData(task, rows, {name: scored(rows) for name, rows in sets.items()}),
        tokenizer,
        progress=lambda *call: calls.append(call),
    )
    assert (found["rows"], found["rows_other"]) == (30, 4)
    assert found["first"] == pytest.approx(found["first_other"])
    assert calls == [(30, 34), (34, 34)]


def test_expert_load_counts_real_tokens(tokenizer):
    rows = make_rows()
    tables_LV = torch.stack([torch.arange(VOCAB) * (layer + 1) % 4 for layer in range(LAYERS)]).int()
    model = quartered(build(BertForSequenceClassification), tables_LV=tables_LV)
    load = expert_load(model, batches(rows, tokenizer, batch_size=8))
    tokens = torch.tensor([token for ids in rows["input_ids"] for token in ids])
    for layer, shares in enumerate(load):
        counts = torch.bincount(tables_LV[layer, tokens], minlength=4)
        assert shares == pytest.approx((counts / len(tokens)).tolist())
    with pytest.raises(ValueError, match="at least one batch"):
        expert_load(model, [])
