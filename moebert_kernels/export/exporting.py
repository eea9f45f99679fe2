"""`export`: a model as a folder that serving tools take as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moebert_kernels.compress.artifacts import replace_whole
from moebert_kernels.compress.loading import check_new_folder
from moebert_kernels.errors import ArgumentError
from moebert_kernels.export.folder import GRAPH, open_source, write_beside
from moebert_kernels.export.graph import require_packages, write_graph
from moebert_kernels.export.heads import ExportedModel

QUANTIZATIONS = ("int8",)


def export(
    model: Any,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str | None = None,
    check: Sequence[str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a model as an ONNX folder for serving tools; see the package's docstring.

    Args:
        model: a model of one of our families, with experts or dense, with one of the heads in
            `families.HEADS` or none; a `SentenceEncoder`; or the folder of one, as transformers or
            sentence_transformers saves it. It stays as it is.
        output_dir: new or empty; written whole or not at all.
        tokenizer: to be written beside the graph; by default the folder's own.
        quantize: "int8" writes a second graph with weights of 8 bits.
        check: texts on which graphs are run beside PyTorch.
        say: is told what came of it, a line at a time.

    Returns:
        `output_dir`.

    Raises:
        UserError: packages are missing, the model is none that can be exported, or the folder is not empty.
    """
    output = Path(output_dir)
    require_packages()
    if quantize not in (None, *QUANTIZATIONS):
        raise ArgumentError("quantize", f"must be {' or '.join(QUANTIZATIONS)} or None, got {quantize!r}")
    check_new_folder(output)
    source = open_source(model, tokenizer)
    pool = None if source.sentences is None else source.sentences.pool
    exported = ExportedModel(source.model, pool=pool, token_types=source.takes_token_types).eval()
    with replace_whole(output) as fresh:
        (fresh / GRAPH).parent.mkdir(parents=True)
        write_beside(source, fresh)
        write_graph(exported, fresh / GRAPH)
    return output
