"""Entities in sequences of BIO tags, counted as conlleval counts them."""

from __future__ import annotations

from collections.abc import Sequence

Entity = tuple[str, int, int]
"""(type, first word, word after the last)."""

OUTSIDE = "O"


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities of one sentence, in order.

    An entity begins at every B- tag, and at an I- tag that does not continue one of its type: after O, after
    another type, at the start. This reads the scheme of the CoNLL-2003 files, which write B- only between
    neighbours of one type (IOB1), as well as the now usual one with B- at every beginning (IOB2).

    Args:
        tags: "O", "B-TYPE" or "I-TYPE" of every word; the prefix in any case.
    """
    found: list[Entity] = []
    is_open = False
    for at, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if not kind:
            is_open = False
            continue
        if is_open and prefix.upper() == "I" and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], at + 1)
        else:
            found.append((kind, at, at + 1))
        is_open = True
    return found


def bio_tags(found: Sequence[Entity], num_words: int) -> list[str]:
    """Write entities as tags, with B- at every beginning; the reverse of `entities`."""
    tags = [OUTSIDE] * num_words
    for kind, start, end in found:
        tags[start:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - start - 1)
    return tags


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return "precision", "recall" and "f1" of entities, and the "accuracy" of tags word by word.

    A predicted entity is right if type, first and last word are those of a gold one. What is 0/0 counts as 0.

    Args:
        gold: tags of every sentence.
        predicted: as many.
    """
    num_gold = num_predicted = num_right = num_words = num_right_words = 0
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        right, found = entities(gold_tags), entities(predicted_tags)
        num_gold += len(right)
        num_predicted += len(found)
        num_right += len(set(right) & set(found))
        num_words += len(gold_tags)
        num_right_words += sum(a == b for a, b in zip(gold_tags, predicted_tags, strict=True))
    return {
        "precision": num_right / max(num_predicted, 1),
        "recall": num_right / max(num_gold, 1),
        "f1": 2 * num_right / max(num_gold + num_predicted, 1),
        "accuracy": num_right_words / max(num_words, 1),
    }
