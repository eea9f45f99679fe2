"""Entities in sequences of BIO tags, counted by seqeval as conlleval counts them."""

from __future__ import annotations

from collections.abc import Sequence

from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

OUTSIDE = "O"


def bio_tags(tags: Sequence[str]) -> list[str]:
    """The tags of one sentence with B- at every beginning of an entity (IOB2).

    The CoNLL-2003 files write B- only between neighbours of one type (IOB1): there an entity begins, too, at
    an I- tag that does not continue one of its type.

    Args:
        tags: "O", "B-TYPE" or "I-TYPE" of every word, of either scheme.
    """
    found = [OUTSIDE] * len(tags)
    for kind, first, last in get_entities(list(tags)):
        found[first : last + 1] = [f"B-{kind}"] + [f"I-{kind}"] * (last - first)
    return found


def entity_scores(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Return "precision", "recall" and "f1" of entities, and the "accuracy" of tags word by word.

    A predicted entity is right if type, first and last word are those of a gold one. What is 0/0 counts as 0.

    Args:
        gold: tags of every sentence.
        predicted: as many.
    """
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    found = {name: float(score(gold, predicted, zero_division=0)) for name, score in scores.items()}
    return {**found, "accuracy": float(accuracy_score(gold, predicted)) if any(gold) else 0.0}
