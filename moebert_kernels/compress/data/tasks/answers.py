"""Tasks that ask for the part of a context that answers a question, or for none: question answering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from moebert_kernels.compress.data.tasks.squad_score import answer_scores, best_over_thresholds
from moebert_kernels.compress.data.tasks.task import AnswerOptions, EncodedRows, Kind, Outputs, Task, to_rows
from moebert_kernels.errors import UserError

_MAX_QUESTION = 64  # tokens, as in the code published with BERT
_DOC_STRIDE = 128


class QuestionAnswering(Kind):
    """The start and end of an answer in a context, which is read in overlapping windows if it is long.

    A question without an answer in a window is trained to point at the window's first token ([CLS]).
    """

    head = "ForQuestionAnswering"
    auto_model = AutoModelForQuestionAnswering
    default_length = 384

    def num_outputs(self, task: Task) -> int:
        """Start and end."""
        return 2

    def encode(
        self, task: Task, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> EncodedRows:
        """Make a row of each window of each context. Questions are cut to 64 tokens, or a third of the row.

        Raises:
            UserError: `max_length` leaves no room for windows that overlap by `doc_stride`.
        """
        options = task.answers or AnswerOptions()
        question_length = min(_MAX_QUESTION, max_length // 3)
        doc_stride = _doc_stride(options, tokenizer, max_length, question_length)

        def encode(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, Any]:
            encoded = tokenizer(
                [_cut(question.strip(), tokenizer, question_length) for question in batch["question"]],
                batch["context"],
                truncation="only_second",
                max_length=max_length,
                stride=doc_stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            samples = encoded.pop("overflow_to_sample_mapping")
            columns: dict[str, list[Any]] = {name: [] for name in (*_LABELS, *_PLACES)}
            for window, offsets in enumerate(encoded.pop("offset_mapping")):
                sample = samples[window]
                begins_S, ends_S = np.array(offsets, dtype=np.int32).reshape(-1, 2).T.copy()
                outside_S = np.array([part != 1 for part in encoded.sequence_ids(window)])
                begins_S[outside_S] = ends_S[outside_S] = -1
                answers, starts = batch["answers"][sample], batch["starts"][sample]
                start, end = _positions(begins_S, ends_S, answers, starts)
                new = (start, end, begins_S, ends_S, indices[sample])
                for column, value in zip(columns.values(), new, strict=True):
                    column.append(value)
            return {**encoded, **columns}

        encoded = to_rows(rows, encode, with_indices=True)
        places, golds = encoded.select_columns(list(_PLACES)).with_format("numpy"), rows["answers"][:]

        def score(outputs: Outputs) -> dict[str, float]:
            answers = find_answers(places, outputs, rows["context"][:], options)
            found = _score(answers, golds, options)
            return {name: found[name] for name in task.metric_names}

        return EncodedRows(encoded.remove_columns(list(_PLACES)), score)


_LABELS = ("start_positions", "end_positions")
_PLACES = ("begins", "ends", "example")


class Answer(NamedTuple):
    """What a model answers.

    Attributes:
        text: the best part of the context; empty if no window has a valid one.
        margin: by how much "no answer" scores higher than it.
    """

    text: str
    margin: float


def find_answers(
    windows: Dataset, outputs: Outputs, contexts: Sequence[str], options: AnswerOptions
) -> list[Answer]:
    """Choose every question's answer among the best spans of all its windows.

    A span's score is the sum of its start's and its end's logit; "no answer" has that of the first token,
    the lowest of all windows.

    Args:
        windows: in numpy's format "example", the context's number, and "begins" and "ends", [S] the
            characters of each token, -1 outside of the context.
        outputs: of each window [S, 2], the logits of start and end.
        contexts: the texts.
        options: how many spans are looked at, and how long they may be.
    """
    best = [(-np.inf, "")] * len(contexts)
    none = [np.inf] * len(contexts)
    for window, output_S2 in zip(windows, outputs, strict=True):
        example, begins_S, ends_S = int(window["example"]), window["begins"], window["ends"]
        start_S, end_S = output_S2[:, 0].astype(np.float64), output_S2[:, 1].astype(np.float64)
        none[example] = min(none[example], start_S[0] + end_S[0])
        inside = np.flatnonzero(begins_S >= 0)
        starts = inside[np.argsort(-start_S[inside], kind="stable")[: options.n_best]]
        ends = inside[np.argsort(-end_S[inside], kind="stable")[: options.n_best]]
        length = ends[None, :] - starts[:, None] + 1
        scores = start_S[starts][:, None] + end_S[ends][None, :]
        scores[(length < 1) | (length > options.max_answer_length)] = -np.inf
        if scores.size and scores.max() > best[example][0]:
            start, end = np.unravel_index(scores.argmax(), scores.shape)
            text = contexts[example][begins_S[starts[start]] : ends_S[ends[end]]]
            best[example] = (scores.max(), text)
    return [Answer(text, low - high) for (high, text), low in zip(best, none, strict=True)]


def _score(
    answers: Sequence[Answer], golds: Sequence[Sequence[str]], options: AnswerOptions
) -> dict[str, float]:
    may_be_absent = options.may_be_absent
    given = [
        "" if may_be_absent and answer.margin > options.null_threshold else answer.text for answer in answers
    ]

    def scores(texts: Sequence[str]) -> np.ndarray:
        pairs = zip(texts, golds, strict=True)
        return np.array([answer_scores(text, gold, may_be_absent=may_be_absent) for text, gold in pairs])

    found = dict(zip(("exact_match", "f1"), scores(given).mean(0).tolist(), strict=True))
    if may_be_absent:
        texts, margins = [answer.text for answer in answers], [answer.margin for answer in answers]
        has_answer, says_answer = [bool(gold) for gold in golds], [bool(text) for text in texts]
        for name, column in zip(("best_exact_match", "best_f1"), scores(texts).T, strict=True):
            found[name] = best_over_thresholds(column.tolist(), has_answer, says_answer, margins)
    return found


def _doc_stride(
    options: AnswerOptions, tokenizer: PreTrainedTokenizerBase, max_length: int, question_length: int
) -> int:
    room = max_length - question_length - tokenizer.num_special_tokens_to_add(pair=True)
    wanted = min(_DOC_STRIDE, room // 2) if options.doc_stride is None else options.doc_stride
    if room < 1 or wanted >= room:
        raise UserError(
            f"max_length {max_length} leaves {max(room, 0)} tokens of a window for the context, "
            f"not enough for windows that overlap by {max(wanted, 0)}: raise max_length or lower doc_stride"
        )
    return wanted


def _cut(question: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    keep = most
    while True:
        offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(offsets) <= most:
            return question
        question = question[: offsets[keep - 1][1]]
        keep -= 1  # a word cut in two may become more tokens


def _positions(
    begins_S: np.ndarray, ends_S: np.ndarray, answers: Sequence[str], starts: Sequence[int]
) -> tuple[int, int]:
    """The tokens that the first answer lies in; the first token's, twice, if it is not in this window."""
    inside = np.flatnonzero(begins_S >= 0)
    if not answers or not len(inside):
        return 0, 0
    start, end = starts[0], starts[0] + len(answers[0])
    touched = inside[(ends_S[inside] > start) & (begins_S[inside] < end)]
    if not len(touched) or begins_S[inside[0]] > start or ends_S[inside[-1]] < end:
        return 0, 0
    return int(touched[0]), int(touched[-1])
