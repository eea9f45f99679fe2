"""The ONNX graph of an exported model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from moebert_kernels import __version__
from moebert_kernels.errors import UserError
from moebert_kernels.export.heads import ExportedModel
from moebert_kernels.export.operator import translation_table

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18  # the newest that ONNX Runtime 1.14 and OpenVINO know, and what the exporter writes itself
MOST_BYTES = 2**31 - 2**24  # of a file; a little is left for the graph itself


def require_packages() -> None:
    """Raise a UserError unless the packages that write and run graphs are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"export needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed: "
            "pip install 'moebert-kernels[export]'"
        )


def write_graph(model: ExportedModel, path: Path) -> None:
    """Write a model's graph, batch and length dynamic; weights go beside it where they are over 2 GiB.

    Args:
        model: in eval mode.
        path: of the .onnx file, in a folder that exists.
    """
    import onnx_ir

    batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    # Each a tensor of its own: of one that is given twice, the exporter makes one input.
    example = tuple(torch.ones(2, 7, dtype=torch.long) for _ in model.input_names)
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            model,
            example,
            dynamo=True,
            dynamic_shapes=tuple({0: batch, 1: length} for _ in example),
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            input_names=model.input_names,
            output_names=model.output_names,
            optimize=True,
            verbose=False,
        )
    content = program.model
    _tidy(content)
    # Tools look for weights beside the graph under this name.
    outside = f"{path.name}_data" if _num_bytes(content) > MOST_BYTES else None
    onnx_ir.save(content, path, external_data=outside)


def _tidy(content: Any) -> None:
    """Take off what the exporter notes of the source code, its paths among it, and what is not ONNX."""
    content.producer_name, content.producer_version = "moebert-kernels", __version__
    content.metadata_props.clear()
    content.graph.metadata_props.clear()
    for node in content.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
        if node.op_type == "Split" and len(node.inputs) == 2:
            node.attributes.pop("num_outputs", None)


def _num_bytes(content: Any) -> int:
    return sum(value.const_value.nbytes for value in content.graph.initializers.values())


@contextlib.contextmanager
def _quiet():
    """Without the exporter's progress and its warnings about packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
