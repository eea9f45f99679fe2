"""SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822), and data in their format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from moebert_kernels.compress.data.files import describe_folder, read_json
from moebert_kernels.compress.data.tasks.hub import HubName, check_columns
from moebert_kernels.compress.data.tasks.task import AnswerOptions, Task, TaskData
from moebert_kernels.errors import UserError

_V1, _V2 = "squad", "squad_v2"
_HUB = {_V1: "rajpurkar/squad", _V2: "rajpurkar/squad_v2"}
_VERSIONS = {_V1: "v1.1", _V2: "v2.0"}
_METRICS = ("exact_match", "f1")
_BEST_METRICS = ("best_exact_match", "best_f1")

SQUAD_NAMES = (_V1, _V2)


_NEAR = 64  # characters: by so much and little more, counting in bytes or UTF-16 units goes wrong


class _Question(NamedTuple):
    source: str
    name: str
    question: str
    context: str
    answers: list[str]
    starts: list[int]


def load_squad(name: str, data: HubName | Path, options: AnswerOptions) -> TaskData:
    """Load questions on contexts.

    Args:
        name: "squad", where every question has an answer, or "squad_v2".
        data: a folder with train-v1.1.json and dev-v1.1.json (v2.0 for "squad_v2"), or train.json and
            dev.json in the same format; or a data set of the hub with the splits "train" and "validation"
            and the columns of "rajpurkar/squad".
        options: how answers are found.

    An answer that does not stand at its "answer_start" is looked for near by. A training question whose
    answer is not found is left out; oddities say which. To validate, a text that is no part of the context
    remains an answer that no model finds, as in the official score.

    Raises:
        UserError: a missing folder, file, split or column, another format, a question without an answer in
            "squad", no questions, or none whose answer is in its context.
    """
    if isinstance(data, Path):
        if not data.is_dir():
            raise UserError(
                f"{data} is not a folder; task {name} needs one with train-{_VERSIONS[name]}.json"
            )
        sources: list[Iterable[_Question]] = [
            _read_file(_find_file(data, split, _VERSIONS[name])) for split in ("train", "dev")
        ]
    else:
        hub = data.or_default(_HUB[name])
        found = hub.load("train", "validation")
        sources = [_from_hub(found[split], f"{hub} ({split})") for split in ("train", "validation")]
    may_be_absent = name == _V2
    metrics = (*_METRICS, *_BEST_METRICS) if may_be_absent else _METRICS
    options = replace(options, may_be_absent=may_be_absent)
    task = Task(name, "question_answering", (), metrics, "f1", options)
    (train, of_train), (validation, of_validation) = (
        _rows(source, may_be_absent, to_train=to_train)
        for source, to_train in zip(sources, (True, False), strict=True)
    )
    return TaskData(task, train, validation, oddities=(*of_train, *of_validation))


def _rows(
    questions: Iterable[_Question], may_be_absent: bool, *, to_train: bool
) -> tuple[Dataset, list[str]]:
    """The rows, and what is to be said of answers that do not stand where they should."""
    columns: dict[str, list[Any]] = {"question": [], "context": [], "answers": [], "starts": []}
    moved: list[str] = []
    lost: list[str] = []
    for source, name, question, context, answers, starts in questions:
        place = f"{source}, {name}"
        if not answers and not may_be_absent:
            raise UserError(f"{place}: no answer, which task {_V1} needs; task {_V2} is for such questions")
        if len(answers) != len(starts):
            raise UserError(f"{place}: {len(answers)} answers, but {len(starts)} places in the context")
        pairs = list(zip(answers, starts, strict=True))
        found = [_locate(context, *pair) for pair in pairs]
        if None in found:
            lost.append(name)
        elif found != pairs:
            moved.append(name)
        if to_train:
            kept = [pair for pair in found if pair is not None]
            if answers and not kept:
                continue
        else:
            kept = [pair if there is None else there for pair, there in zip(pairs, found, strict=True)]
        new = (question, context, [answer for answer, _ in kept], [start for _, start in kept])
        for column, value in zip(columns.values(), new, strict=True):
            column.append(value)
    if not columns["question"]:
        raise UserError(f"{source} has no question whose answer is a part of its context")
    oddities = []
    if moved:
        oddities.append(
            f"{source}: answers of {len(moved)} questions do not stand at their answer_start, and were found "
            f"near by: {_listed(moved)}."
        )
    if lost:
        remedy = "are not trained on" if to_train else "count all the same, though no model can find them"
        oddities.append(
            f"{source}: answers of {len(lost)} questions do not stand near their answer_start, and {remedy}: "
            f"{_listed(lost)}."
        )
    return Dataset.from_dict(columns), oddities


def _locate(context: str, answer: str, start: int) -> tuple[str, int] | None:
    """The answer as the context has it, up to case and spaces, and where.

    Returns:
        The one place where it stands, or of several the nearest to `start`; None if there is none, or they
        are too far from `start` to be told apart.
    """
    if answer and start >= 0 and context.startswith(answer, start):
        return answer, start
    words = [re.escape(word) for word in answer.split()]
    if not words:
        return None
    matches = list(re.finditer(r"\s+".join(words), context, re.IGNORECASE))
    nearest = min(matches, key=lambda match: abs(match.start() - start), default=None)
    if nearest is None or (len(matches) > 1 and abs(nearest.start() - start) > _NEAR):
        return None
    return nearest[0], nearest.start()


def _listed(ids: Sequence[str]) -> str:
    return ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")


def _find_file(folder: Path, split: str, version: str) -> Path:
    for name in (f"{split}-{version}.json", f"{split}.json"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no {split}-{version}.json nor {split}.json; {describe_folder(folder)}")


def _read_file(path: Path) -> list[_Question]:
    content = read_json(path)
    try:
        questions = list(_walk(path, content["data"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not in SQuAD's format, data > paragraphs > qas > answers: "
            f"{type(error).__name__} {error}"
        ) from None
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _walk(path: Path, articles: Sequence[dict[str, Any]]) -> Iterator[_Question]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            context = _text(paragraph["context"])
            for question in paragraph["qas"]:
                answers = question["answers"]
                yield _Question(
                    str(path),
                    f"question {question['id']}",
                    _text(question["question"]),
                    context,
                    [_text(answer["text"]) for answer in answers],
                    [_number(answer["answer_start"]) for answer in answers],
                )


def _from_hub(rows: Dataset, source: str) -> Iterator[_Question]:
    check_columns(rows, source, ("question", "context", "answers"))
    if not len(rows):
        raise UserError(f"{source} has no questions")
    for number, row in enumerate(rows, 1):
        place, answers = f"{source}, row {number}", row["answers"]
        try:
            if isinstance(answers, list):  # of objects, as in the files; otherwise an object of lists
                answers = {name: [one[name] for one in answers] for name in ("text", "answer_start")}
            yield _Question(
                source,
                f"row {number}",
                _text(row["question"]),
                _text(row["context"]),
                [_text(text) for text in answers["text"]],
                [_number(start) for start in answers["answer_start"]],
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{place} is not a question with its answers: {type(error).__name__} {error}"
            ) from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text is expected")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} where a number of characters is expected")
    return value
