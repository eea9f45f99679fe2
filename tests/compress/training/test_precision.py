"""Training in bfloat16 on request."""

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from moebert_kernels.compress.training import precision
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.compress.training.finetuning import finetune
from moebert_kernels.errors import UserError
from tests.compress.toys import make_data, make_rows, make_teacher, toy_bert

in_both = pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])


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


@in_both
def test_distillation_computes_as_asked_and_keeps_float32_weights(tmp_path, tokenizer, bf16, dtype):
    watch, student = Watch(), toy_bert(1)
    settings = DistillSettings(epochs=1, batch_size=4, bf16=bf16)
    distill(student, toy_bert(0), make_rows(8), tokenizer, settings, tmp_path / "run", callbacks=[watch])
    assert watch.dtypes == {dtype}
    assert watch.weights == {torch.float32}
    watch.dtypes.clear()
    student(torch.tensor([[2, 5, 6, 3]]))
    assert watch.dtypes == {torch.float32}  # stops it from being evaluated, and timed, as it was trained


@in_both
def test_finetuning_computes_as_asked_and_keeps_float32_weights(tmp_path, bf16, dtype):
    watch, model = Watch(), make_teacher(tmp_path / "model")
    settings = {"epochs": 1, "batch_size": 4, "bf16": bf16, "training_arguments": {"disable_tqdm": True}}
    finetune(model, make_data(8), tmp_path / "teacher", **settings, callbacks=[watch])
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
