"""Why something could not be written, as a sentence that names the folder and says what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from moebert_kernels.errors import OutputError

_ELSEWHERE = "give another output folder"
_REMEDIES = {
    errno.ENOSPC: "make room there and run the same command again",
    errno.EDQUOT: "make room there and run the same command again",
    errno.EFBIG: "lift the limit on the size of files (ulimit -f) and run the same command again",
    errno.EMFILE: "lift the limit on open files (ulimit -n) and run the same command again",
    errno.EIO: "see what is wrong with the disk, and run the same command again",
    errno.ESTALE: "see what is wrong with the disk, and run the same command again",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: f"get the right to write there, or {_ELSEWHERE}",
    errno.EPERM: f"get the right to write there, or {_ELSEWHERE}",
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
    errno.EISDIR: _ELSEWHERE,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: _ELSEWHERE,
    errno.ENOLCK: _ELSEWHERE,
    errno.EOPNOTSUPP: _ELSEWHERE,
}
# safetensors and torch write by themselves, and tell of the system's error in their own words, or not at all.
_OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")
_OF_TORCH = re.compile(r"inline_container|PytorchStreamWriter|iostream error")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Let what goes wrong in writing to `folder` be an `OutputError`; other errors pass as they are."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        explained = explain(error, folder)
        if explained is None:
            raise
        raise explained from error


def explain(error: Exception, folder: Path | None = None) -> OutputError | None:
    """Return what to tell the user about an error, or None if it is not one of writing.

    Args:
        error: raised by the system, by safetensors or by torch.
        folder: that was written to; None if that is not known.
    """
    number = None
    if isinstance(error, OSError):
        number = error.errno
    elif isinstance(error, SafetensorError) and (told := _OF_SAFETENSORS.search(str(error))):
        number = int(told[1])
    if folder is None:
        file = error.filename if isinstance(error, OSError) else None
        place = "a file" if file is None else os.fsdecode(file)
        return OutputError(f"cannot use {place}: {os.strerror(number)}") if number in _REMEDIES else None
    place = f"cannot write to the folder {folder if folder.name else folder.absolute()}"
    if number == errno.ENOENT:
        return OutputError(f"{place}: it cannot be made, or was removed; {_ELSEWHERE}")
    if number in (errno.EEXIST, errno.ENOTDIR):
        file = next((part for part in [folder, *folder.parents] if part.is_file()), "something there")
        return OutputError(f"{place}: {file} is a file; {_ELSEWHERE}")
    if number in _REMEDIES:
        return OutputError(f"{place}: {os.strerror(number)}; {_REMEDIES[number]}")
    if isinstance(error, RuntimeError) and _OF_TORCH.search(str(error)):
        return OutputError(
            f"{place}: a file ended too early, and {_free(folder)} are free; {_REMEDIES[errno.ENOSPC]}"
        )
    return None


def check_writable(folder: Path) -> None:
    """Make a folder if need be, and make sure that files can be made in it.

    For work whose output is written at its end, which would otherwise be lost.

    Raises:
        OutputError: they cannot.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"moebert")


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB"
