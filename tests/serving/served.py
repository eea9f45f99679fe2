"""What the checks of `make serving` share: exported folders, texts, PyTorch's answers; needs numpy alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FP32_ERROR = 1e-4  # the largest difference, relative to the largest answer
GRAPHS = {"fp32": "model.onnx", "int8": "model_quantized.onnx"}


@dataclass(frozen=True, eq=False)
class Served:
    """An exported folder.

    Attributes:
        name: its.
        folder: its path.
        texts: a batch.
        answers: PyTorch's in float32, a row for each text.
        int8_error: rms of what int8 may change, relative.
    """

    name: str
    folder: Path
    texts: list[str]
    answers: np.ndarray
    int8_error: float

    @property
    def is_embedder(self) -> bool:
        return self.name.endswith("embedder")


def folders(kind: str = "") -> Iterator[Served]:
    """The folders that the command line's one argument holds, of names that end so."""
    room = Path(sys.argv[1])
    texts = json.loads((room / "texts.json").read_text(encoding="utf-8"))
    for path in sorted(room.glob(f"*{kind}.npz")):
        with np.load(path) as kept:
            yield Served(path.stem, room / path.stem, texts, kept["answers"], float(kept["int8"]))


def check(served: Served, what: str, precision: str, answer: Callable[[], np.ndarray]) -> None:
    """Compare answers with PyTorch's; end the process where they differ or our package was imported."""
    found = np.asarray(answer())
    assert found.shape == served.answers.shape, (found.shape, served.answers.shape)
    difference = found - served.answers
    if precision == "fp32":
        error, limit = np.abs(difference).max() / np.abs(served.answers).max(), FP32_ERROR
    else:
        error = np.sqrt((difference**2).mean() / (served.answers**2).mean())
        limit = served.int8_error
    ours = [name for name in sys.modules if name.partition(".")[0] == "moebert_kernels"]
    right = error <= limit and not ours
    verdict = "ok   " if right else "WRONG"
    print(f"{verdict} {served.name}, {what}, {precision}: off by {error:.1e}, at most {limit:.1e}")
    if not right:
        sys.exit(f"{what} imports {ours[0]}" if ours else 1)


def batch(served: Served) -> dict[str, np.ndarray]:
    """The texts as token ids, padded, by the tokenizer.json that transformers.js and TEI read."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(served.folder / "tokenizer.json"))
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(served.texts)
    return {
        "input_ids": np.array([row.ids for row in rows], dtype=np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64),
        "token_type_ids": np.array([row.type_ids for row in rows], dtype=np.int64),
    }
