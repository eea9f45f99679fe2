"""What the tests of the export share: tiny models, batches of unequal lengths, and graphs in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers import BertTokenizerFast

from moebert_kernels.export.graph import write_graph
from moebert_kernels.export.heads import ExportedModel
from moebert_kernels.models import to_moe
from tests import tiny
from tests.tiny import PADDING, VOCAB, build_family, quarters


def student(name: str, head: str | None, routing: str = "hash-random", top_k: int = 1, **changes):
    """A tiny MoE; dense if `routing` is "dense"."""
    dense = build_family(name, head, **changes)
    if routing == "dense":
        return dense
    index_LEF = quarters(changes.get("num_hidden_layers", 3))
    return to_moe(dense, index_LEF, num_shared_neurons=0, routing=routing, top_k=top_k)


def batch(lengths: list[int], longest: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, each row padded to the longest, or to more."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max([longest or 1, *lengths]))
    input_ids = torch.randint(2, VOCAB, shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return {"input_ids": input_ids.where(mask, PADDING), "attention_mask": mask.long()}


def outputs_of(model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Those of the model itself that a graph has, in its order."""
    with torch.no_grad():
        found = model(**inputs)
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return [found[name] for name in names if name in found]


def worst_difference(outputs, expected, mask_BS: Tensor) -> float:
    """Between numbers of real tokens, or of rows that have one."""
    real, differences = mask_BS.bool(), [0.0]
    for ours, theirs in zip(outputs, expected, strict=True):
        ours = torch.as_tensor(ours)
        assert ours.shape == theirs.shape
        assert ours.isfinite().all()
        where = real if ours.shape[:2] == real.shape and ours.dim() == max(2, theirs.dim()) else None
        is_of_rows = theirs.dim() == 2 and theirs.shape[1] != real.shape[1]
        kept = real.any(1) if is_of_rows or where is None else where
        if kept.any():
            differences.append(float((ours[kept] - theirs[kept]).abs().max()))
    return max(differences)


class Graph:
    """A model's graph in ONNX Runtime."""

    def __init__(self, model, path: Path, **options):
        self.path, self.model = path, model
        write_graph(ExportedModel(model, **options).eval(), path)
        self.session = session(path)

    def __call__(self, inputs: dict[str, Tensor]) -> list[np.ndarray]:
        return self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def tokenizer(folder: Path) -> BertTokenizerFast:
    """Whole words w0, w1, ...; its padding token has the id of `tiny.build_family`."""
    special_tokens = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    return tiny.tokenizer(folder, special_tokens=special_tokens, model_max_length=38)
