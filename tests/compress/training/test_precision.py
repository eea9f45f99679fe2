"""Training in bfloat16 on request."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertForSequenceClassification, TrainerCallback

from moebert_kernels.compress.data.tasks import Task, TaskData
from moebert_kernels.compress.training import precision
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.compress.training.finetuning import finetune
from moebert_kernels.errors import UserError
from tests import tiny
from tests.tiny import build


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path, "abcdefgh", model_max_length=16)


class Watch(TrainerCallback):
    """Takes note of the dtypes in which a model's linear layers answer while it is trained."""

    def __init__(self):
        self.dtypes = set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *call: self.dtypes.add(call[2].dtype))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights = {parameter.dtype for parameter in model.parameters()}
        control.should_training_stop = True


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_distillation_computes_as_asked_and_keeps_float32_weights(tmp_path, tokenizer, bf16, dtype):
    rows = Dataset.from_dict(
        {"input_ids": [[2, 5, 6, 3]] * 8, "attention_mask": [[1] * 4] * 8, "labels": [0, 1] * 4}
    )
    watch = Watch()
    student, teacher = build(BertForSequenceClassification, 1), build(BertForSequenceClassification, 0)
    settings = DistillSettings(epochs=1, batch_size=4, bf16=bf16)
    distill(student, teacher, rows, tokenizer, settings, tmp_path / "run", callbacks=[watch])
    assert watch.dtypes == {dtype}
    assert watch.weights == {torch.float32}
    watch.dtypes.clear()
    student(torch.tensor([[2, 5, 6, 3]]))
    assert watch.dtypes == {torch.float32}  # stops it from being evaluated, and timed, as it was trained


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_finetuning_computes_as_asked_and_keeps_float32_weights(tmp_path, tokenizer, bf16, dtype):
    build(BertForSequenceClassification).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = Dataset.from_dict({"text": ["a b", "c d"] * 4, "label": [0, 1] * 4})
    task = Task("csv", "classification", ("no", "yes"), ("accuracy",), "accuracy")
    watch = Watch()
    finetune(
        tmp_path / "model",
        TaskData(task, rows, rows),
        tmp_path / "teacher",
        epochs=1,
        batch_size=4,
        max_length=8,
        bf16=bf16,
        training_arguments={"disable_tqdm": True},
        callbacks=[watch],
    )
    assert dtype in watch.dtypes  # evaluation afterwards is in float32
    assert (torch.bfloat16 in watch.dtypes) == bf16
    assert watch.weights == {torch.float32}


def test_a_gpu_without_bfloat16_is_said_before_any_work(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    monkeypatch.setattr(precision, "is_torch_bf16_gpu_available", lambda: False)
    precision.check_bf16(False)
    with pytest.raises(UserError, match="bf16 does not run on Old GPU"):
        precision.check_bf16(True)
