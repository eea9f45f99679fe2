"""Kernels that Triton has compiled, carried from one machine's cache to another's in one file.

A key of the cache is a hash of all that a binary follows from: the kernel's source, its arguments' types and
constants, Triton itself, its assembler's version, the target. So what is carried is found where all of that
is the same, and elsewhere nobody asks for it: it can be of no use, but not wrong. A cache names its files by
absolute paths; they are left out, and Triton writes them anew where the archive is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

MOST_BYTES = 64 * 2**20  # what a machine that is lent takes along
# Sources and LLVM's text are most of a cache, and nobody asks a loaded kernel for them.
_CARRIED = ("json", "cubin", "ptx", "ttgir", "ttir")
_NAME = re.compile(rf"([A-Z2-7]{{52}})/((?!__grp__)\w{{1,150}}\.(?:{'|'.join(_CARRIED)}))")
_MADE_BY = "made_by.json"


@dataclass(frozen=True)
class Maker:
    """What compiled an archive's kernels, and would have to be the same where they are to be found.

    Attributes:
        triton: its version.
        build: a hash of its sources and of its library.
        assembler: what ptxas says of itself.
        commit: of this repository, None where it is unknown.
    """

    triton: str
    build: str
    assembler: str
    commit: str | None = None

    @classmethod
    def here(cls, commit: str | None = None) -> Maker:
        """The one that compiles on this machine."""
        import triton
        from triton.backends.nvidia.compiler import get_ptxas_version
        from triton.runtime.cache import triton_key

        build = hashlib.sha256(triton_key().encode()).hexdigest()
        return cls(triton.__version__, build, get_ptxas_version(90).strip().splitlines()[-1], commit)

    def differs_from(self, other: Maker) -> str:
        """Why kernels of one are not found by the other; empty if they may be."""
        if self.triton != other.triton:
            return f"Triton {self.triton}, not {other.triton}"
        if self.build != other.build:
            return f"another build of Triton {self.triton}, as another Python's is"
        if self.assembler != other.assembler:
            return f"another ptxas, {self.assembler}, not {other.assembler}"
        return ""


def pack(folders: Iterable[Path], path: Path, maker: Maker) -> int:
    """Write kernels' folders of a cache into one file, in the place of what was there.

    Returns:
        How many kernels it has.

    Raises:
        ValueError: the file is larger than what can be carried; it is there, to be looked at.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    count = 0
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_MADE_BY, json.dumps(asdict(maker)))
        for folder in sorted(folders):
            files = [file for file in folder.iterdir() if _NAME.fullmatch(f"{folder.name}/{file.name}")]
            for file in sorted(files):
                archive.write(file, f"{folder.name}/{file.name}")
            count += bool(files)
    unfinished.replace(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size >> 20} MiB, at most {MOST_BYTES >> 20} can be carried")
    return count


def unpack(path: Path) -> str:
    """Put the kernels of a file into Triton's cache, but for those it has.

    Returns:
        What was done, in words.

    Raises:
        OSError, zipfile.BadZipFile: the file cannot be read, or is damaged. What came before that is kept.
        ValueError: it is not an archive of kernels.
    """
    from triton.runtime.cache import FileCacheManager

    with zipfile.ZipFile(path) as archive:
        kernels: dict[str, list[str]] = defaultdict(list)
        for name in archive.namelist():
            if match := _NAME.fullmatch(name):
                kernels[match[1]].append(match[2])
            elif name != _MADE_BY:
                raise ValueError(f"{path} is no archive of kernels: it has {name[:100]!r}")
        maker = _maker_of(archive, path)
        there = 0
        for key, files in kernels.items():
            cache = FileCacheManager(key)
            described = next((file for file in files if file.endswith(".json")), None)
            if described is None:
                raise ValueError(f"{path} is no archive of kernels: {key} has no description")
            if cache.get_group(described):
                there += 1
                continue
            group = {file: cache.put(archive.read(f"{key}/{file}"), file) for file in files}
            cache.put_group(described, group)
    reason = maker.differs_from(Maker.here())
    which = f"{len(kernels)} kernels unpacked from {path}, {there} were there already"
    return f"{which}; none will be found: made by {reason}" if reason else f"{which}; commit {maker.commit}"


def _maker_of(archive: zipfile.ZipFile, path: Path) -> Maker:
    try:
        return Maker(**json.loads(archive.read(_MADE_BY)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no archive of kernels: nothing says what made it") from error
