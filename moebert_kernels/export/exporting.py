"""`export`: a model as a folder that serving tools take as it is."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moebert_kernels.compress.data.docstrings import standard_library_snippets
from moebert_kernels.compress.data.tasks import TaskData
from moebert_kernels.compress.storage.artifacts import replace_whole
from moebert_kernels.compress.storage.loading import check_new_folder
from moebert_kernels.errors import ArgumentError, naming
from moebert_kernels.export.check import Checker, Likeness
from moebert_kernels.export.folder import GRAPH, QUANTIZED, open_source, write_beside
from moebert_kernels.export.graph import require_packages, write_graph
from moebert_kernels.export.heads import ExportedModel
from moebert_kernels.export.quantize import large_products, quantize_products
from moebert_kernels.export.quantize import quantize as quantize_measured

QUANTIZATIONS = ("int8",)
NUM_TEXTS = 256  # of the standard library, where a graph is measured and nobody gives any


@dataclass(frozen=True)
class Exported:
    """What `export` has written.

    Attributes:
        folder: with all of it.
        graphs: by file, how alike each is to PyTorch; those that were measured.
        kept: parts of the int8 graph left in 32 bits.
    """

    folder: Path
    graphs: dict[str, Likeness] = field(default_factory=dict)
    kept: tuple[str, ...] = ()

    @property
    def files(self) -> list[str]:
        """The graphs in `folder`, by path from it."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*.onnx"))


def export(
    model: Any,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str | None = None,
    check: bool | Sequence[str] | TaskData | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a model as an ONNX folder for serving tools; see the package's docstring.

    Args:
        model: a model of one of our families, with experts or dense, with one of the heads in
            `families.HEADS` or none; a `SentenceEncoder`; or the folder of one, as transformers or
            sentence_transformers saves it. It stays as it is.
        output_dir: new or empty; written whole or not at all.
        tokenizer: to be written beside the graph; by default the folder's own.
        quantize: "int8" writes a second graph whose large products are of 8 bits.
        check: run the graphs beside PyTorch on texts, or on a task's validation rows; True for sentences of
            the standard library. int8 is measured on the same.
        say: is told what came of it, a line at a time.

    Raises:
        UserError: packages are missing, the model is none that can be exported, or the folder is not empty.
    """
    output = Path(output_dir)
    require_packages()
    if quantize not in (None, *QUANTIZATIONS):
        raise ArgumentError("quantize", f"must be {' or '.join(QUANTIZATIONS)} or None, got {quantize!r}")
    with naming("output_dir"):
        check_new_folder(output)
    source = open_source(model, tokenizer)
    asked = check is not None and check is not False
    checker = None
    if asked or (quantize and source.tokenizer is not None):
        texts = check if asked and check is not True else _standard_texts()
        checker = Checker(source, texts)  # type: ignore[arg-type]
    pool = None if source.sentences is None else source.sentences.pool
    exported = ExportedModel(source.model, pool=pool, token_types=source.takes_token_types).eval()
    found: dict[str, Likeness] = {}
    kept: tuple[str, ...] = ()
    with replace_whole(output) as fresh:
        graph, small = fresh / GRAPH, fresh / QUANTIZED
        graph.parent.mkdir(parents=True)
        write_beside(source, fresh)
        write_graph(exported, graph)
        if checker is not None and asked:
            if checker.scores:
                say(f"PyTorch: {', '.join(f'{name} {value:.4f}' for name, value in checker.scores.items())}")
            found[GRAPH.name] = checker.check(graph)
            say(f"{GRAPH.name} beside PyTorch: {found[GRAPH.name]}")
        if quantize and checker is None:
            quantize_products(
                graph, small, [name for names in large_products(graph).values() for name in names]
            )
        elif quantize:
            assert checker is not None
            measured, kept = quantize_measured(graph, small, checker, say=say)
            found[QUANTIZED.name] = checker.check(small) if asked else measured
            say(f"{QUANTIZED.name} beside PyTorch: {found[QUANTIZED.name]}")
    return Exported(output, found, kept)


def _standard_texts() -> Sequence[str]:
    """Sentences of the standard library's docstrings, spread over it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = sorted({snippet.text for snippet in standard_library_snippets(library)})
    if not texts:
        raise ArgumentError(
            "check", "must be texts: this Python was installed without the sources that have some"
        )
    return texts[:: max(1, len(texts) // NUM_TEXTS)][:NUM_TEXTS]
