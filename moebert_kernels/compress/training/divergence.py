"""How far a student's predictions are from its teacher's, on rows that need no labels."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebert_kernels.compress.data.batching import LABEL_COLUMNS
from moebert_kernels.compress.data.predictions import Pooling, prediction_kind, prediction_of
from moebert_kernels.compress.evaluation.quality import batches
from moebert_kernels.compress.experts.layerwise import evaluating
from moebert_kernels.compress.scoring.losses import embedding_loss, prediction_loss


def divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: Pooling | None = None,
) -> float:
    """The mean of `prediction_loss`: the symmetric KL of Eq. 6, or the squared distance of two numbers.

    Of tokens it is the mean over tokens, otherwise over rows. With `pooling` it is `embedding_loss`, the
    squared distance of two embeddings.

    Args:
        student: with the teacher's head, or both with none but a `pooling`.
        teacher: on the same device.
        rows: tokenized, at least one; labels are ignored.
        tokenizer: pads.
        pooling: makes embeddings of last hidden states and mask.
    """
    total = torch.zeros((), dtype=torch.float64)
    weight = 0
    with evaluating(student, teacher):
        for batch in batches(rows, tokenizer, device=teacher.device):
            mask_BS = batch.get("attention_mask")
            inputs = {name: value for name, value in batch.items() if name not in LABEL_COLUMNS}
            ours, theirs = student(**inputs), teacher(**inputs)
            units = len(batch["input_ids"])
            if pooling is not None:
                found = embedding_loss(*(pooling(out.last_hidden_state, mask_BS) for out in (ours, theirs)))
            else:
                kind = prediction_kind(ours, teacher.config)
                found = prediction_loss(kind, prediction_of(ours), prediction_of(theirs), mask_BS)
                if kind == "token_classification":
                    units = batch["input_ids"].numel() if mask_BS is None else int(mask_BS.ne(0).sum())
            total += units * found.double().cpu()
            weight += units
    return float(total) / weight
