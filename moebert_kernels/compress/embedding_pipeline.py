"""`compress` for sentence-embedding models: from sentences alone to a distilled MoE and what it is worth.

Stages, output folder and results.json are those of `pipeline.compress`; sentence_transformers loads student/.
Quality is measured on held-out sentences: "cosine", between the teacher's and the student's embedding of a
sentence, in the mean; "similarity_spearman", the rank correlation of the similarities of two sentences, over
all pairs; and, given scored pairs, "spearman_pairs", that of similarities and scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.compress import processes
from moebert_kernels.compress.artifacts import fingerprint, model_fingerprint
from moebert_kernels.compress.embeddings import (
    SentenceEncoder,
    embedding_importance,
    load_sentence_encoder,
    save_sentence_encoder,
    tokenize_texts,
)
from moebert_kernels.compress.evaluate import predict
from moebert_kernels.compress.importance import Importance
from moebert_kernels.compress.pipeline import Run, results_of
from moebert_kernels.compress.sentences import PAIRS
from moebert_kernels.compress.settings import CompressSettings, resolve
from moebert_kernels.compress.stages import Progress
from moebert_kernels.compress.tasks import EncodedData, EncodedRows, TaskData
from moebert_kernels.errors import UserError, naming
from moebert_kernels.models import find_ffns, is_moe

_MOST_COMPARED = 1000  # sentences, each with each


def compress_embeddings(
    settings: CompressSettings,
    data: TaskData,
    teacher_dir: str | Path,
    output_dir: str | Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compress a sentence-embedding model into a MoE; see `pipeline.compress`.

    Args:
        settings: what to make; by default sentences are cut where the teacher cuts them.
        data: as `load_sentences` returns it.
        teacher_dir: of a model that `load_sentence_encoder` reads.
        output_dir: as for `pipeline.compress`, as are the others.
        progress: too.
        say: too.

    Returns:
        The content of results.json.

    Raises:
        UserError: as `pipeline.compress`.
    """
    teacher_dir = Path(teacher_dir)
    with naming("teacher_dir"):
        encoder = _load_teacher(teacher_dir)
    if settings.max_length is None:
        settings = replace(settings, max_length=encoder.max_length)
    settings = resolve(
        settings, encoder.model, encoder.tokenizer, num_rows=len(data.train), default_length=128
    )
    assert settings.max_length is not None
    if settings.distill:
        processes.rows_each(settings.batch_size)  # refuses what does not divide
    encoder = replace(encoder, max_length=settings.max_length)
    return results_of(_EmbeddingRun(settings, data, encoder, Path(output_dir), progress, say))


def _load_teacher(folder: Path) -> SentenceEncoder:
    encoder = load_sentence_encoder(folder)
    if is_moe(encoder.model.config):
        raise UserError(f"the model in {folder} is a MoE already: give the dense model it was made of")
    try:
        find_ffns(encoder.model)
    except ValueError as error:
        raise UserError(f"the model in {folder} cannot become a MoE: {error}") from None
    return encoder


class _EmbeddingRun(Run):
    """A run whose models have no head."""

    def __init__(
        self,
        settings: CompressSettings,
        data: TaskData,
        encoder: SentenceEncoder,
        output_dir: Path,
        progress: Progress | None,
        say: Callable[[str], None] | None,
    ):
        self.encoder = encoder
        self.pooling = encoder.pool
        teacher, tokenizer, folder = encoder.model, encoder.tokenizer, encoder.folder
        super().__init__(settings, data, teacher, tokenizer, folder, output_dir, progress, say)

    def print_teacher(self) -> str:
        """That of all folders a sentence_transformers model has."""
        folders = [self.teacher_dir, *sorted(path for path in self.teacher_dir.iterdir() if path.is_dir())]
        return fingerprint(
            [[path.name, model_fingerprint(path)] for path in folders[1:]] + [model_fingerprint(folders[0])]
        )

    @cached_property
    def data(self) -> EncodedData:
        """The sentences as token ids; the held-out ones are scored against the teacher's embeddings."""
        held_out = tokenize_texts(self.raw.validation["text"], self.encoder)

        @cache
        def theirs_ND() -> np.ndarray:
            return np.stack(predict(self.teacher, held_out, self.tokenizer, pooling=self.pooling))

        sets = {"": EncodedRows(held_out, lambda outputs: agreement(np.stack(outputs), theirs_ND()))}
        pairs = self.raw.further_validation.get(PAIRS)
        if pairs is not None:
            rows = tokenize_texts([*pairs["text"], *pairs["text_pair"]], self.encoder)
            scores = pairs["label"]
            sets[PAIRS] = EncodedRows(
                rows, lambda outputs: {"spearman": _pair_spearman(np.stack(outputs), scores)}
            )
        return EncodedData(self.raw.task, tokenize_texts(self.raw.train["text"], self.encoder), sets)

    def scores(self, rows: Dataset, group_V: Tensor | None, progress: Callable[[int], None]) -> Importance:
        """Score neurons by how far embeddings move without them."""
        name = self.teacher_dir.resolve().name
        return embedding_importance(
            self.encoder, rows, seed=self.settings.seed, model_name=name, group_V=group_V, progress=progress
        )

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Save it as sentence_transformers does."""
        save_sentence_encoder(replace(self.encoder, model=model), folder, overwrite=True)

    def read(self, folder: Path) -> PreTrainedModel:
        """Read the encoder alone."""
        return load_sentence_encoder(folder).model


def agreement(ours_ND: np.ndarray, theirs_ND: np.ndarray) -> dict[str, float]:
    """How alike two models embed the same sentences.

    Args:
        ours_ND: an embedding per sentence, of any length but 0.
        theirs_ND: of the same sentences.

    Returns:
        "cosine", the mean over sentences of that of the two embeddings, and "similarity_spearman", the rank
        correlation of two sentences' cosine in one model with that in the other, over all pairs of the first
        1000 sentences.
    """
    ours_ND, theirs_ND = _unit(ours_ND), _unit(theirs_ND)
    pairs = np.triu_indices(min(len(ours_ND), _MOST_COMPARED), k=1)
    ours, theirs = ((x_ND[:_MOST_COMPARED] @ x_ND[:_MOST_COMPARED].T)[pairs] for x_ND in (ours_ND, theirs_ND))
    return {
        "cosine": float((ours_ND * theirs_ND).sum(1).mean()),
        "similarity_spearman": _rank_correlation(ours, theirs),
    }


def _pair_spearman(embedding_ND: np.ndarray, scores: list[float]) -> float:
    """The first half of the embeddings are of the pairs' first sentences, in order."""
    first_ND, second_ND = np.split(_unit(embedding_ND), 2)
    return _rank_correlation((first_ND * second_ND).sum(1), np.asarray(scores))


def _rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Spearman's; 0, like no correlation, where all values of one side are equal."""
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    return float(spearmanr(ours, theirs).statistic)


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x_ND = x_ND.astype(np.float64)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(min=1e-12)
