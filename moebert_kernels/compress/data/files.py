"""Reading tables of text as their authors wrote them, with errors that name file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebert_kernels.errors import UserError

Records = list[tuple[int, list[Any]]]

_DELIMITERS = ",;\t|"
_PACKED = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"}

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Table:
    """Rows of text, from a file or a data set.

    Attributes:
        source: the file's path, or the data set's name.
        columns: names of the columns.
        rows: the fields of every row, as many as columns: text, or where the source has them lists of texts.
        lines: the line of the file, from 1, at which each row begins; of a data set the row's number.
        unit: what `lines` counts.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    lines: list[int]
    unit: str = "line"

    def column(self, name: str) -> list[str]:
        """Return the fields under `name`.

        Raises:
            UserError: no column, or more than one, has this name, or a field is a list.
        """
        fields = self.fields(name)
        for row, field in enumerate(fields):
            if not isinstance(field, str):
                raise UserError(f"{self.place(row)}: {name!r} is a list, expected text or a number")
        return fields

    def fields(self, name: str) -> list[Any]:
        """Return the fields under `name`, texts or lists of texts.

        Raises:
            UserError: no column, or more than one, has this name.
        """
        if self.columns.count(name) != 1:
            problem = "more than one column" if name in self.columns else "no column"
            raise UserError(
                f"{self.source} has {problem} {name!r}; its columns are {', '.join(self.columns)}"
            )
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def place(self, row: int) -> str:
        """Where a row, numbered from 0, is to be found; for messages."""
        return f"{self.source}, {self.unit} {self.lines[row]}"


def read_table(path: Path, columns: tuple[str, ...] | None = None, *, join_broken: bool = False) -> Table:
    """Read a UTF-8 table: `.csv` with quoting (RFC 4180), `.tsv` with tabs and none, `.jsonl`.

    The fields of a `.csv` are apart by commas or, if its first line has none, by semicolons, tabs or bars.
    In a `.tsv`, as in the GLUE files, a quotation mark is text like any other. A byte-order mark and carriage
    returns at line ends are dropped, empty lines skipped; a carriage return within a line is text. A `.jsonl`
    has an object per line; its columns are the first object's names, but for those that hold objects or lists
    of more than texts and numbers; null is an empty field, and so is a list that a line lacks.

    Args:
        path: the file, its kind known by its suffix.
        columns: the columns' names if a `.csv` or `.tsv` has no header line.
        join_broken: in a `.tsv`, put rows together whose text has a line break, if what follows a row with
            too few fields completes it exactly.

    Raises:
        UserError: the file is missing, of another suffix, not UTF-8, without rows, or has a row with more or
            fewer fields than columns.
    """
    check_file(path, TABLE_SUFFIXES)
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        raise UserError(f"{path} is compressed: unpack it first ({_PACKED[suffix]})")
    text = read_text(path)
    if suffix == ".jsonl":
        columns, records = _split_jsonl(path, text)
    elif suffix in (".tsv", ".csv"):
        records = _split_tsv(text) if suffix == ".tsv" else _split_csv(path, text)
        if columns is None and records:
            columns = tuple(name.strip() for name in records.pop(0)[1])
            if suffix == ".tsv" and len(columns) == 1 and re.search("[,;]", columns[0]):
                raise UserError(f"{path} has no tab in its first line, {columns[0]!r}: name it .csv")
    else:
        raise UserError(f"{path} must be named .csv (commas), .tsv (tabs) or .jsonl (an object per line)")
    if not columns or not records:
        raise UserError(f"{path} has no rows of data")
    if join_broken:
        records = _join_broken(records, len(columns))
    for line, fields in records:
        if len(fields) != len(columns):
            raise UserError(
                f"{path}, line {line}: {len(fields)} fields, expected {len(columns)} ({', '.join(columns)})"
            )
    return Table(str(path), columns, [fields for _, fields in records], [line for line, _ in records])


def check_file(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise a UserError unless there is a file; it lists first what may be meant, by these suffixes."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; {describe_folder(path.parent, first=suffixes)}")


def read_text(path: Path) -> str:
    """Read a UTF-8 file, without its byte-order mark.

    Raises:
        UserError: the file is missing or not UTF-8.
    """
    check_file(path, (path.suffix,))
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed: unpack it first (gunzip)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from None


def read_json(path: Path) -> Any:
    """Read a json file.

    Raises:
        UserError: the file is missing, not UTF-8 or not json.
    """
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not json: {error}") from None


def split_lines(text: str) -> list[str]:
    """Split at line feeds, and drop carriage returns before them; without any, at carriage returns.

    Not `str.splitlines`: it would also break a line at U+2028, U+0085 or a form feed inside the text.
    """
    end = "\n" if "\n" in text else "\r"
    return [line.removesuffix("\r") for line in text.split(end)]


def describe_folder(folder: Path, *, first: tuple[str, ...] = ()) -> str:
    """What a folder holds, for messages about what it lacks; files of the suffixes `first` come first."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    entries = sorted(folder.iterdir(), key=lambda entry: (entry.suffix.lower() not in first, entry.name))
    if not entries:
        return f"{folder} is empty"
    names = [entry.name for entry in entries if not entry.name.startswith(".")]
    if not names:
        return f"{folder} holds hidden files alone"
    return f"{folder} holds {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"


def _split_tsv(text: str) -> Records:
    return [(number, line.split("\t")) for number, line in enumerate(split_lines(text), 1) if line]


def _split_csv(path: Path, text: str) -> Records:
    header = re.sub(r'"[^"]*"', "", re.split("[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0])
    delimiter = next((sign for sign in _DELIMITERS if sign in header), _DELIMITERS[0])
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    records = []
    line = 1
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))  # of the module, not of a reader
    try:
        for fields in reader:
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return records


def _split_jsonl(path: Path, text: str) -> tuple[tuple[str, ...], Records]:
    columns: tuple[str, ...] = ()
    lists: set[str] = set()
    records: Records = []
    for number, line in enumerate(split_lines(text), 1):
        if not line.strip():
            continue
        try:
            # Numbers stay as they are written: a label 1.0 is not 1.
            fields = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not json: {error}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number}: a {type(fields).__name__}, expected an object in braces")
        if not records:
            columns = tuple(name for name, value in fields.items() if _is_field(value))
            lists = {name for name in columns if isinstance(fields[name], list)}
        fields = {**{name: [] for name in lists}, **fields}
        missing = [name for name in columns if name not in fields]
        if missing:
            raise UserError(f"{path}, line {number}: no {missing[0]!r}, which line {records[0][0]} has")
        records.append((number, [_field(path, number, name, fields[name]) for name in columns]))
    return columns, records


def _is_field(value: Any) -> bool:
    if isinstance(value, list):
        return not any(isinstance(part, (list, dict)) for part in value)
    return not isinstance(value, dict)


def _field(path: Path, line: int, name: str, value: Any) -> str | list[str]:
    if not _is_field(value):
        raise UserError(
            f"{path}, line {line}: {name!r} is a {type(value).__name__}, expected text or a number"
        )
    return [_scalar(part) for part in value] if isinstance(value, list) else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else value


def _join_broken(records: Records, num_columns: int) -> Records:
    joined: Records = []
    at = 0
    while at < len(records):
        line, fields = records[at]
        after = at + 1
        while len(fields) < num_columns and after < len(records):
            _, more = records[after]
            # The field that the line break is in counts on both lines.
            if len(fields) + len(more) - 1 > num_columns:
                break
            fields = [*fields[:-1], f"{fields[-1]}\n{more[0]}", *more[1:]]
            after += 1
        if len(fields) != num_columns:
            line, fields = records[at]
            after = at + 1
        joined.append((line, fields))
        at = after
    return joined
