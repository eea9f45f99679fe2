"""Tasks with a label for every word: token classification."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from moebert_kernels.compress.data.tasks.entities import OUTSIDE, entity_scores
from moebert_kernels.compress.data.tasks.task import EncodedRows, Kind, Outputs, Task, to_rows
from moebert_kernels.models.config import IGNORED_LABEL


class TokenClassification(Kind):
    """A class per word, predicted at the word's first token; a sentence's words are joined by spaces.

    Words are found by their characters rather than handed over one by one, so that any tokenizer will do that
    knows where its tokens come from, and so that a sentence is read as it will be when the model is used.
    """

    head = "ForTokenClassification"
    auto_model = AutoModelForTokenClassification

    def num_outputs(self, task: Task) -> int:
        """One per class."""
        return len(task.label_names)

    def encode(
        self, task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> EncodedRows:
        """Continue sentences of more than `max_length` tokens in further rows, so that every word is scored.

        Tokens that do not begin a word are labelled -100. A word without any token is predicted "O".
        """

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            encoded = tokenizer(
                [" ".join(words) for words in batch["words"]],
                truncation=True,
                max_length=max_length,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            samples = encoded.pop("overflow_to_sample_mapping")
            word_at = _first_tokens(batch["words"], samples, encoded.pop("offset_mapping"))
            labels = [
                [IGNORED_LABEL if word < 0 else batch["label"][sample][word] for word in words]
                for sample, words in zip(samples, word_at, strict=True)
            ]
            examples = [indices[sample] for sample in samples]
            return {**encoded, "labels": labels, "word_at": word_at, "example": examples}

        encoded = to_rows(rows, encode, with_indices=True)
        places = encoded.select_columns(["word_at", "example"])
        labels = rows["label"][:]

        def score(outputs: Outputs) -> dict[str, float]:
            names = task.label_names
            gold = [[names[label] for label in sentence] for sentence in labels]
            predicted = [[OUTSIDE] * len(sentence) for sentence in labels]
            for place, output_SC in zip(places, outputs, strict=True):
                classes_S = output_SC.argmax(-1)
                for token, word in enumerate(place["word_at"]):
                    if word >= 0:
                        predicted[place["example"]][word] = names[classes_S[token]]
            return entity_scores(gold, predicted)

        return EncodedRows(encoded.remove_columns(["word_at", "example"]), score)


def _first_tokens(
    sentences: list[list[str]], samples: list[int], offsets: list[list[tuple[int, int]]]
) -> list[list[int]]:
    """For every token of every window the word it begins, or -1.

    Args:
        sentences: words of each.
        samples: the sentence of each window; windows of a sentence follow one another.
        offsets: the characters [start, end) of each token in the sentence joined by spaces; (0, 0) for
            special tokens.
    """
    starts = [
        np.array([0, *accumulate(len(word) + 1 for word in words)][: len(words)]) for words in sentences
    ]
    begun = [-1] * len(sentences)
    word_at = []
    for sample, tokens in zip(samples, offsets, strict=True):
        words = []
        for start, end in tokens:
            # By its last character: some tokenizers count the space before a word to its first token.
            word = -1 if end == start else int(np.searchsorted(starts[sample], end - 1, side="right")) - 1
            is_first = word > begun[sample] and end - 1 < starts[sample][word] + len(sentences[sample][word])
            words.append(word if is_first else -1)
            if is_first:
                begun[sample] = word
        word_at.append(words)
    return word_at
