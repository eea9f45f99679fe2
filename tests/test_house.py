"""The rooms of the package lie above each other: none imports what stands above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moebert_kernels
from tests import ROOT

PACKAGE = Path(moebert_kernels.__file__).parent

# From the ground up; those of one line do not know each other.
HOUSE = (
    ("errors", "checks", "activations", "lazy", "awaited", "watchers", "timing"),
    ("native", "addresses"),
    ("routing", "kernels"),
    ("environment",),
    ("ops",),
    ("layer",),
    ("models",),
    ("registration",),
    ("compress",),
    ("export",),
    ("cli_options",),
    ("cli_command",),
    ("cli",),
)
KERNELS = (("call",), ("triton", "cpu", "torch"))
COMPRESS = (
    ("defaults", "distributed", "minilm"),
    ("data",),
    ("storage",),
    ("scoring",),
    ("experts",),
    ("evaluation",),
    ("training",),
    ("report",),
    ("runs",),
    ("demo",),
)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """The modules, and names of them, that a file imports, wherever in it, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports here are absolute"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


@pytest.mark.parametrize(
    ("prefix", "house"),
    [
        ("moebert_kernels", HOUSE),
        ("moebert_kernels.kernels", KERNELS),
        ("moebert_kernels.compress", COMPRESS),
    ],
)
def test_no_room_imports_what_stands_above_it(prefix, house):
    """Stops a circle, and a lower room from growing into one that needs the whole house."""
    floor_of = {room: floor for floor, rooms in enumerate(house) for room in rooms}
    root = PACKAGE.joinpath(*prefix.split(".")[1:])
    upwards = []
    for file in sorted(root.rglob("*.py")):
        room = file.relative_to(root).parts[0].removesuffix(".py")
        if room == "__init__":  # the package's face shows names of all rooms
            continue
        assert room in floor_of, f"{room} has no place in the house: give it one here"
        for line, name in imports(file):
            if name.startswith(f"{prefix}."):
                other = name.removeprefix(f"{prefix}.").split(".")[0]
                if other != room and floor_of.get(other, -1) >= floor_of[room]:
                    upwards.append(f"{file.relative_to(PACKAGE)}:{line} imports {name}")
    assert not upwards


def test_nothing_of_the_house_imports_what_measures_or_specifies_it():
    """Stops the package from leaning on bench/ (but for the command that runs it) or on python_ref/."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for line, name in imports(file):
            package = name.removeprefix("moebert_kernels.").split(".")[0]
            is_command = file.name == "cli.py" and package == "bench"
            assert is_command or package not in ("bench", "python_ref"), f"{file}:{line} imports {name}"


def test_no_file_of_tests_imports_another():
    """Stops tests from depending on which others are collected; what they share has modules of its own."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for line, name in imports(file):
            parts = name.split(".")
            of_tests = parts[0] == "tests" and any(part.startswith("test_") for part in parts)
            assert not of_tests, f"{file}:{line} imports {name}"
