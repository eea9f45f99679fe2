"""What `test_processes` runs by `torchrun --nproc-per-node 2 several_processes.py JOBS FOLDER OUTPUT`.

The same functions, called by the test, do the same work in one process.
"""

import functools
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForTokenClassification,
    TrainerCallback,
)

from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.tasks import tokenize
from moebert_kernels.compress.evaluation.quality import batches, predict
from moebert_kernels.compress.experts.adaptation import adapt, random_scores
from moebert_kernels.compress.runs import run
from moebert_kernels.compress.runs.pipeline import compress
from moebert_kernels.compress.scoring.importance import compute_importance
from moebert_kernels.compress.training.distillation import DistillSettings, distill
from moebert_kernels.compress.training.finetuning import finetune
from tests.compress.toys import SETTINGS as BOTH
from tests.compress.toys import make_data, make_teacher

# Nothing is drawn, and layers do so much that losses are far above their rounding.
TEACHER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
SETTINGS = replace(BOTH, comparisons=())
HOW = DistillSettings(epochs=3, learning_rate=1e-3, batch_size=8)


def prepare(folder: Path) -> Path:
    """Make the teachers; once, before any job."""
    make_teacher(folder / "teacher", **TEACHER)
    make_teacher(folder / "tagger", head=BertForTokenClassification, **TEACHER)
    return folder


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def score(folder: Path, out: Path) -> None:
    """Importance on 7 batches, the last of them short; every process writes what it has got."""
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    rows = tokenize(make_data(n=27), tokenizer, 16).train
    counted = []
    importance = compute_importance(
        teacher, batches(rows, tokenizer, batch_size=4), group_V=torch.arange(45), progress=counted.append
    )
    importance.save(out / f"importance-{distributed.rank()}.safetensors")
    write(out / f"counted-{distributed.rank()}.json", [counted[-1], importance.num_samples])


def tagged_rows(n: int) -> Dataset:
    """Rows of words of which some have no label, unlike many in each."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 45, (4 + i % 7,), generator=generator).tolist() for i in range(n)]
    labels = [[token % 2 if (token + place) % 3 else -100 for place, token in enumerate(row)] for row in ids]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    )


def train(folder: Path, out: Path) -> None:
    """Distil with last batches of 3 rows and of 1, and of tokens; fine-tune."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    for name, n in (("three", 27), ("one", 25), ("tokens", 27)):
        auto = BertForTokenClassification if name == "tokens" else AutoModelForSequenceClassification
        teacher = auto.from_pretrained(folder / ("tagger" if name == "tokens" else "teacher"))
        routing = "gate-token" if name == "three" else "hash-random"
        student = adapt(teacher, random_scores(2, 64, seed=1), routing=routing)
        # The balance loss is of each process's own tokens, as with gradient accumulation; all else is a sum.
        student.config.balance_loss_weight = 0.0
        data = tokenize(make_data(n=n), tokenizer, 16)
        rows = tagged_rows(n) if name == "tokens" else data.train
        found = distill(student, teacher, rows, tokenizer, HOW, out / f"checkpoints-{name}")
        if distributed.is_main():
            write(out / f"log-{name}.json", found.losses)
            write(out / f"load-{name}.json", found.load_NLE)
            if name != "tokens":
                save_logits(student, data, tokenizer, out / f"logits-{name}.safetensors")
    data = make_data(n=25)
    metrics = finetune(folder / "teacher", data, out / "tuned", epochs=3, lr=1e-3, batch_size=8)
    write(out / f"metrics-{distributed.rank()}.json", metrics)
    if distributed.is_main():
        tuned = AutoModelForSequenceClassification.from_pretrained(out / "tuned")
        save_logits(tuned, tokenize(data, tokenizer, 16), tokenizer, out / "logits-tuned.safetensors")


def save_logits(model, data, tokenizer, path: Path) -> None:
    """What a model says of the validation rows."""
    logits = [torch.from_numpy(row) for row in predict(model, data.validation, tokenizer)]
    save_file({"logits": torch.stack(logits)}, path)


def whole(folder: Path, out: Path) -> None:
    """All of `compress`."""
    calls = []
    results = compress(
        SETTINGS, make_data(), folder / "teacher", out / "whole", progress=lambda *call: calls.append(call)
    )
    write(out / f"calls-{distributed.rank()}.json", calls)
    write(out / f"results-{distributed.rank()}.json", results)


class FailAt(TrainerCallback):
    """Fails when a step is done."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        """Fail."""
        if state.global_step == self.step:
            raise RuntimeError("pulled the plug")


def broken(folder: Path, out: Path) -> None:
    """`compress`, until a process that is not the main one fails in the midst of distillation."""
    with distributed.one_voice():
        if not distributed.is_main():
            run.distill = functools.partial(distill, callbacks=[FailAt(9)])
        compress(SETTINGS, make_data(), folder / "teacher", out / "broken")


JOBS = {job.__name__: job for job in (score, train, whole, broken)}

if __name__ == "__main__":
    gc.freeze()  # what is imported: every training collects garbage
    for name in sys.argv[1].split(","):
        JOBS[name](Path(sys.argv[2]), Path(sys.argv[3]))
