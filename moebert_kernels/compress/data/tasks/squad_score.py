"""Exact match and F1 of answers, as the SQuAD evaluations define them (arXiv 1606.05250, 1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower the case, drop ASCII punctuation, then the articles, and make one space of any white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_scores(prediction: str, golds: Sequence[str], *, may_be_absent: bool) -> tuple[float, float]:
    """Return exact match (0 or 1) and the F1 of words, each against the gold answer that suits it best.

    Args:
        prediction: the text predicted; empty for "no answer".
        golds: the answers that annotators gave; none if there is no answer.
        may_be_absent: SQuAD 2.0, where to leave an unanswerable question unanswered is right. Gold answers
            of which normalisation leaves nothing count as absent there.
    """
    if may_be_absent:
        golds = [gold for gold in golds if normalize_answer(gold)] or [""]
    exact = max(float(normalize_answer(prediction) == normalize_answer(gold)) for gold in golds)
    return exact, max(_f1(prediction, gold, may_be_absent) for gold in golds)


def _f1(prediction: str, gold: str, may_be_absent: bool) -> float:
    predicted, right = normalize_answer(prediction).split(), normalize_answer(gold).split()
    if not predicted or not right:
        return float(may_be_absent and predicted == right)
    shared = sum((Counter(predicted) & Counter(right)).values())
    return 2 * shared / (len(predicted) + len(right))


def best_over_thresholds(
    scores: Sequence[float], has_answer: Sequence[bool], says_answer: Sequence[bool], margins: Sequence[float]
) -> float:
    """Return the best mean score that any one threshold for "no answer" gives (SQuAD 2.0's "best").

    Args:
        scores: of every question's prediction if it is given as an answer.
        has_answer: whether the question has one.
        says_answer: whether the prediction is not empty.
        margins: by how much "no answer" scores higher than the prediction; at a threshold t the questions
            with margins up to t are answered.
    """
    answerable = np.asarray(has_answer, dtype=bool)
    order = np.argsort(np.asarray(margins), kind="stable")
    # With no question answered, all those without answer are right; each answer then adds or takes away.
    change = np.where(answerable, np.asarray(scores), -np.asarray(says_answer, dtype=float))
    totals = np.sum(~answerable) + np.concatenate([[0.0], np.cumsum(change[order])])
    return float(totals.max() / len(order))
