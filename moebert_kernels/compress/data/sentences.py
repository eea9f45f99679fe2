"""Sentences without labels, to compress an embedding model with, and scored pairs to judge it by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset

from moebert_kernels.compress.data.files import TABLE_SUFFIXES, check_file, read_table, read_text, split_lines
from moebert_kernels.compress.data.tasks import Task, TaskData
from moebert_kernels.compress.data.tasks.glue import load_glue
from moebert_kernels.compress.data.tasks.tables import CsvOptions, check_columns, labelled_rows
from moebert_kernels.errors import ArgumentError, UserError, naming

KIND = "embedding"
PAIRS = "pairs"


def load_sentences(
    data: str | Path,
    *,
    pairs: str | Path | None = None,
    columns: CsvOptions | None = None,
) -> TaskData:
    """Load sentences to distil embeddings on.

    Args:
        data: a `.txt` file with a sentence per line, or a table, see `read_table`. Empty ones are left out.
        pairs: pairs of sentences with a score of how alike they are: a table, or the folder of the original
            STS-B files, whose validation rows are taken.
        columns: the text's column of a table, the columns of scored pairs ("text", "text_pair" and "label" by
            default), and how many sentences to hold out, with what seed.

    Returns:
        Rows with "text". Held-out sentences are the validation rows; scored pairs are a further set, "pairs",
        of "text", "text_pair" and "label".

    Raises:
        UserError: files or columns are missing or do not fit, or there are fewer than four sentences.
    """
    columns = columns or CsvOptions()
    if not 0 < columns.validation_fraction < 1:
        raise ArgumentError(
            "validation_fraction", f"is {columns.validation_fraction}, expected between 0 and 1"
        )
    with naming("data"):
        texts = _load_texts(Path(data), columns)
    count = min(max(round(len(texts) * columns.validation_fraction), 2), len(texts) - 2)
    out = np.sort(np.random.default_rng(columns.seed).permutation(len(texts))[:count])
    rows = Dataset.from_dict({"text": texts})
    metrics, further = ["cosine", "similarity_spearman"], {}
    if pairs is not None:
        with naming("pairs"):
            further[PAIRS] = _load_pairs(Path(pairs), columns)
        metrics.append(f"spearman_{PAIRS}")
    main = metrics[-1] if further else metrics[0]
    task = Task("sentence embeddings", KIND, (), tuple(metrics), main)
    kept = np.setdiff1d(np.arange(len(texts)), out)
    return TaskData(task, rows.select(kept), rows.select(out), further)


def _load_texts(path: Path, columns: CsvOptions) -> list[str]:
    check_file(path, (".txt", *TABLE_SUFFIXES))
    if path.suffix.lower() == ".txt":
        texts = split_lines(read_text(path))
    else:
        table = read_table(path)
        check_columns(table, text=columns.text)
        texts = table.column(columns.text)
    texts = [text for text in texts if text.strip()]
    if len(texts) < 4:
        raise UserError(f"{path} has {len(texts)} sentences, expected at least 4: two are held out")
    return texts


def _load_pairs(path: Path, columns: CsvOptions) -> Dataset:
    if path.is_dir():
        return load_glue("stsb", path).validation
    pair = columns.text_pair or "text_pair"
    table = read_table(path)
    check_columns(table, text=columns.text, text_pair=pair, label=columns.label)
    rows = labelled_rows(table, columns.text, pair, columns.label, None)
    if len(rows) < 2:
        raise UserError(f"{path} has one pair, expected at least 2: their order is what is judged")
    return rows
