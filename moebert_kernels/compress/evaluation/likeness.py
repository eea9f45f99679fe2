"""How alike two models are in what they say of the same rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from moebert_kernels.compress.data.tasks.task import Outputs
from moebert_kernels.compress.scoring.losses import prediction_loss

_MOST_COMPARED = 1000  # sentences, each with each


def prediction_likeness(kind: str, ours: Outputs, theirs: Outputs) -> dict[str, float]:
    """How alike two models' outputs on the same texts are.

    Args:
        kind: one of `PREDICTION_KINDS`.
        ours: row by row, as `predict` returns them.
        theirs: too.

    Returns:
        "agreement", or of regression "pearson", 0 where all numbers are equal; and "divergence".
    """
    if kind == "question_answering":
        same = [np.array_equal(a.argmax(0), b.argmax(0)) for a, b in zip(ours, theirs, strict=True)]
        losses = [
            prediction_loss(kind, _start_and_end(a), _start_and_end(b))
            for a, b in zip(ours, theirs, strict=True)
        ]
        return {"agreement": float(np.mean(same)), "divergence": float(torch.stack(losses).mean())}
    join = np.concatenate if kind == "token_classification" else np.stack
    a_NC, b_NC = join(list(ours)), join(list(theirs))
    # Of tokens, one after the other, each is a row by itself.
    alike = "classification" if kind == "token_classification" else kind
    divergence = float(prediction_loss(alike, torch.from_numpy(a_NC), torch.from_numpy(b_NC)))
    if kind == "regression":
        return {"pearson": _pearson(a_NC.ravel(), b_NC.ravel()), "divergence": divergence}
    if kind == "multi_label_classification":
        same_N = ((a_NC > 0) == (b_NC > 0)).all(1)
    else:
        same_N = a_NC.argmax(1) == b_NC.argmax(1)
    return {"agreement": float(same_N.mean()), "divergence": divergence}


def embedding_likeness(ours_ND: np.ndarray, theirs_ND: np.ndarray) -> dict[str, float]:
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


def pair_correlation(embedding_ND: np.ndarray, scores: Sequence[float]) -> float:
    """Spearman's rank correlation of the cosines of pairs of sentences and how alike they are said to be.

    Args:
        embedding_ND: first of the pairs' first sentences, then of their second ones, in one order.
        scores: of the pairs; N / 2.

    Returns:
        0 where all cosines or all scores are equal.
    """
    first_ND, second_ND = np.split(_unit(embedding_ND), 2)
    return _rank_correlation((first_ND * second_ND).sum(1), np.asarray(scores))


def _start_and_end(logits_S2: np.ndarray) -> tuple[Tensor, Tensor]:
    start_S, end_S = torch.from_numpy(logits_S2).unbind(1)
    return start_S.unsqueeze(0), end_S.unsqueeze(0)


def _pearson(ours: np.ndarray, theirs: np.ndarray) -> float:
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    return float(np.corrcoef(ours, theirs)[0, 1])


def _rank_correlation(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Spearman's; 0, like no correlation, where all values of one side are equal."""
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    return float(spearmanr(ours, theirs).statistic)


def _unit(x_ND: np.ndarray) -> np.ndarray:
    x_ND = x_ND.astype(np.float64)
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(min=1e-12)
