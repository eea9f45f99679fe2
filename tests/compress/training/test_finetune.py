import json

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
    TrainerCallback,
)

from moebert_kernels.compress.data.batching import LengthGroupedSampler, RowCollator, padded_batches
from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.data.tasks import Task, TaskData
from moebert_kernels.compress.training.finetuning import finetune, last_checkpoint
from moebert_kernels.errors import UserError
from tests import tiny
from tests.compress.toys import StopAt, weights

WORDS = ["good", "bad", "a", "b", "c", "d"]
SIZES = {**tiny.SMALLER, "vocab_size": 11, "num_hidden_layers": 1}
SETTINGS = {"epochs": 2, "lr": 5e-3, "batch_size": 8, "max_length": 8}
CPU = {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path, WORDS)


@pytest.fixture
def pretrained(tmp_path, tokenizer):
    folder = tmp_path / "pretrained"
    tiny.initialised(BertModel, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def teach(model, output, data=None, callbacks=(), arguments=None, **changes):
    """Fine-tune on sentiment, or other data; `arguments` are TrainingArguments'."""
    options = {**SETTINGS, **changes, "training_arguments": CPU | (arguments or {}), "callbacks": callbacks}
    return finetune(model, data or sentiment(), output, **options)


def sentiment(num_rows=60):
    """The label is whether the text says good or bad."""
    filler = ["a", "b c", "d a b", "c c c d"]
    texts = [f"{filler[i % 4]} {['bad', 'good'][i % 2]} {filler[i % 3]}" for i in range(num_rows)]
    rows = Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(num_rows)]})
    task = Task("csv", "classification", ("bad", "good"), ("accuracy", "macro_f1"), "accuracy")
    return TaskData(task, rows, rows.select(range(10)))


def test_a_teacher_learns_is_saved_and_loads(tmp_path, pretrained):
    output = tmp_path / "runs" / "teacher"
    assert teach(pretrained, output, epochs=6) == {"accuracy": 1.0, "macro_f1": 1.0}
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.problem_type == "single_label_classification"
    texts = ["b c good b c", "a bad a"]
    encoded = AutoTokenizer.from_pretrained(output)(texts, padding=True, return_tensors="pt")
    assert model.eval()(**encoded).logits.argmax(-1).tolist() == [1, 0]
    assert [path.name for path in output.parent.iterdir()] == ["teacher"]


def test_interrupted_training_goes_on_and_ends_at_the_same_weights(tmp_path, pretrained):
    """Stops a resumed run from seeing other rows, or other dropout, than one that was not interrupted."""
    steps, often = [], {"save_steps": 3}
    teach(pretrained, tmp_path / "whole", arguments=often)

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    resumed = tmp_path / "resumed"
    for step in (5, 13):  # in the first epoch of 8 steps, and in the second
        with pytest.raises(KeyboardInterrupt):
            teach(pretrained, resumed, callbacks=[Count(), StopAt(step)], arguments=often)
        assert not resumed.exists()
    teach(pretrained, resumed, callbacks=[Count()], arguments=often)
    assert steps == [1, 2, 3, 4, 5, *range(4, 14), *range(13, 17)]
    tiny.assert_same(weights(resumed), weights(tmp_path / "whole"))


def test_other_settings_or_data_start_again(tmp_path, pretrained):
    """Stops a checkpoint of one run from being taken for the middle of another."""

    def first_step(data=None, **changes):
        class First(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                seen.append(state.global_step)
                if state.global_step == seen[0] + 4:
                    raise KeyboardInterrupt

        seen = []
        with pytest.raises(KeyboardInterrupt):
            teach(pretrained, tmp_path / "teacher", data, [First()], {"save_steps": 2}, **changes)
        return seen[0]

    assert first_step() == 1
    assert first_step() == 5
    assert first_step(lr=1e-3) == 1
    assert first_step(sentiment(62), lr=1e-3) == 1
    config = read_json(pretrained / "config.json") | {"hidden_dropout_prob": 0.3}
    (pretrained / "config.json").write_text(json.dumps(config))
    assert first_step(sentiment(62), lr=1e-3) == 1


def test_a_folder_where_checkpoints_would_go_is_not_emptied(tmp_path, pretrained):
    """Stops a run from removing `<output>.unfinished` that its user had made, with all that was in it."""
    mine = tmp_path / "teacher.unfinished" / "notes"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"teacher\.unfinished holds notes, which no run .* rename it"):
        teach(pretrained, tmp_path / "teacher")
    assert [path.name for path in mine.parent.iterdir()] == ["notes"]
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "teacher").exists()


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tmp_path):
    for step, state in ((2, {"global_step": 2}), (10, {"global_step": 10}), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(json.dumps(state))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path / "checkpoint-2") is None


def test_regression_on_a_model_with_another_head(tmp_path, tokenizer):
    folder = tmp_path / "three labels"
    tiny.initialised(BertForSequenceClassification, **SIZES, num_labels=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = sentiment(24).train.remove_columns("label").add_column("label", [i % 2 + 0.5 for i in range(24)])
    task = Task("csv", "regression", (), ("pearson", "spearman"), "pearson")
    found = teach(folder, tmp_path / "out", TaskData(task, rows, rows))
    assert found.keys() == {"pearson", "spearman"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.problem_type, model.num_labels) == ("regression", 1)


def test_wrong_input_gets_a_sentence_before_training(tmp_path, pretrained, tokenizer):
    data, output = sentiment(), tmp_path / "out"
    with pytest.raises(UserError, match="lr must be more than 0, got 0"):
        finetune(pretrained, data, output, lr=0)
    with pytest.raises(UserError, match=r"max_length is 17, but the model takes at most 16"):
        finetune(pretrained, data, output, max_length=17)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty holds no config\.json"):
        finetune(empty, data, output)
    other = tmp_path / "gpt2"
    GPT2Model(GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="gpt2 cannot become a MoE"):
        finetune(other, data, output)
    assert not output.exists()
    output.mkdir()
    with pytest.raises(UserError, match="exists already"):
        finetune(pretrained, data, output)


@pytest.mark.parametrize("num_rows", [1, 7, 32, 1003])
def test_the_sampler_gives_every_row_once_and_little_padding(num_rows):
    lengths = torch.randint(1, 100, (num_rows,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, batch_size=8, seed=1)
    first = list(sampler)
    assert len(sampler) == num_rows
    assert sorted(first) == list(range(num_rows))
    assert list(sampler) == first
    sampler.set_epoch(1)
    if num_rows > 7:
        assert list(sampler) != first
        assert list(LengthGroupedSampler(lengths, batch_size=8, seed=2)) != first
    batches = [[lengths[i] for i in first[start : start + 8]] for start in range(0, num_rows, 8)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    if num_rows == 1003:
        assert padded < 1.1 * sum(lengths)


def test_padded_batches_hold_every_row_once(tokenizer):
    rows = Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 3], [2, 5, 6, 7, 3]], "labels": [0, 1, 2]})
    rows = rows.add_column("attention_mask", [[1] * 3, [1] * 2, [1] * 5])
    first, second = padded_batches(rows, tokenizer, 2)
    assert first["input_ids"].tolist() == [[2, 3, 0], [2, 5, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert first["labels"].tolist() == [1, 0]
    assert second["labels"].tolist() == [2]
    (only,) = padded_batches(rows, tokenizer, 2, num_samples=2)
    assert only["labels"].tolist() == [0, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_tokens_are_padded_beside_their_tokens(tokenizer, side):
    tokenizer.padding_side = side
    rows = [{"input_ids": [2, 5, 3], "labels": [-100, 1, -100]}, {"input_ids": [2], "labels": [-100]}]
    batch = RowCollator(tokenizer)(rows)
    padded = {"left": ([0, 0, 2], [0, 0, 1]), "right": ([2, 0, 0], [1, 0, 0])}[side]
    assert (batch["input_ids"][1].tolist(), batch["attention_mask"][1].tolist()) == padded
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100] * 3]
    assert rows[0]["labels"] == [-100, 1, -100]
