"""Who is timed: the teacher, a narrow dense model and ours, as folders that a runtime's process can load.

MiniLM is the real one, which embeds sentences; BERT-base has random weights and a head for two classes. The
narrow model has one FFN of an expert's size. Experts are cut by chance and tokens go to them by a random
table: no weight changes how long a matrix product takes. int8 is throughout, for the same reason.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import moebert_kernels
from moebert_kernels.compress.experts.adaptation import adapt, random_scores
from moebert_kernels.compress.minilm import find_base_model
from moebert_kernels.compress.storage.sentence_encoder import (
    SentenceEncoder,
    load_sentence_encoder,
    save_sentence_encoder,
)
from moebert_kernels.export.exporting import export
from moebert_kernels.export.folder import GRAPH, QUANTIZED
from moebert_kernels.export.quantize import quantize_products
from moebert_kernels.models import find_ffns, narrow_ffns

from ..cases import SHAPES
from ..encoders import spread_weights
from .padded import PaddedModel, write_padded

MODELS = ("teacher", "narrow", "ours")
TIED = "tied"  # who is timed too where that is asked for: shared neurons stored once
EXPERTS_OF = ("ours", TIED)  # whose graphs compute no padding in any form
PRECISIONS = ("fp32", "int8")
FORMS = ("padded", "unpadded")
EXPERTS = 4
TOY = {"D": 32, "F": 16, "E": 4, "L": 1, "head_size": 8}
_NOTE = "made_from.json"
NUM_LABELS = 2
_FILES = {"fp32": GRAPH, "int8": QUANTIZED}


@dataclass(frozen=True)
class Contender:
    """One model in one runtime.

    Attributes:
        model: of `MODELS`, or `TIED`.
        runtime: of `worker.RUNTIMES`.
        precision: of `PRECISIONS`.
        form: of `FORMS`: of the graph's hidden states; "padded" for a dense model in PyTorch.
        path: of the graph, or of the model's folder for PyTorch.
    """

    model: str
    runtime: str
    precision: str
    form: str
    path: Path

    @property
    def folder(self) -> Path:
        """Of the model, in all its forms."""
        return self.path.parent if self.runtime == "torch" else self.path.parents[2]

    @property
    def name(self) -> str:
        """In words, unique among the contenders of a shape."""
        return f"{self.model} {self.runtime} {self.precision} {self.form}"


class EagerModel(nn.Module):
    """A model in PyTorch as its users call it, with the last output that its graph has."""

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, model: Any, pool: Any = None):
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, **batch: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, C] or embeddings [B, D]."""
        found = self.model(**batch)
        if self.pool is None:
            return (found.logits,)
        return (self.pool(found.last_hidden_state, batch["attention_mask"]),)


def load_module(folder: str | Path) -> EagerModel:
    """A model that `make_models` saved."""
    if (Path(folder) / "modules.json").is_file():
        encoder = load_sentence_encoder(folder)
        return EagerModel(encoder.model.eval(), encoder.pool)
    return EagerModel(AutoModelForSequenceClassification.from_pretrained(folder).eval())


def make_models(shape: str) -> dict[str, Any]:
    """The models of a shape, by name: each a `SentenceEncoder` or a model with a head for sequences.

    Args:
        shape: "minilm", "bert-base" or "toy".
    """
    if shape == "minilm":
        encoder = load_sentence_encoder(find_base_model())
        return {name: replace(encoder, model=model) for name, model in _variants(encoder.model).items()}
    sizes = TOY if shape == "toy" else SHAPES[shape]
    config = BertConfig(
        hidden_size=sizes["D"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=sizes["D"] // sizes["head_size"],
        intermediate_size=sizes["E"] * sizes["F"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = BertForSequenceClassification(config).eval()
        spread_weights(teacher)
    return _variants(teacher)


def _variants(teacher: Any) -> dict[str, Any]:
    ffns = find_ffns(teacher)
    scores_LF = random_scores(len(ffns), ffns[0].w1.out_features)
    kept_LF = scores_LF.argsort(dim=1, descending=True)[:, : scores_LF.shape[1] // EXPERTS]
    ours, tied = (
        adapt(teacher, scores_LF, num_experts=EXPERTS, routing="hash-random", tie_shared=tie).eval()
        for tie in (False, True)
    )
    return {"teacher": teacher, "narrow": narrow_ffns(teacher, kept_LF).eval(), "ours": ours, TIED: tied}


def prepare(
    shape: str,
    room: Path,
    runtimes: tuple[str, ...],
    models: tuple[str, ...] = MODELS,
    say: Callable[[str], None] = print,
) -> list[Contender]:
    """Make every model and graph of a shape under `room`, unless the same code has left them there.

    Args:
        shape: as `make_models` takes it.
        room: folder; what is made for other shapes lies beside it.
        runtimes: of the contenders.
        models: of `MODELS` or `TIED`, to be among them.
        say: is told what is being made.
    """
    note = json.dumps({"shape": shape, "made by": _fingerprint()})
    folder = room / shape
    missing = [name for name in models if not _is_made(folder / name, note)]
    made = make_models(shape) if missing else {}
    for name in missing:
        say(f"{shape}: saving and exporting {name}")
        shutil.rmtree(folder / name, ignore_errors=True)
        _write(made[name], name, folder)
        (folder / name / _NOTE).write_text(note, encoding="utf-8")
    return contenders(folder, runtimes, models)


def _is_made(folder: Path, note: str) -> bool:
    path = folder / _NOTE
    return path.is_file() and path.read_text(encoding="utf-8") == note


def _write(model: Any, name: str, folder: Path) -> None:
    """The model itself, its graphs without padding, and of a dense one those with padding."""
    if isinstance(model, SentenceEncoder):
        save_sentence_encoder(model, folder / name / "torch")
    else:
        model.save_pretrained(folder / name / "torch")
    export(model, folder / name / "unpadded")
    quantize_all(folder / name / "unpadded")
    if name not in EXPERTS_OF:
        pool = model.pool if isinstance(model, SentenceEncoder) else None
        write_padded(
            PaddedModel(getattr(model, "model", model), pool), folder / name / "padded" / _FILES["fp32"]
        )
        quantize_all(folder / name / "padded")


def quantize_all(folder: Path) -> None:
    """Write the int8 graph beside that of a folder: every product of the encoder's, whatever that costs.

    `moebert export` would leave some in 32 bits, of one model these and of another those.
    """
    graph = folder / _FILES["fp32"]
    content: Any = onnx.load(graph, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in content.initializer}
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and min(shape) > NUM_LABELS}
    products = [node.name for node in content.node if node.op_type == "MatMul" and node.input[1] in matrices]
    quantize_products(graph, folder / _FILES["int8"], products)


def contenders(folder: Path, runtimes: tuple[str, ...], models: tuple[str, ...]) -> list[Contender]:
    """Those of a folder that `prepare` has filled; PyTorch's first."""
    found = []
    for model in models:
        form = "unpadded" if model in EXPERTS_OF else "padded"
        if "torch" in runtimes:
            found.append(Contender(model, "torch", "fp32", form, folder / model / "torch"))
    for runtime in (name for name in runtimes if name != "torch"):
        for precision in PRECISIONS:
            for model in models:
                for form in FORMS if model not in EXPERTS_OF else ("unpadded",):
                    path = folder / model / form / _FILES[precision]
                    found.append(Contender(model, runtime, precision, form, path))
    return found


def _fingerprint() -> str:
    """Of the code that makes models and graphs, and of the versions of what it calls."""
    package = Path(moebert_kernels.__file__).parent
    files = [
        *sorted((package / "export").glob("*.py")),
        Path(__file__),
        Path(__file__).with_name("padded.py"),
    ]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime"):
        digest.update(importlib.metadata.version(name).encode())
    return digest.hexdigest()
