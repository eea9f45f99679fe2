"""Data sets of the Hugging Face hub, or saved in its formats, through `datasets.load_dataset`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Value
from datasets.exceptions import DatasetsError

from moebert_kernels.compress.data.files import Table
from moebert_kernels.errors import UserError


@dataclass(frozen=True)
class HubName:
    """A data set's name.

    Attributes:
        name: on the hub, or a folder; None for the one that the task knows.
        config: the part of it, if it has parts.
    """

    name: str | None
    config: str | None = None

    @classmethod
    def parse(cls, data: str | Path) -> HubName | None:
        """Read "hub", "hub:NAME" or "hub:NAME:CONFIG"; None if it is a path.

        Raises:
            UserError: nothing follows a colon.
        """
        prefix, colon, rest = str(data).partition(":")
        if isinstance(data, Path) or prefix != "hub":
            return None
        name, second_colon, config = rest.partition(":")
        if (colon and not name) or (second_colon and not config):
            raise UserError(f"{data!r} lacks a name; write hub, hub:NAME or hub:NAME:CONFIG")
        return cls(name or None, config or None)

    def or_default(self, name: str, config: str | None = None) -> HubName:
        """This name, or the task's own if this is none."""
        return HubName(name, config) if self.name is None else self

    def load(self, *splits: str) -> DatasetDict:
        """Load the data set.

        Args:
            splits: it must have.

        Raises:
            UserError: it cannot be loaded, or lacks a split.
        """
        try:
            found = datasets.load_dataset(self.name, self.config)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(f"the data set {self} cannot be loaded: {error}") from error
        for split in splits:
            if split not in found:
                raise UserError(f"the data set {self} has no split {split!r}; it has {', '.join(found)}")
        return found

    def __str__(self) -> str:
        return f"{self.name}:{self.config}" if self.config else str(self.name)


def as_table(rows: Dataset, source: str) -> Table:
    """Write a split's numbers and classes as text, lists of them as lists; other columns are left out.

    Raises:
        UserError: the split is empty.
    """
    columns = [name for name, feature in rows.features.items() if _element(feature) is not None]
    if not len(rows) or not columns:
        raise UserError(f"{source} has no rows of data")
    fields = [_as_text(rows[name][:], rows.features[name]) for name in columns]
    numbers = list(range(1, len(rows) + 1))
    return Table(source, tuple(columns), [list(row) for row in zip(*fields, strict=True)], numbers, "row")


def check_columns(rows: Dataset, source: str, columns: Sequence[str]) -> None:
    """Make sure a split has the columns.

    Raises:
        UserError: it lacks one.
    """
    for name in columns:
        if name not in rows.column_names:
            raise UserError(
                f"{source} has no column {name!r}; its columns are {', '.join(rows.column_names)}"
            )


def _element(feature: Any) -> ClassLabel | Value | None:
    """What a column, or its lists, are made of, if that can be written as text."""
    feature = getattr(feature, "feature", feature)
    return feature if isinstance(feature, (ClassLabel, Value)) else None


def _as_text(values: list, feature: Any) -> list[Any]:
    if hasattr(feature, "feature"):
        return [_as_text(value or [], feature.feature) for value in values]
    if isinstance(feature, ClassLabel):
        # A hidden label is -1, which has no name.
        return [str(value) if value is None or value < 0 else feature.int2str(value) for value in values]
    return ["" if value is None else str(value) for value in values]
