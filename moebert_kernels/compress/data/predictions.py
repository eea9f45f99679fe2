"""What models with heads put out, by the kind of task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

ONE_TENSOR_KINDS = ("classification", "multi_label_classification", "regression", "token_classification")
PREDICTION_KINDS = (*ONE_TENSOR_KINDS, "question_answering")

Prediction = Tensor | tuple[Tensor, Tensor]
"""Logits; of question answering, the pair of start's and end's."""

Pooling = Callable[[Tensor, Tensor | None], Tensor]
"""Makes embeddings [B, D] of last hidden states [B, S, D] and a mask [B, S] of real tokens, or None."""


def prediction_of(outputs: Any) -> Prediction:
    """The logits of a head's outputs; of question answering, the pair of start's and end's."""
    return (outputs.start_logits, outputs.end_logits) if "start_logits" in outputs else outputs.logits


def prediction_kind(outputs: Any, config: Any) -> str:
    """The one of `PREDICTION_KINDS` that a model's outputs are.

    Args:
        outputs: of a model with a head.
        config: the model's.
    """
    if "start_logits" in outputs:
        return "question_answering"
    if outputs.logits.dim() == 3:
        return "token_classification"
    return sequence_kind(config)


def sequence_kind(config: Any) -> str:
    """What a model of sequences with this configuration puts out: a class, any number of them, or numbers."""
    if config.problem_type in ("regression", "multi_label_classification"):
        return config.problem_type
    return "regression" if config.problem_type is None and config.num_labels == 1 else "classification"
