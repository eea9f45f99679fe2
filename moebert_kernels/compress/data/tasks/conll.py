"""Named entities and the like: words with BIO tags, in files of columns as CoNLL-2003 has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset

from moebert_kernels.compress.data.files import describe_folder, read_text, split_lines
from moebert_kernels.compress.data.tasks.entities import OUTSIDE, bio_tags
from moebert_kernels.compress.data.tasks.hub import HubName, check_columns
from moebert_kernels.compress.data.tasks.task import Task, TaskData
from moebert_kernels.errors import UserError

_HUB = "lhoestq/conll2003"
_WORDS, _TAGS = "tokens", "ner_tags"
_NAMES = {"train": ("train", "eng.train"), "validation": ("valid", "validation", "dev", "eng.testa", "testa")}
_SUFFIXES = ("", ".txt", ".conll", ".tsv", ".bio", ".iob2", ".iob")


@dataclass(frozen=True)
class _Sentences:
    """Tagged sentences.

    Attributes:
        words: of every sentence.
        tags: of every word, with B- at every beginning, whatever the source's scheme.
        places: where every sentence begins, for messages.
    """

    words: list[list[str]]
    tags: list[list[str]]
    places: list[str]


def load_conll(data: HubName | Path) -> TaskData:
    """Load tagged sentences.

    The classes are "O" and, for every type in the training sentences, B- and I-.

    Args:
        data: a folder with a training file (train.txt, eng.train, train.conll and the like) and a validation
            file (valid.txt, dev.txt, eng.testa, ...): in each line a word first and its tag last, columns
            apart by tabs or spaces, an empty line after each sentence; lines that begin with -DOCSTART- are
            passed over. Or a data set of the hub with the splits "train" and "validation" and the columns
            "tokens" and "ner_tags".

    Raises:
        UserError: a missing folder, file, split or column, words that are numbers of words, a line without a
            tag, a tag that is not "O", "B-TYPE" or "I-TYPE", a type that training lacks, no sentences.
    """
    if isinstance(data, Path):
        train, validation = (_read_file(_find_file(data, split)) for split in _NAMES)
    else:
        hub = data.or_default(_HUB)
        found = hub.load(*_NAMES)
        train, validation = (_from_hub(found[split], f"{hub} ({split})") for split in _NAMES)
    kinds = sorted({tag[2:] for sentence in train.tags for tag in sentence if tag != OUTSIDE})
    if not kinds:
        raise UserError(f"{train.places[0]}: no word from here on has a tag other than {OUTSIDE!r}")
    names = (OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))
    task = Task("conll", "token_classification", names, ("precision", "recall", "f1", "accuracy"), "f1")
    ids = {name: i for i, name in enumerate(names)}

    def rows(sentences: _Sentences) -> Dataset:
        for tags, place in zip(sentences.tags, sentences.places, strict=True):
            unknown = [tag[2:] for tag in tags if tag not in ids]
            if unknown:
                raise UserError(
                    f"{place}: this sentence has the type {unknown[0]!r}, which no training sentence has; "
                    f"those have {', '.join(kinds)}"
                )
        labels = [[ids[tag] for tag in tags] for tags in sentences.tags]
        return Dataset.from_dict({"words": sentences.words, "label": labels})

    return TaskData(task, rows(train), rows(validation))


def _find_file(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; task conll needs one with train.txt and valid.txt")
    for name in _NAMES[split]:
        for suffix in _SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    wanted = ", ".join(f"{name}.txt" for name in _NAMES[split][:-1])
    raise UserError(f"no {split} file ({wanted} or the like): {describe_folder(folder)}")


def _read_file(path: Path) -> _Sentences:
    sentences = _Sentences([], [], [])
    words: list[str] = []
    tags: list[str] = []
    begin = 1
    for number, line in enumerate([*split_lines(read_text(path)), ""], 1):
        line = line.strip(" \t")
        if line and not line.startswith("-DOCSTART-"):
            # Not str.split: it would also divide a word at a no-break space.
            fields = line.split("\t") if "\t" in line else re.split(" +", line)
            place = f"{path}, line {number}"
            if len(fields) < 2 or not fields[0]:
                raise UserError(f"{place}: {line!r} is not a word and a tag; an empty line ends a sentence")
            if not words:
                begin = number
            words.append(fields[0])
            tags.append(_checked(fields[-1], place))
        elif words:
            _add(sentences, words, tags, f"{path}, line {begin}")
            words, tags = [], []
    if not sentences.words:
        raise UserError(f"{path} has no sentences")
    if any(len(words) > 1 for words in sentences.words) and all(map(_are_numbers, sentences.words)):
        raise UserError(
            f"{path}: the first column numbers the words of each sentence, and task conll takes it for the "
            "words: take it out, so that a line begins with its word"
        )
    return sentences


def _are_numbers(words: list[str]) -> bool:
    """Whether they count, from 1 or 0 on."""
    return any(words == [str(i + first) for i in range(len(words))] for first in (0, 1))


def _from_hub(rows: Dataset, source: str) -> _Sentences:
    check_columns(rows, source, (_WORDS, _TAGS))
    feature = getattr(rows.features[_TAGS], "feature", None)
    if feature is None:
        raise UserError(f"{source}: column {_TAGS!r} does not hold a list of tags per sentence")
    sentences = _Sentences([], [], [])
    for number, row in enumerate(rows, 1):
        words, tags, place = row[_WORDS], row[_TAGS], f"{source}, row {number}"
        if isinstance(feature, ClassLabel):
            tags = feature.int2str(tags)
        if len(words) != len(tags):
            raise UserError(f"{place}: {len(words)} words, but {len(tags)} tags")
        if words:
            _add(sentences, words, [_checked(tag, place) for tag in tags], place)
    if not sentences.words:
        raise UserError(f"{source} has no sentences")
    return sentences


def _add(sentences: _Sentences, words: list[str], tags: Sequence[str], place: str) -> None:
    sentences.words.append(words)
    sentences.tags.append(bio_tags(tags))
    sentences.places.append(place)


def _checked(tag: object, place: str) -> str:
    if not isinstance(tag, str) or not (tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2)):
        raise UserError(f"{place}: tag {tag!r} is not {OUTSIDE!r}, 'B-TYPE' or 'I-TYPE'")
    return tag
