"""What a run is about: a teacher and rows for it, and what depends on the kind of task they are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.data import sentences
from moebert_kernels.compress.data.batching import sample_rows
from moebert_kernels.compress.data.predictions import Pooling
from moebert_kernels.compress.data.tasks import (
    KINDS,
    EncodedData,
    EncodedRows,
    Task,
    TaskData,
    kind_of_model,
    match_labels,
    texts,
    tokenize,
)
from moebert_kernels.compress.evaluation.likeness import (
    embedding_likeness,
    pair_correlation,
    prediction_likeness,
)
from moebert_kernels.compress.evaluation.quality import batches, predict
from moebert_kernels.compress.experts.adaptation import (
    COUNTING_ROUTINGS,
    adapt,
    check_sizes,
    default_sizes,
    token_counts,
)
from moebert_kernels.compress.experts.fitting import Fitted, fit, rows_to_fit
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.scoring.importance import Importance, LossFunction, compute_importance
from moebert_kernels.compress.scoring.teacher_loss import embedding_shift_loss, prediction_shift_loss
from moebert_kernels.compress.scoring.token_scores import token_groups
from moebert_kernels.compress.storage.artifacts import fingerprint, model_fingerprint
from moebert_kernels.compress.storage.loading import (
    check_can_be_cut,
    compared_with_training,
    load_model,
    place,
    row_length,
    save_encoder,
)
from moebert_kernels.compress.storage.sentence_encoder import (
    is_sentence_encoder,
    load_sentence_encoder,
    save_sentence_encoder,
    tokenize_texts,
)
from moebert_kernels.compress.training.precision import computing
from moebert_kernels.models import find_ffns

Report = Callable[[int, int], None]
"""Called by a stage's work with (done, total), in a unit of its own."""


def subject_of(folder: Path, data: TaskData) -> Subject:
    """Load a model and take it with its rows.

    Args:
        folder: of the model, and its tokenizer.
        data: of `load_task`, `load_texts` or `load_sentences`.

    Raises:
        UserError: the folder holds no model for such rows.
    """
    kinds: dict[str, type[Subject]] = {texts.KIND: TextSubject, sentences.KIND: SentenceSubject}
    return kinds.get(data.task.kind, Subject)(folder, data)


def model_alone(folder: Path) -> Subject:
    """Load a model without any rows; of what kind it is, its folder says.

    Raises:
        UserError: the folder holds no model.
    """
    kind = sentences.KIND if is_sentence_encoder(folder) else texts.KIND
    none = Dataset.from_dict({"text": []})
    return subject_of(folder, TaskData(Task("", kind, (), (), ""), none, none))


class Subject:
    """A model with a head and labelled rows: it is taught by labels, and judged by them.

    Attributes:
        folder: of the model.
        model: the teacher, or one to be judged; on the CPU until `place` is called.
        tokenizer: its.
        data: raw rows, with the model's label ids.
        pooling: makes embeddings of last hidden states; None for models with a head.
        default_length: tokens that rows are cut to if nobody says otherwise.
        measured_length: and of the sequences that speed is measured on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    default_length: int
    measured_length: int
    pooling: Pooling | None = None

    def __init__(self, folder: Path, data: TaskData):
        self.folder = folder
        self.model, self.tokenizer = load_model(folder)
        self.default_length = self.measured_length = KINDS[data.task.kind].default_length
        self.data = self._matched(data)

    def _matched(self, data: TaskData) -> TaskData:
        return match_labels(compared_with_training(self.folder, data), self.model.config)

    def check_can_be_cut(self) -> None:
        """Raise a UserError unless the model's feed-forward networks can become experts."""
        check_can_be_cut(self.model, self.folder)

    def place(self) -> None:
        """Put the model onto the device of this process."""
        place(self.model)

    def fingerprint(self) -> str:
        """Of the model's files."""
        return model_fingerprint(self.folder)

    def row_length(self, asked: int | None) -> int:
        """Settle to how many tokens rows are cut; see `row_length`."""
        return row_length(asked, self.model.config, self.tokenizer, "max_length", default=self.default_length)

    def resolve(self, settings: CompressSettings) -> CompressSettings:
        """Fill in what depends on model and rows, and check that it fits.

        Raises:
            UserError: the experts cannot be cut from the model's layers, or it takes no rows that long.
        """
        width = find_ffns(self.model)[0].w1.out_features
        size = settings.expert_size
        if size is None:
            size = default_sizes(width, settings.num_experts)[0]
        shared = round(size * 2 / 3) if settings.num_shared is None else settings.num_shared
        # A random split, to compare, deals neurons out: its experts cannot overlap.
        overlapping = settings.routing == "hash-affinity" and "random" not in settings.comparisons
        tied = settings.tie_shared
        check_sizes(width, settings.num_experts, size, shared, overlapping=overlapping, tied=tied)
        measured = None
        if settings.measure:
            asked, config = settings.measure_length, self.model.config
            measured = row_length(
                asked, config, self.tokenizer, "measure_length", default=self.measured_length
            )
        return replace(
            settings,
            expert_size=size,
            num_shared=shared,
            importance_rows=settings.importance_rows and min(settings.importance_rows, len(self.data.train)),
            max_length=self.row_length(settings.max_length),
            measure_length=measured,
        )

    def encode(self, max_length: int | None) -> EncodedData:
        """The rows as token ids, and how outputs on those to validate on are scored.

        Args:
            max_length: tokens of a row; None for the default.

        Raises:
            ArgumentError: the model takes no rows that long.
        """
        return tokenize(self.data, self.tokenizer, self.row_length(max_length))

    def loss(self, seed: int) -> str | LossFunction:
        """What importance is taken of."""
        return "labels"

    def importance(
        self,
        rows: Dataset,
        settings: CompressSettings,
        *,
        per_token: bool,
        progress: Report = lambda done, total: None,
    ) -> Importance:
        """Score the model's neurons on some of the training rows; collective.

        Args:
            rows: tokenised; `settings.importance_rows` of them are drawn.
            settings: `seed` and `bf16` are read too.
            per_token: whether to score them for every token id too.
            progress: hears (rows done, rows in all).
        """
        rows, group_V = sample_rows(rows, settings.importance_rows, settings.seed), None
        if per_token:
            group_V = token_groups(self.model, token_counts(rows, self.model.config.vocab_size))
        with computing(settings.bf16):
            return compute_importance(
                self.model,
                batches(rows, self.tokenizer, device=self.model.device),
                loss=self.loss(settings.seed),
                task=self.data.task.name,
                model_name=self.folder.resolve().name,
                group_V=group_V,
                progress=lambda done: progress(done, len(rows)),
            )

    def cut(
        self,
        scores: Importance | Tensor,
        settings: CompressSettings,
        rows: Dataset | None,
        progress: Report,
    ) -> PreTrainedModel:
        """Make the MoE whose experts take the model's neurons by falling score; see `adapt`.

        Args:
            scores: of the neurons.
            settings: of the experts.
            rows: the tokenised training rows; read by `COUNTING_ROUTINGS`, which cannot do without.
            progress: hears (layers done, layers in all).
        """
        counts_V = None
        if settings.routing in COUNTING_ROUTINGS and rows is not None:
            counts_V = token_counts(rows, self.model.config.vocab_size)
        return adapt(
            self.model,
            scores,
            num_experts=settings.num_experts,
            expert_size=settings.expert_size,
            num_shared=settings.num_shared,
            tie_shared=settings.tie_shared,
            routing=settings.routing,
            top_k=settings.top_k,
            seed=settings.seed,
            token_counts_V=counts_V,
            progress=progress,
        )

    def fit(
        self, student: PreTrainedModel, rows: Dataset, settings: CompressSettings, progress: Report
    ) -> tuple[Fitted, int]:
        """Fit a student's experts, in place, to what the model does; see `fit`. Collective.

        Args:
            student: made of the model.
            rows: tokenised; `settings.fit_rows` of them are drawn.
            settings: `seed` and `bf16` are read too.
            progress: hears (batches done, batches in all).

        Returns:
            What it brought, and how many rows it was fitted to.
        """
        rows = rows_to_fit(rows, settings.fit_rows, settings.seed, self.model.config.hidden_size)
        with computing(settings.bf16):
            found = fit(student, self.model, list(batches(rows, self.tokenizer)), progress=progress)
        return found, len(rows)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Save a model made of this one where `read` finds it; what was in the folder is replaced."""
        save_encoder(model, self.tokenizer, folder)

    def read(self, folder: Path) -> PreTrainedModel:
        """Read a saved model, onto the CPU."""
        return load_model(folder)[0]

    def load(self, folder: Path) -> PreTrainedModel:
        """Read a saved model, onto the device of this process."""
        model = self.read(folder)
        place(model)
        return model


class TextSubject(Subject):
    """A model with any head and texts without labels: others are judged by its predictions of them.

    Measured are "agreement", the share of texts (or tokens, or answers) of which both say the same, all
    classes of a text if it has any number of them, or of numbers their correlation, "pearson"; and
    "divergence", as `divergence.divergence` has it.
    """

    def _matched(self, data: TaskData) -> TaskData:
        first = "pearson" if kind_of_model(self.model.config) == "regression" else "agreement"
        task = replace(data.task, metric_names=(first, "divergence"), main_metric=first)
        return replace(data, task=task)

    def loss(self, seed: int) -> LossFunction:
        """How far predictions move."""
        return prediction_shift_loss(self.model.config, seed=seed)

    def encode(self, max_length: int | None) -> EncodedData:
        """The texts as token ids; the held-out ones are scored against the model's predictions."""
        encoded = super().encode(max_length)

        @cache
        def theirs() -> list[np.ndarray]:
            return predict(self.model, encoded.validation, self.tokenizer)

        kind = kind_of_model(self.model.config)
        rows = EncodedRows(encoded.validation, lambda ours: prediction_likeness(kind, ours, theirs()))
        return replace(encoded, validation_sets={"": rows})


class SentenceSubject(Subject):
    """A model that embeds sentences, saved as sentence_transformers does, and sentences.

    Measured are "cosine", between its own and another's embedding of a sentence, in the mean;
    "similarity_spearman", the rank correlation of the similarities of two sentences, over all pairs; and,
    given scored pairs, "spearman_pairs", that of similarities and scores.
    """

    def __init__(self, folder: Path, data: TaskData):
        self.folder = folder
        self.encoder = encoder = load_sentence_encoder(folder)
        self.model, self.tokenizer, self.pooling = encoder.model, encoder.tokenizer, encoder.pool
        self.default_length, self.measured_length = encoder.max_length, 128
        self.data = data

    def fingerprint(self) -> str:
        """Of all folders a sentence_transformers model has."""
        folders = [self.folder, *sorted(path for path in self.folder.iterdir() if path.is_dir())]
        return fingerprint(
            [[path.name, model_fingerprint(path)] for path in folders[1:]] + [model_fingerprint(folders[0])]
        )

    def loss(self, seed: int) -> LossFunction:
        """How far embeddings move."""
        return embedding_shift_loss(self.encoder.pool, self.model.config.hidden_size, seed=seed)

    def encode(self, max_length: int | None) -> EncodedData:
        """The sentences as token ids; the held-out ones are scored against the model's embeddings."""
        encoder = replace(self.encoder, max_length=self.row_length(max_length))
        held_out = tokenize_texts(self.data.validation["text"], encoder)

        @cache
        def theirs_ND() -> np.ndarray:
            return np.stack(predict(self.model, held_out, self.tokenizer, pooling=self.pooling))

        sets = {"": EncodedRows(held_out, lambda outputs: embedding_likeness(np.stack(outputs), theirs_ND()))}
        pairs = self.data.further_validation.get(sentences.PAIRS)
        if pairs is not None:
            rows = tokenize_texts([*pairs["text"], *pairs["text_pair"]], encoder)
            scores = pairs["label"]
            sets[sentences.PAIRS] = EncodedRows(
                rows, lambda outputs: {"spearman": pair_correlation(np.stack(outputs), scores)}
            )
        return EncodedData(self.data.task, tokenize_texts(self.data.train["text"], encoder), sets)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Save it as sentence_transformers does."""
        save_sentence_encoder(replace(self.encoder, model=model), folder, overwrite=True)

    def read(self, folder: Path) -> PreTrainedModel:
        """Read the encoder alone."""
        return load_sentence_encoder(folder).model
