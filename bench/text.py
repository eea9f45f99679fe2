"""A batch of real sentences, padded to its longest: what padding costs cannot be drawn at random."""

from __future__ import annotations

import csv
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moebert_kernels.compress.minilm import find_base_model
from moebert_kernels.errors import UserError

BATCH = 32
_MOST_SENTENCES = 1024
_LONGEST = 128
_MINILM_TOKENIZER, _NO_TOKENIZER = "MiniLM's tokenizer", "a token per word"
_COLUMN = "sentence"


@dataclass(frozen=True, eq=False)
class TextBatch:
    """Sentences as tokens.

    Attributes:
        ids_BS: int64, 0 where `mask_BS` is.
        mask_BS: int64, 1 for tokens, 0 for padding.
        tokenizer: what made the tokens.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    tokenizer: str


@functools.cache
def read_batch(path: str, vocabulary: int) -> TextBatch:
    """Tokenise a file's first sentences in batches of 32, and take the batch of median length.

    Args:
        path: a file with a sentence per line, or a .tsv as GLUE has it, with a column "sentence".
        vocabulary: V; MiniLM's tokenizer is taken where its package is installed and its ids are below V,
            otherwise every word is a token, its id a hash.

    Raises:
        ValueError: the file has no sentences.
    """
    rows, tokenizer = _rows(path, vocabulary, _MOST_SENTENCES)
    batches = [rows[begin : begin + BATCH] for begin in range(0, len(rows), BATCH)]
    full = [batch for batch in batches if len(batch) == BATCH] or batches
    chosen = sorted(full, key=lambda batch: max(map(len, batch)))[len(full) // 2]
    return TextBatch(*pad(chosen), tokenizer)


def encode_sentences(path: str, vocabulary: int) -> list[list[int]]:
    """The token ids of a file's first sentences, in their order; as for `read_batch`."""
    return _rows(path, vocabulary, _MOST_SENTENCES)[0]


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of token ids as ids and mask, int64 [B, S], 0 at padding."""
    ids_BS = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BS, (torch.arange(ids_BS.shape[1]) < lengths_B.unsqueeze(1)).long()


def _rows(path: str, vocabulary: int, most: int) -> tuple[list[list[int]], str]:
    sentences = read_sentences(path)[:most]
    if not sentences:
        raise ValueError(f"{path} has no sentences")
    encode, tokenizer = _encoder(vocabulary)
    return encode(sentences), tokenizer


def read_sentences(path: str | Path) -> list[str]:
    """The sentences of a file, a line each, or the column "sentence" of a .tsv.

    Raises:
        ValueError: there is no such file, or its table has no such column.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}") from None
    if Path(path).suffix != ".tsv":
        return [line.strip() for line in text.splitlines() if line.strip()]
    table = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = table.fieldnames or []
    if _COLUMN not in columns:
        raise ValueError(f"{path} has the columns {', '.join(columns)}, expected one named {_COLUMN!r}")
    return [row[_COLUMN].strip() for row in table if (row[_COLUMN] or "").strip()]


def _encoder(vocabulary: int) -> tuple[Callable[[list[str]], list[list[int]]], str]:
    try:
        folder = find_base_model()
    except UserError:
        folder = None
    if folder is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) <= vocabulary:
            options = {"truncation": True, "max_length": _LONGEST}
            return lambda sentences: tokenizer(sentences, **options)["input_ids"], _MINILM_TOKENIZER

    def words(sentences: list[str]) -> list[list[int]]:
        return [[zlib.crc32(word.encode()) % vocabulary for word in s.split()[:_LONGEST]] for s in sentences]

    return words, _NO_TOKENIZER
