"""DistillationTrainer: a Trainer in every respect, with a teacher that stays out of the student."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    TrainerCallback,
)

from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.compress.training.finetuning import last_checkpoint
from moebert_kernels.compress.training.trainer import DistillationTrainer
from moebert_kernels.errors import UserError
from moebert_kernels.models import to_moe
from python_ref import distillation as ref
from tests.compress.toys import Progress, StopAt, arguments, make_rows, make_trainer, toy_bert
from tests.former_names import under_former_names
from tests.tiny import assert_same

QUARTERS = torch.arange(64).view(4, 16).expand(2, 4, 16)


def logs_of_training(trainer):
    """What it logs at each step; it is trained here."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def expected_terms(student, teacher, batch, kind="classification"):
    """The three terms as python_ref has them, both models without dropout."""
    labels = batch.pop("labels")
    ours = student(**batch, output_hidden_states=True)
    theirs = teacher(**batch, output_hidden_states=True)
    mask = batch["attention_mask"]
    if kind == "regression":
        ce = torch.nn.functional.mse_loss(ours.logits[:, 0], labels)
    else:
        ce = torch.nn.functional.cross_entropy(ours.logits.flatten(0, -2), labels.flatten())
    return {
        "ce": ce,
        "layer": ref.layer_loss(ours.hidden_states, theirs.hidden_states, mask),
        "prediction": ref.prediction_loss(kind, ours.logits, theirs.logits, mask),
    }


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_terms_are_those_of_the_reference_and_logged_each_by_itself(tmp_path, tokenizer, kind):
    labels = 1 if kind == "regression" else 2
    student, teacher = toy_bert(1, num_labels=labels), toy_bert(0, num_labels=labels)
    rows = make_rows(8, regression=kind == "regression")
    batch = tokenizer.pad(rows.remove_columns("unused").to_list(), return_tensors="pt")
    with torch.no_grad():
        expected = expected_terms(student, teacher, dict(batch), kind)
    trainer = make_trainer(tmp_path, tokenizer, student, teacher, rows, distill_weight=3.0)
    (log,) = logs_of_training(trainer)
    expected["loss"] = expected["ce"] + 3 * (expected["layer"] + expected["prediction"])
    for name, value in expected.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-4), name
    assert "balance" not in log


def test_a_student_of_fewer_layers_learns_from_those_it_is_mapped_to(tmp_path, tokenizer):
    teacher, rows = toy_bert(0, num_hidden_layers=4), make_rows(8)
    student = toy_bert(1)
    batch = tokenizer.pad(rows.remove_columns("unused").to_list(), return_tensors="pt")
    batch.pop("labels")
    with torch.no_grad():
        ours, theirs = (
            model.eval()(**batch, output_hidden_states=True).hidden_states for model in (student, teacher)
        )
    (log,) = logs_of_training(make_trainer(tmp_path, tokenizer, student, teacher, rows, layer_map=[1, 3]))
    expected = ref.layer_loss(ours, [theirs[0], theirs[2], theirs[4]], batch["attention_mask"])
    assert log["layer"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("layer_map", [[1], [0, 4], [-1, 2], None])
def test_a_map_that_does_not_fit_is_refused(tmp_path, tokenizer, layer_map):
    message = "one of the teacher's layers, 0 to 3, for each of the model's 2"
    if layer_map is None:
        message = "same num_hidden_layers, got 2 and 4"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, teacher=toy_bert(0, num_hidden_layers=4), layer_map=layer_map)


def test_logged_terms_are_means_over_the_steps_since_the_last_log(tmp_path, tokenizer):
    every = logs_of_training(make_trainer(tmp_path, tokenizer))
    (third,) = logs_of_training(make_trainer(tmp_path, tokenizer, logging_steps=3))
    for name in ("loss", "ce", "layer", "prediction"):
        assert third[name] == pytest.approx(sum(entry[name] for entry in every) / 3, rel=1e-4)


@pytest.mark.parametrize("head", ["sequence", "tokens"])
def test_accumulated_batches_step_as_one_large_batch(tmp_path, tokenizer, head):
    """Means of means weigh a short sequence's tokens more: rows here differ in length and in labels."""
    rows, options = make_rows(16), {}
    if head == "tokens":
        options = {"head": BertForTokenClassification, "num_labels": 3}
        rows = rows.map(lambda row: {"labels": [-100 if i % 3 == 0 else i % 3 for i in row["input_ids"]]})
    results = []
    for size, accumulation in ((16, 1), (4, 4)):
        how = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
        }
        models = toy_bert(1, **options), toy_bert(0, **options)
        trainer = make_trainer(tmp_path, tokenizer, *models, rows, **how)
        if head == "tokens":
            trainer.data_collator = DataCollatorForTokenClassification(tokenizer)
        results.append((logs_of_training(trainer), trainer.model.state_dict()))
    ((large_log,), large), ((small_log,), small) = results
    torch.testing.assert_close(small, large)
    for name in ("loss", "ce", "layer", "prediction", "grad_norm"):
        assert small_log[name] == pytest.approx(large_log[name], rel=1e-4), name


def test_of_tokens_without_a_label_no_prediction_is_distilled(tmp_path, tokenizer):
    """Nobody trained the teacher on what it says of the second half of a word; nobody asks the student."""
    student, teacher = (toy_bert(seed, BertForTokenClassification, num_labels=3) for seed in (1, 0))
    rows = make_rows(8).map(lambda row: {"labels": [-100, *[1] * (len(row["input_ids"]) - 2), -100]})
    rows = rows.remove_columns("unused")
    trainer = make_trainer(tmp_path, tokenizer, student, teacher, rows)
    trainer.data_collator = DataCollatorForTokenClassification(tokenizer)
    batch = trainer.data_collator(rows.to_list())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (student, teacher)]
    labelled = (batch["labels"] != -100).long()
    assert labelled.sum() < batch["attention_mask"].sum()
    (log,) = logs_of_training(trainer)
    expected = ref.prediction_loss("token_classification", *logits, labelled)
    assert log["prediction"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_teacher_is_frozen_in_eval_mode_and_in_no_checkpoint(tmp_path, tokenizer):
    """The authors' teacher was a submodule: its dropout was distilled, its weights saved with the student."""
    teacher, student = toy_bert(0, dropout=0.5), toy_bert(1)
    before = copy.deepcopy(teacher.state_dict())
    names = set(student.state_dict())
    trainer = make_trainer(tmp_path, tokenizer, student, teacher, save_strategy="epoch")
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert_same(teacher.state_dict(), before)
    assert set(student.state_dict()) == names
    checkpoint = last_checkpoint(tmp_path / "run")
    with safe_open(f"{checkpoint}/model.safetensors", "pt") as saved:
        assert set(saved.keys()) == names


def test_a_student_equal_to_its_teacher_has_nothing_to_distil(tmp_path, tokenizer):
    """Embedding output included: with the teacher's dropout on, L_trm was never zero."""
    student, teacher = toy_bert(0), toy_bert(0, dropout=0.5)
    (log,) = logs_of_training(make_trainer(tmp_path, tokenizer, student, teacher, make_rows(8)))
    assert log["layer"] < 1e-10
    assert log["prediction"] < 1e-10
    assert log["loss"] == pytest.approx(log["ce"])


def test_question_answering_distils_start_and_end(tmp_path, tokenizer):
    student, teacher = (toy_bert(seed, BertForQuestionAnswering) for seed in (1, 0))
    rows = make_rows(8).remove_columns("labels")
    rows = rows.add_column("start_positions", [1] * 8).add_column("end_positions", [2] * 8)
    trainer = make_trainer(tmp_path, tokenizer, student, teacher, rows)
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = student(**batch), teacher(**batch)
    expected = ref.prediction_loss(
        "question_answering",
        (ours.start_logits, ours.end_logits),
        (theirs.start_logits, theirs.end_logits),
        batch["attention_mask"],
    )
    (log,) = logs_of_training(trainer)
    assert log["prediction"] == pytest.approx(expected.item(), rel=1e-3)
    assert log["ce"] == pytest.approx(math.log(10), abs=0.6)  # about 10 positions, untrained


def test_evaluation_asks_the_student_alone(tmp_path, tokenizer):
    student, teacher = toy_bert(1), toy_bert(0)
    seen = []
    teacher.register_forward_hook(lambda *args: seen.append(args))
    trainer = DistillationTrainer(
        student,
        teacher,
        args=arguments(tmp_path),
        eval_dataset=make_rows(10, seed=3),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_shape"] == [10, 2]  # logits alone: hidden states would have come along
    assert metrics["eval_loss"] == pytest.approx(0.69, abs=0.3)
    assert not seen


def test_mixed_precision_runs_both_models_low_and_the_losses_high(tmp_path, tokenizer):
    student, teacher = toy_bert(1), toy_bert(0)
    dtypes = {}
    for name, model in (("teacher", teacher), ("student", student)):
        model.bert.encoder.layer[0].intermediate.register_forward_hook(
            lambda _module, _args, output, name=name: dtypes.update({name: output.dtype})
        )
    lows = logs_of_training(make_trainer(tmp_path, tokenizer, student, teacher, bf16=True))
    assert dtypes == {"teacher": torch.bfloat16, "student": torch.bfloat16}
    highs = logs_of_training(make_trainer(tmp_path, tokenizer))
    assert [log["loss"] for log in lows] == pytest.approx([log["loss"] for log in highs], rel=0.05)


@pytest.mark.parametrize("routing", ["hash-random", "gate-sentence"])
def test_real_tokens_alone_train_what_the_padded_form_does(tmp_path, tokenizer, routing):
    """Student and teacher on the same rows, whose hidden states are compared without a mask."""
    trained, shapes = {}, {True: set(), False: set()}
    for pack in (True, False):
        teacher = toy_bert(0)
        student = to_moe(toy_bert(1), QUARTERS, num_shared_neurons=0, routing=routing)
        for model in (student, teacher):
            model.bert.encoder.layer[1].register_forward_pre_hook(
                lambda _, args, pack=pack: shapes[pack].add(args[0].shape[0])
            )
        how = {"pack": pack, "optim": "sgd", "learning_rate": 0.05}
        logs = logs_of_training(make_trainer(tmp_path, tokenizer, student, teacher, **how))
        assert teacher.config._attn_implementation == "sdpa"  # as it was
        trained[pack] = student.state_dict(), [log["loss"] for log in logs]
    assert shapes == {True: {1}, False: {8}}
    (packed, losses), (padded, expected_losses) = trained[True], trained[False]
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path, tokenizer):
    """Weights and loss curves, dropout on, stopped in the second epoch between two checkpoints."""
    rows, settings = make_rows(128), DistillSettings(epochs=3, batch_size=8, learning_rate=1e-3, seed=5)

    def run(folder, **options):
        student = toy_bert(1, dropout=0.1)
        log = distill(student, toy_bert(0), rows, tokenizer, settings, folder, **options)
        return student.state_dict(), log.losses

    undisturbed, log = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", callbacks=[StopAt(23)])
    assert Path(last_checkpoint(tmp_path / "cut")).name == "checkpoint-20"
    calls = Progress()
    resumed, resumed_log = run(tmp_path / "cut", progress=calls)
    assert calls[0] == (20, 48)
    assert calls[-1] == (48, 48)
    assert_same(resumed, undisturbed)
    assert resumed_log == log
    assert [entry["step"] for entry in log] == list(range(1, 49))
    for entry in log:
        assert entry["total"] == pytest.approx(entry["ce"] + entry["layer"] + entry["prediction"], rel=1e-4)


def test_a_run_resumes_from_a_checkpoint_with_former_names(tmp_path, tokenizer):
    """Of a run begun before the experts' parameters had today's names; the optimizer goes by their order."""
    rows, settings = make_rows(64), DistillSettings(epochs=5, batch_size=8, learning_rate=1e-3, seed=5)

    def run(folder, callbacks=()):
        student = to_moe(toy_bert(1, dropout=0.1), QUARTERS, num_shared_neurons=0)
        distill(student, toy_bert(0), rows, tokenizer, settings, folder, callbacks=callbacks)
        return student.state_dict()

    undisturbed = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", [StopAt(33)])
    weights = Path(last_checkpoint(tmp_path / "cut")) / "model.safetensors"
    former = under_former_names(load_file(weights))
    assert not former.keys() <= undisturbed.keys()
    save_file(former, weights)
    assert_same(run(tmp_path / "cut"), undisturbed)


def test_a_fitted_student_is_trained_by_its_teacher_alone_unless_asked_otherwise():
    """Stops training that undoes the fit: noise and labels lead away from the teacher."""

    def how(is_fitted, **given):
        return CompressSettings(**given).training(seed=3, is_fitted=is_fitted, hidden_size=768)

    fitted, cut = how(True), how(False)
    assert (fitted.labels, fitted.dropout) == (False, False)
    assert (cut.labels, cut.dropout, cut.learning_rate) == (True, True, 3e-5)
    assert fitted.learning_rate < cut.learning_rate
    asked = how(True, labels=True, dropout=True, learning_rate=1e-3, warmup=0.1)
    assert (asked.labels, asked.dropout, asked.learning_rate, asked.warmup) == (True, True, 1e-3, 0.1)


def test_labels_that_are_not_wanted_are_not_read(tmp_path, tokenizer):
    """Whatever they are, the same student comes out, and nothing of them is logged."""
    settings = DistillSettings(epochs=1, batch_size=8, learning_rate=1e-3, labels=False)
    states = []
    for changed in (False, True):
        rows, student = make_rows(16), toy_bert(1)
        if changed:
            rows = rows.map(lambda row: {"labels": 1 - row["labels"]})
        found = distill(student, toy_bert(0), rows, tokenizer, settings, tmp_path / str(changed))
        assert "ce" not in found.losses[0]
        states.append(student.state_dict())
    assert_same(*states)


def test_the_learning_rate_rises_as_long_as_is_said(tmp_path, tokenizer):
    rates = []

    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    settings = DistillSettings(epochs=2, batch_size=8, learning_rate=1e-3, warmup=0.25)
    models, rows = (toy_bert(1), toy_bert(0)), make_rows(64)
    distill(*models, rows, tokenizer, settings, tmp_path / "run", callbacks=[Rates()])
    assert rates[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_divergence_is_said_in_words(tmp_path, tokenizer):
    settings = DistillSettings(epochs=1, batch_size=8, learning_rate=1e30)
    with pytest.raises(UserError, match=r"diverged: the loss is .*lower learning rate"):
        distill(toy_bert(1), toy_bert(0), make_rows(64), tokenizer, settings, tmp_path / "run")


def test_models_that_do_not_fit_are_refused(tmp_path, tokenizer):
    teacher = toy_bert(0)
    for student, message in (
        (teacher, "share parameters"),
        (toy_bert(1, num_labels=5), "num_labels, got 5 and 2"),
        (toy_bert(1, problem_type="multi_label_classification"), "problem_type, got 'multi"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, tokenizer, student, teacher)
    with pytest.raises(ValueError, match="distill_weight"):
        make_trainer(tmp_path, tokenizer, distill_weight=-1.0)
    with pytest.raises(ValueError, match="compute_loss_func"):
        DistillationTrainer(toy_bert(1), teacher, args=arguments(tmp_path), compute_loss_func=print)
