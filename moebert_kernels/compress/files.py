"""Reading tables of text as their authors wrote them, with errors that name file and line."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from moebert_kernels.errors import UserError


@dataclass(frozen=True)
class Table:
    """A file's rows, all as text.

    Attributes:
        path: the file.
        columns: names of the columns.
        rows: the fields of every row, as many as columns.
        lines: the line of the file, from 1, at which each row begins.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """Return the fields under `name`.

        Raises:
            UserError: no column, or more than one, has this name.
        """
        if self.columns.count(name) != 1:
            problem = "more than one column" if name in self.columns else "no column"
            raise UserError(f"{self.path} has {problem} {name!r}; its columns are {', '.join(self.columns)}")
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


def read_table(path: Path, columns: tuple[str, ...] | None = None) -> Table:
    """Read a UTF-8 table: `.csv` with commas and quoting (RFC 4180), `.tsv` with tabs and none.

    In a `.tsv`, as in the GLUE files, a quotation mark is text like any other. A byte-order mark and carriage
    returns at line ends are dropped, empty lines skipped.

    Args:
        path: the file, its kind known by its suffix.
        columns: the columns' names if the file has no header line.

    Raises:
        UserError: the file is missing, of another suffix, not UTF-8, without rows, or has a row with more or
            fewer fields than columns.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file; {_describe_folder(path.parent)}")
    text = _read_text(path)
    if path.suffix.lower() == ".tsv":
        records = _split_tsv(text)
    elif path.suffix.lower() == ".csv":
        records = _split_csv(path, text)
    else:
        raise UserError(f"{path} must be named .csv (commas) or .tsv (tabs)")
    if columns is None and records:
        columns = tuple(name.strip() for name in records.pop(0)[1])
    if columns is None or not records:
        raise UserError(f"{path} has no rows of data")
    for line, fields in records:
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, line {line}: {len(fields)} fields, expected {len(columns)} ({', '.join(columns)})"
            )
    return Table(path, columns, [fields for _, fields in records], [line for line, _ in records])


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None


def _split_tsv(text: str) -> list[tuple[int, list[str]]]:
    # Not splitlines: it would also break a row at U+2028, U+0085 or a form feed inside the text.
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line]


def _split_csv(path: Path, text: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records = []
    line = 1
    try:
        for fields in reader:
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}") from None
    return records


def _describe_folder(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return f"{folder} is empty"
    return f"{folder} holds {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
