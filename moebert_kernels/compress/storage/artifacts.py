"""Outputs that are whole or absent, and reused while what they were made from is unchanged."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError, safe_open

from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.files import describe_folder
from moebert_kernels.compress.storage.writing import writing
from moebert_kernels.errors import OutputError, UserError

_MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".txt", ".model"}
_NOT_OF_THE_MODEL = {"training_args.bin", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
_UNFINISHED = ".unfinished-"
_LOCK = ".lock"
_MADE_FROM = "made_from"  # in a workroom: the fingerprint of the work, or
_ABANDONED = "0" * 64  # that what lies there is not to be gone on with


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of values that json can write; the order of a dict's keys does not count."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_fingerprint(folder: Path) -> str:
    """Return the sha256 of a saved model: names and contents of its weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_SUFFIXES and path.name not in _NOT_OF_THE_MODEL and path.is_file():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def rows_fingerprint(rows: Dataset) -> str:
    """Return the sha256 of a dataset's rows, in order."""
    digest = hashlib.sha256(json.dumps(rows.column_names).encode())
    for batch in rows.iter(batch_size=1024):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


@contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write a file or folder to; it becomes `path` if all goes well.

    What was at `path` is replaced at the end, and left alone if the body raises. A reader finds the old or
    the new, or for a moment none, but never a part; nor does one after the machine has lost its power. Files
    can be read by all who can read the folder around `path`.

    Raises:
        OutputError: the disk is full, or something else keeps the body from writing.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=path.parent))
        try:
            fresh = room / path.name
            yield fresh
            readers = path.parent.stat().st_mode & 0o444
            for written in [fresh, *fresh.rglob("*")]:
                if written.is_file():  # safetensors makes files that their owner alone can read
                    written.chmod(written.stat().st_mode | readers)
                _sync(written)
            if path.is_dir():
                os.rename(path, room / "old")
            os.replace(fresh, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(room, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.EBADF,
            errno.ENOTSUP,
        ):  # not every file system does folders
            raise
    finally:
        os.close(number)


def claim(folder: Path) -> None:
    """Make an output folder one for the stages of a run: they keep their records in `work/stages`.

    Raises:
        UserError: it holds something that no run has put there, which a run might replace.
        OutputError: it cannot be made or written.
    """
    records = folder / "work" / "stages"
    with writing(folder):
        if folder.is_dir() and not records.is_dir():
            held = {path.name for path in folder.iterdir()} - {_LOCK}
            # A run that was killed as it began may have made the first of its folders.
            if held - {"work"} or (held and any((folder / "work").iterdir())):
                if {"results.json", "student"} <= held:
                    raise UserError(
                        f"{folder} holds a finished run without its work/, by which it would go on: give a "
                        "new or an empty output folder"
                    )
                raise UserError(
                    f"{describe_folder(folder)}, which no run of this command has made: give a new or an "
                    "empty output folder"
                )
        records.mkdir(parents=True, exist_ok=True)


def is_whole(path: Path) -> bool:
    """Whether a file is there and, if it is one of tensors or of json, is one from beginning to end."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError):
        return False
    return path.is_file()


def discard_unfinished(folder: Path) -> None:
    """Remove what killed processes left of `replace_whole`; only for a folder held by `exclusive`."""
    for room in folder.rglob(f"{_UNFINISHED}*"):
        shutil.rmtree(room, ignore_errors=True)


def remove_folders(folders: Iterable[Path], *, keep: Path | None = None) -> None:
    """Remove folders with all they hold, but for one.

    Raises:
        OutputError: one of them cannot be removed.
    """
    for folder in folders:
        if folder != keep:
            with writing(folder.parent):
                shutil.rmtree(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a json file whole or not at all.

    Raises:
        ValueError: a number is not finite, which json has no word for.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    with replace_whole(path) as fresh:
        fresh.write_text(text + "\n", encoding="utf-8")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold an output folder, created if need be, for this process, or those it works with; collective.

    The lock is the operating system's and goes with the main process, however it ends: none is ever stale.

    Raises:
        OutputError: the folder cannot be made or written, or another process holds it.
    """
    with ExitStack() as held:
        distributed.on_main(lambda: held.enter_context(_locked(folder)))
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with ExitStack() as held:
        with writing(folder):
            if folder.is_file():
                raise OutputError(f"the output folder {folder} is a file; give a folder")
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            held.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(lock, 100).decode(errors="replace") or "another process"
                raise OutputError(
                    f"the output folder {folder} is in use by {holder}; wait for it, or give another folder"
                ) from None
            os.ftruncate(lock, 0)
            os.write(lock, f"process {os.getpid()}".encode())
        yield


def check_workroom(output: Path) -> None:
    """Raise a UserError if the folder that `workroom` would empty holds what no run has put there."""
    room = _workroom_of(output)
    with writing(room):
        held = {path.name for path in room.iterdir()} if room.is_dir() else set()
    if held - {_LOCK} and not _is_workroom(room):
        raise UserError(
            f"{describe_folder(room)}, which no run of this command has made, where unfinished work would be "
            "kept: rename it, or choose another output folder"
        )


@contextmanager
def workroom(output: Path, made_from: str) -> Iterator[Path]:
    """Hold the folder `<output>.unfinished` for the checkpoints of a long stage; see `exclusive`.

    It is empty, unless work of the same `fingerprint` was interrupted in it; it is gone when the body has
    ended well, which should have made `output`. A folder without a record of such work is left alone.

    Raises:
        UserError: see `check_workroom`.
        OutputError: see `exclusive`.
    """
    room = _workroom_of(output)
    record = room / _MADE_FROM

    def clear() -> None:
        # Marked as ours to the end: a process killed here leaves a folder that the next may go on clearing.
        record.write_text(_ABANDONED, encoding="utf-8")
        for path in [path for path in room.iterdir() if path.name not in (_LOCK, _MADE_FROM)]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def prepare() -> None:
        check_workroom(output)
        with writing(room):
            if not _is_workroom(room) or record.read_text(encoding="utf-8") != made_from:
                clear()
                record.write_text(made_from, encoding="utf-8")

    def remove() -> None:
        clear()
        shutil.rmtree(room)

    distributed.on_main(lambda: check_workroom(output))  # before a lock is put into it
    with exclusive(room):
        distributed.on_main(prepare)
        yield room
        distributed.on_main(remove)


def _workroom_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.unfinished")


def _is_workroom(room: Path) -> bool:
    try:
        return re.fullmatch("[0-9a-f]{64}", (room / _MADE_FROM).read_text(encoding="utf-8")) is not None
    except (OSError, ValueError):
        return False
