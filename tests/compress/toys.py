"""A toy task of forty words, and what is needed to compress a model of it: teachers, rows, settings."""

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, TrainerCallback, TrainingArguments

from moebert_kernels.compress.data.files import read_json
from moebert_kernels.compress.data.tasks import Task, TaskData
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.training.trainer import DistillationTrainer
from tests import tiny

WORDS = [f"w{i}" for i in range(40)]
SIZES = {"vocab_size": 45, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
SETTINGS = CompressSettings(
    epochs=2, batch_size=8, max_length=16, measure_length=16, learning_rate=1e-3, comparisons=("random",)
)
UNMEASURED = {"measure": False, "measure_length": None}


def make_teacher(folder, head=BertForSequenceClassification, **options):
    folder.mkdir(parents=True)
    tokenizer = tiny.tokenizer(folder, WORDS, model_max_length=32)
    tiny.initialised(head, **SIZES, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def toy_bert(seed=0, head=BertForSequenceClassification, dropout=0.0, **options):
    """The teacher, or one like it; not saved."""
    no_more = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return tiny.initialised(head, seed, **{**SIZES, **no_more, **options})


def make_data(n=48, kind="classification", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(n):
        ids = [torch.randint(0, 40, (5 + i % 7,), generator=generator).tolist() for i in range(n)]
        labels = [sum(row) / 100 if kind == "regression" else sum(row) % 2 for row in ids]
        return Dataset.from_dict({"text": [" ".join(WORDS[i] for i in row) for row in ids], "label": labels})

    if kind == "regression":
        task = Task("toy", kind, (), ("pearson", "spearman"), "pearson")
    else:
        task = Task("toy", kind, ("even", "odd"), ("accuracy",), "accuracy")
    return TaskData(task, rows(n), rows(24))


def make_rows(n=24, regression=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (n,), generator=generator).tolist()
    ids = [torch.randint(5, 45, (length,), generator=generator).tolist() for length in lengths]
    labels = [sum(row) / 500 if regression else sum(row) % 2 for row in ids]
    masks = [[1] * length for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels, "unused": labels})


def arguments(tmp_path, **options):
    defaults = dict(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return TrainingArguments(**(defaults | options))


def make_trainer(
    folder,
    tokenizer,
    student=None,
    teacher=None,
    rows=None,
    distill_weight=1.0,
    layer_map=None,
    pack=True,
    **options,
):
    """`options` are TrainingArguments'."""
    return DistillationTrainer(
        student or toy_bert(1),
        teacher or toy_bert(0),
        args=arguments(folder, **options),
        distill_weight=distill_weight,
        layer_map=layer_map,
        pack=pack,
        train_dataset=rows or make_rows(),
        processing_class=tokenizer,
    )


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_outcome(output, other):
    for folder in ("student", "work/student/fitted", "work/student/distilled", "work/random/distilled"):
        tiny.assert_same(weights(output / folder), weights(other / folder))
    first, second = (read_json(folder / "results.json") for folder in (output, other))
    for key in ("fitting", "losses", "training_load_NLE"):
        assert first[key] == second[key]
    assert [m["quality"] for m in first["models"]] == [m["quality"] for m in second["models"]]


class Progress(list):
    """The calls that tell of progress; at a given one, (stage, done), the run is interrupted."""

    def __init__(self, interrupted_at=None):
        super().__init__()
        self.interrupted_at = interrupted_at

    def __call__(self, *call):
        self.append(call)
        if call[:2] == self.interrupted_at:
            raise KeyboardInterrupt

    @property
    def reused(self):
        """Names of the stages that were done before."""
        return [stage for stage, _, total in self if total == 0]

    @property
    def done(self):
        """Names of the stages that did some work."""
        return list(dict.fromkeys(stage for stage, _, total in self if total > 0))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
