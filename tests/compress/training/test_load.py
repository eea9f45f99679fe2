"""The experts' load in training: every token once, in its epoch, whatever happens in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import python_ref.routing as ref
from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.evaluation.quality import batches, expert_load
from moebert_kernels.compress.experts.adaptation import adapt, random_scores, token_counts
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.compress.training.finetuning import last_checkpoint
from moebert_kernels.compress.training.load import TrainingLoad
from tests.compress.toys import StopAt, make_rows, make_trainer, toy_bert
from tests.tiny import assert_same

SETTINGS = DistillSettings(epochs=3, batch_size=8, learning_rate=1e-3, seed=5)


def make_student(routing, dropout=0.0, top_k=1, counts_V=None):
    scores_LF = random_scores(2, 64, seed=1)
    dense = toy_bert(0, dropout=dropout)
    student = adapt(dense, scores_LF, routing=routing, top_k=top_k, seed=1, token_counts_V=counts_V)
    if student.config.is_gated:
        with torch.no_grad():  # not so small that all probabilities are alike
            for layer in student.bert.encoder.layer:
                layer.ffn.router.gate.weight.mul_(20)
    return student


def test_a_hash_gives_in_every_epoch_what_its_tables_say_of_the_rows(tmp_path, tokenizer):
    """20 rows in batches of 8: a last, short batch, and padding in all of them."""
    rows, student = make_rows(20), make_student("hash-random")
    counts_V = token_counts(rows, 45)
    tables_LV = student.bert.encoder.tables_LV.long()
    expected_LE = torch.zeros(2, 4).long().scatter_add_(1, tables_LV, counts_V.expand(2, -1))
    found = distill(student, toy_bert(0), rows, tokenizer, replace(SETTINGS, epochs=2), tmp_path / "run")
    shares_LE = expected_LE.double() / counts_V.sum()
    assert found.load_NLE == [shares_LE.tolist()] * 2


def test_balanced_tables_follow_the_training_rows_and_no_padding(tmp_path, tokenizer):
    """The authors counted [PAD] like a word: the most frequent of all had an expert nearly to itself."""
    rows = make_rows(96)
    to_20 = {"padding": "max_length", "max_length": 20}
    padded = rows.map(lambda batch: dict(tokenizer.pad(batch, **to_20)), batched=True)
    assert {len(ids) for ids in padded["input_ids"]} == {20}
    counts_V = token_counts(padded, 45)
    assert torch.equal(counts_V, token_counts(rows, 45))
    assert counts_V[0] == 0
    student = make_student("hash-balance", counts_V=counts_V)
    for table_V in student.bert.encoder.tables_LV:
        assert torch.equal(table_V.long(), ref.hash_balance_table(counts_V, 4))
    found = distill(student, toy_bert(0), padded, tokenizer, replace(SETTINGS, epochs=1), tmp_path / "run")
    assert all(abs(share - 1 / 4) < 0.01 for shares_E in found.load_NLE[0] for share in shares_E)


@pytest.mark.parametrize(("routing", "top_k"), [("gate-token", 2), ("gate-sentence", 1)])
def test_accumulated_batches_count_as_their_rows_do(routing, top_k, tmp_path, tokenizer):
    """With nothing learned, training sees what evaluation sees."""
    rows, student = make_rows(20), make_student(routing, top_k=top_k)
    expected_LE = expert_load(student, batches(rows, tokenizer))
    for size, accumulation in ((20, 1), (3, 4)):
        how = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        how |= {"learning_rate": 0.0, "num_train_epochs": 2}
        trainer = make_trainer(tmp_path, tokenizer, student, rows=rows, **how)
        trainer.train()
        torch.testing.assert_close(torch.tensor(trainer.load.shares()), torch.tensor([expected_LE] * 2))


@pytest.mark.parametrize(("routing", "stops"), [("gate-token", (7, 33)), ("hash-random", (23,))])
def test_an_interrupted_run_reports_what_an_undisturbed_one_does(routing, stops, tmp_path, tokenizer):
    """Checkpoints at 5, 10 ...; epochs of 16 steps: the third stop throws the end of an epoch away."""
    rows = make_rows(128)

    def run(folder, callbacks=()):
        said, models = [], (make_student(routing, dropout=0.1), toy_bert(0))
        found = distill(*models, rows, tokenizer, SETTINGS, folder, callbacks=callbacks, say=said.append)
        return found, said

    undisturbed, said = run(tmp_path / "whole")
    assert len(undisturbed.load_NLE) == 3
    if routing == "gate-token":
        assert undisturbed.load_NLE[0] != undisturbed.load_NLE[2]
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / f"cut-{stop}", [StopAt(stop)])
        resumed, said_later = run(tmp_path / f"cut-{stop}")
        assert resumed == undisturbed
        step = stop // 5 * 5
        assert said_later == [f"goes on from the checkpoint of step {step} of 48", *said[step // 16 :]]
    assert len(said) == 3
    fullest = max(max(shares) for shares in undisturbed.load_NLE[1])
    assert said[1].startswith(f"epoch 2 of 3: fullest expert {fullest:.0%} of tokens (layer ")


def test_a_run_called_again_after_its_last_step_takes_no_further_one(tmp_path, tokenizer):
    """Half an epoch more, then killed before the student was saved: the Trainer took a 25th step of 24."""
    rows, settings = make_rows(128), replace(SETTINGS, epochs=1.5)
    first, again = (
        distill(make_student("gate-token"), toy_bert(0), rows, tokenizer, settings, tmp_path / "run")
        for _ in range(2)
    )
    assert len(first.losses) == 24
    assert again == first


def test_a_checkpoint_at_the_end_of_an_epoch_holds_the_whole_of_it(tmp_path, tokenizer):
    """The Trainer goes on with the next epoch and never says that this one has ended."""

    def train(folder, resume=None, **options):
        options |= {"num_train_epochs": 2, "save_strategy": "epoch", "seed": 3}
        trainer = make_trainer(folder, tokenizer, make_student("gate-token"), **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.load.counts_NLE

    first, second = train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "run" / "checkpoint-3"
    for options in ({}, {"restore_callback_states_from_checkpoint": True}):
        assert_same(train(tmp_path / "again", str(checkpoint), **options), [first, second])
    state = read_json(Path(last_checkpoint(tmp_path / "again" / "run")) / "trainer_state.json")
    saved = state["stateful_callbacks"]["TrainingLoad"]
    assert saved["attributes"]["counts_NLE"] == [first.tolist(), second.tolist()]


def test_a_second_run_of_a_trainer_begins_at_nothing(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, make_student("hash-random"), rows=make_rows(16))
    trainer.train()
    (first_LE,) = trainer.load.counts_NLE
    trainer.train()
    (second_LE,) = trainer.load.counts_NLE
    assert torch.equal(first_LE, second_LE)


def test_counting_reads_nothing_from_the_device():
    """A tensor without data can be counted and cannot be read. Stops an `.item()`, which waits each step."""
    load = TrainingLoad()
    with FakeTensorMode():
        for epoch in (0, 0, 1):
            load.add(epoch, torch.ones(2, 4, dtype=torch.int32))
        assert [counts_LE.dtype for counts_LE in load.counts_NLE] == [torch.int64] * 2
        with pytest.raises(RuntimeError):
            load.shares()


def test_a_student_without_experts_has_no_load(tmp_path, tokenizer):
    said, models, settings = [], (toy_bert(1), toy_bert(0)), replace(SETTINGS, epochs=1)
    found = distill(*models, make_rows(), tokenizer, settings, tmp_path / "run", say=said.append)
    assert found.load_NLE == said == []


@torch.no_grad()
def send_to_the_first(student, rows, tokenizer):
    """Turn the gates' first expert to what all tokens have in common, the last away from it."""
    (batch,) = batches(rows, tokenizer, batch_size=len(rows))
    batch.pop("labels")
    seen = []
    hooks = [
        layer.ffn.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in student.bert.encoder.layer
    ]
    student.eval()(**batch, pack=False)
    for hook, layer, x_BSD in zip(hooks, student.bert.encoder.layer, seen, strict=True):
        hook.remove()
        mean_D = x_BSD[batch["attention_mask"].bool()].mean(0)
        weight_ED = layer.ffn.router.gate.weight
        weight_ED.mul_(0.1).add_(torch.linspace(1, -1, 4)[:, None] * mean_D / mean_D.square().sum())


@pytest.mark.parametrize("routing", ["gate-token", "gate-sentence"])
def test_the_balance_loss_evens_the_load_out(routing, tmp_path, tokenizer):
    """A gate that sends nearly everything one way learns not to, and only because of the loss."""
    rows = make_rows(96)

    def fullest(weight):
        student = make_student(routing)
        student.config.balance_loss_weight = weight
        send_to_the_first(student, rows, tokenizer)
        settings = replace(SETTINGS, epochs=6, learning_rate=3e-3)
        found = distill(student, toy_bert(0), rows, tokenizer, settings, tmp_path / f"run-{weight}")
        return [max(max(shares_E) for shares_E in load_LE) for load_LE in found.load_NLE], found.losses

    (first, *_, last), losses = fullest(1.0)
    (_, *_, unbalanced), _ = fullest(0.0)
    assert first > 0.6
    assert last < 0.5
    assert unbalanced > 0.9
    assert losses[-1]["balance"] < losses[0]["balance"]
