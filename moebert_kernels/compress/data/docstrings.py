"""The demonstration's task: which package of the standard library was this sentence written for?

The text is the docstrings of the Python that is running: real prose by many hands, present wherever Python
is, so that the demonstration downloads nothing. Sources are parsed, never imported or run.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from moebert_kernels.compress.data.tasks import Task, TaskData

# Tests and demonstrations hold little prose; distutils and lib2to3 left the library in 3.12 and 3.13, and
# without them the task is nearly the same on every supported Python.
_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "turtledemo",
        "site-packages",
        "distutils",
        "lib2to3",
        "ensurepip",
    }
)
_MASK = "***"
_MIN_WORDS, _ENOUGH_WORDS, _MAX_WORDS = 5, 12, 40


@dataclass(frozen=True)
class Snippet:
    """A sentence or two of one docstring.

    Attributes:
        package: top-level package or module it comes from, without the `_py` of pure-Python twins.
        definition: name of the documented function, class or module; a split keeps its snippets together.
        text: one line of prose.
    """

    package: str
    definition: str
    text: str


def load_docstrings(
    *,
    num_packages: int = 10,
    train_per_package: int = 360,
    validation_fraction: float = 0.25,
    seed: int = 0,
    library: Path | None = None,
) -> TaskData:
    """Classify docstrings by package, over the packages that have most of them.

    Every word that holds the name of one of the packages is masked, wherever it occurs. A text found in two
    packages is dropped, one found twice is kept once. Functions of the same name in the same package are on
    the same side of the split, overridden methods among them. The same Python gives the same data.

    Args:
        num_packages: how many packages, chosen by number of snippets.
        train_per_package: at most so many training rows of one package.
        validation_fraction: share of definitions held out. Validation rows are balanced by the same rule as
            training rows.
        seed: of the split and of the choice among a package's snippets.
        library: folder of the standard library; that of the running Python by default.

    Returns:
        A classification task, "text" and "label", scored by accuracy and macro F1.

    Raises:
        ValueError: fewer than `num_packages` packages have docstrings (a stripped Python).
    """
    library = Path(sysconfig.get_paths()["stdlib"]) if library is None else library
    by_package: dict[str, list[Snippet]] = {}
    for snippet in standard_library_snippets(library):
        by_package.setdefault(snippet.package, []).append(snippet)
    if len(by_package) < num_packages:
        raise ValueError(
            f"the standard library in {library} has docstrings in {len(by_package)} packages, "
            f"the task needs {num_packages}: this Python was installed without its sources"
        )
    chosen = sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:num_packages]
    packages = sorted(chosen)
    snippets = _masked_and_unique([s for name in packages for s in by_package[name]], packages)

    train: list[tuple[str, int]] = []
    validation: list[tuple[str, int]] = []
    for label, package in enumerate(packages):
        mine = sorted((s for s in snippets if s.package == package), key=lambda s: _digest(seed, s.text))
        held_out = [_is_held_out(seed, s, validation_fraction) for s in mine]
        kept = [(s.text, label) for s, out in zip(mine, held_out, strict=True) if not out]
        out = [(s.text, label) for s, out in zip(mine, held_out, strict=True) if out]
        train += kept[:train_per_package]
        validation += out[: round(train_per_package * validation_fraction / (1 - validation_fraction))]
    task = Task(
        name="docstrings",
        kind="classification",
        label_names=tuple(packages),
        metric_names=("accuracy", "macro_f1"),
        main_metric="accuracy",
    )
    return TaskData(task, _dataset(train, seed), _dataset(validation, seed))


def standard_library_snippets(library: Path) -> Iterator[Snippet]:
    """Yield the snippets of every docstring under `library`, file by file in sorted order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        top = parts[0].removesuffix(".py")
        if top not in sys.stdlib_module_names or _SKIPPED.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a deliberately broken file
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            definition = path.stem if isinstance(node, ast.Module) else node.name
            for text in split_docstring(ast.get_docstring(node) or ""):
                yield Snippet(top.removeprefix("_py"), definition, text)


def split_docstring(docstring: str) -> list[str]:
    """Cut a docstring into snippets of a sentence or more, each one line of 5 to 40 words.

    Paragraphs are never joined. Sentences of a paragraph are, until there are 12 words. Interactive examples
    are code and are left out.
    """
    snippets = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        if ">>>" in paragraph:
            continue
        pending: list[str] = []
        sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z\"'(])", " ".join(paragraph.split()))
        for sentence in sentences:
            pending += sentence.split()
            if len(pending) >= _ENOUGH_WORDS:
                snippets.append(pending[:_MAX_WORDS])
                pending = []
        snippets.append(pending)
    return [" ".join(words) for words in snippets if len(words) >= _MIN_WORDS]


def _masked_and_unique(snippets: list[Snippet], packages: list[str]) -> list[Snippet]:
    """Mask the packages' names, then drop texts that several packages share and repetitions of one text."""
    names = re.compile(rf"\w*(?:{'|'.join(map(re.escape, packages))})\w*", re.IGNORECASE)
    first: dict[str, Snippet] = {}
    shared = set()
    for snippet in snippets:
        masked = Snippet(snippet.package, snippet.definition, names.sub(_MASK, snippet.text))
        earlier = first.setdefault(masked.text.lower(), masked)
        if earlier.package != masked.package:
            shared.add(masked.text.lower())
    return [snippet for key, snippet in first.items() if key not in shared]


def _digest(seed: int, text: str) -> str:
    # Not the random module: a text that is added must not reorder all others.
    return hashlib.sha256(f"{seed} {text}".encode()).hexdigest()


def _is_held_out(seed: int, snippet: Snippet, fraction: float) -> bool:
    return int(_digest(seed, f"{snippet.package}.{snippet.definition}")[:8], 16) < fraction * 16**8


def _dataset(rows: list[tuple[str, int]], seed: int) -> Dataset:
    rows = sorted(rows, key=lambda row: _digest(seed, row[0]))
    return Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
