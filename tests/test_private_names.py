"""Private names of the libraries that the package leans on: few, listed, and still there."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module, metadata

import pytest

from tests import ROOT

CHECKED = "moebert_kernels", "bench", "python_ref"


def listed() -> dict[str, str]:
    """From CONTRIBUTING.md: each private name, and where it is, as "module:attribute.attribute".

    Without an attribute it is one that the module gives to objects.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Private names")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(_\w+)` \| `([\w.]+:[\w.]*)` \|", table, re.MULTILINE))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of_ours(trees: list[ast.AST]) -> set[str]:
    """Every name that is defined or assigned here, and what named tuples are made with."""
    found = {"_asdict", "_fields", "_make", "_replace", "_exit", "_native"}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Attribute):
                is_set_here = isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls")
                found.update({node.attr} if is_set_here else ())
    return found


def test_private_names_are_few_and_listed():
    """Stops a private name of torch, transformers or Triton from being used without a reason and a guard."""
    files = [file for folder in CHECKED for file in sorted((ROOT / folder).rglob("*.py"))]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    ours, used = names_of_ours(trees), set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.update(node.module.split("."), (alias.name for alias in node.names))
    foreign = {name for name in used if is_private(name)} - ours
    # Those that we override are ours by name.
    assert foreign | {"_get_train_sampler"} == set(listed())


@pytest.mark.parametrize(("name", "place"), sorted(listed().items()))
def test_a_private_name_is_still_there(name, place):
    """Stops a new version of a library from breaking us in the midst of a user's work: it is told here."""
    module, _, attributes = place.partition(":")
    if module.startswith("triton"):
        pytest.importorskip("triton")
    found = import_module(module)
    if not attributes:
        assert name in inspect.getsource(found), f"{module} gives nothing a {name}: see where that is read"
        return
    for attribute in attributes.split("."):
        assert hasattr(found, attribute), f"{place} is gone: see where {name} is used"
        found = getattr(found, attribute)
    assert name in place


def test_transformers_is_one_that_the_bounds_allow():
    """Stops the upper bound from being a guess: the suite runs with the newest that it lets in."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (bounds,) = re.findall(r'"transformers>=([\d.]+),<(\d+)"', text)
    version = tuple(map(int, metadata.version("transformers").split(".")[:2]))
    assert tuple(map(int, bounds[0].split("."))) <= version < (int(bounds[1]), 0)
