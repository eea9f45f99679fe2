"""Export models for the checks of `make serving`, each beside what PyTorch makes of the same texts.

    python tests/serving/make_folders.py FOLDER

FOLDER/NAME is an exported folder, FOLDER/NAME.npz its model's answers: "answers" of the texts in a batch, one
row each, and "int8", the rms error to expect at most of the int8 graph, relative.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from transformers import BertForSequenceClassification  # noqa: E402

import moebert_kernels  # noqa: E402
from moebert_kernels.compress.experts.adaptation import adapt, random_scores  # noqa: E402
from moebert_kernels.compress.minilm import find_base_model  # noqa: E402
from moebert_kernels.compress.storage.sentence_encoder import load_sentence_encoder  # noqa: E402
from moebert_kernels.models import find_ffns, to_moe  # noqa: E402
from tests.tiny import LAYERS, WORDS, build, quarters, tokenizer  # noqa: E402

TEXTS = [
    "Send a request and return its response.",
    "a",
    "Draw a circle of the given radius, and fill it with the colour that was chosen last.",
    "No padding is computed: sentences of unequal lengths are rows of real tokens, one after the other.",
    "Return the sum.",
]
INT8_ERROR = {"tiny": 0.05, "real": 0.12}


def tiny_classifier(folder: Path):
    """A model with experts and the tokenizer of its hundred words."""
    model = to_moe(
        build(BertForSequenceClassification), quarters(LAYERS), num_shared_neurons=0, routing="hash-random"
    )
    words = sorted({word.strip(".,:").lower() for text in TEXTS for word in text.split()} | set(".,:"))
    words += [f"[unused{i}]" for i in range(len(WORDS) - len(words))]
    folder.mkdir(parents=True, exist_ok=True)
    return model, tokenizer(folder, words, model_max_length=40)


def with_experts(model):
    """Four experts cut by chance."""
    ffns = find_ffns(model)
    return adapt(model, random_scores(len(ffns), ffns[0].w1.out_features), num_experts=4).eval()


@torch.no_grad()
def main(folder: Path) -> None:
    """Write every folder."""
    torch.manual_seed(0)
    encoder = load_sentence_encoder(find_base_model())
    student = replace(encoder, model=with_experts(encoder.model))
    classifier = AutoModelForSequenceClassification.from_pretrained(find_base_model(), num_labels=3)
    classifier.classifier.weight.normal_(std=1.0)
    real_tokenizer = AutoTokenizer.from_pretrained(find_base_model())
    tiny, tiny_tokenizer = tiny_classifier(folder / "words")
    classifiers = {
        "tiny-classifier": (tiny, tiny_tokenizer),
        "real-classifier": (with_experts(classifier.eval()), real_tokenizer),
    }
    for name, (model, its_tokenizer) in classifiers.items():
        moebert_kernels.export(model, folder / name, tokenizer=its_tokenizer, quantize="int8")
        batch = its_tokenizer(TEXTS, padding=True, return_tensors="pt")
        _keep(folder, name, model(**batch).logits)
    moebert_kernels.export(student, folder / "real-embedder", quantize="int8")
    _keep(folder, "real-embedder", student.encode(TEXTS))
    (folder / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")


def _keep(folder: Path, name: str, answers: torch.Tensor) -> None:
    limit = INT8_ERROR[name.partition("-")[0]]
    np.savez(folder / f"{name}.npz", answers=answers.numpy(), int8=limit)
    print(f"exported {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
