"""int8: a second graph whose large products are of 8 bits, by ONNX Runtime's own quantizer.

Weights are of 8 bits, scaled by channel; activations are quantized when the graph runs, each product's by its
own range: no data is needed beforehand, and each expert's tokens have a range of their own. Layers that cost
too much are left in 32 bits, chosen by measurement on text.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moebert_kernels.export.check import Checker, Likeness

_LAYER = re.compile(r"encoder\.(attentions|ffns)\.(\d+)\.")
_NAMES = {"attentions": "attention", "ffns": "feed-forward"}
_VOCABULARY = "vocabulary head"
_WIDE = 4096  # outputs of a head whose product is worth its bits: a vocabulary's


def large_products(graph: Path) -> dict[str, list[str]]:
    """The nodes to quantize, by the half of a layer they belong to: products with a matrix of the encoder's.

    Heads of a few labels are next to nothing of the work and stay as they are; that of a vocabulary is not.
    """
    import onnx

    content: Any = onnx.load(graph, load_external_data=False).graph
    shape_of = {tensor.name: tuple(tensor.dims) for tensor in content.initializer}
    found: dict[str, list[str]] = {}
    for node in content.node:
        if node.op_type != "MatMul" or len(shape_of.get(node.input[1], ())) != 2:
            continue
        layer = _LAYER.match(node.input[1])
        if layer is not None and ".gate." not in node.input[1]:
            found.setdefault(f"{_NAMES[layer[1]]} of layer {int(layer[2]) + 1}", []).append(node.name)
        elif layer is None and shape_of[node.input[1]][1] >= _WIDE:
            found.setdefault(_VOCABULARY, []).append(node.name)
    return found


def quantize_products(graph: Path, target: Path, nodes: Sequence[str]) -> None:
    """Write a graph with these nodes in int8: dynamic, per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    outside = graph.with_name(f"{graph.name}_data").exists()
    with _quiet(), tempfile.TemporaryDirectory(dir=target.parent) as room:
        written = Path(room) / target.name
        quantize_dynamic(
            graph,
            written if outside else target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(nodes),
            use_external_data_format=outside,
            extra_options={"MatMulConstBOnly": True},
        )
        if outside:  # under the name that tools look for, which the quantizer's is not
            for path in (target, target.with_name(f"{target.name}_data")):
                path.unlink(missing_ok=True)  # of an earlier trial, and it would be added to
            onnx.save(onnx.load(written), target, save_as_external_data=True, location=f"{target.name}_data")


def quantize(
    graph: Path,
    target: Path,
    checker: Checker,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Likeness, tuple[str, ...]]:
    """Write an int8 graph that is as alike to the model as `check.LEAST` asks for.

    If the whole encoder in int8 is not, each half of a layer is tried alone, and those that cost most are
    kept in 32 bits, one after the other, until what is left is; the cheapest stays in int8 in any case.

    Args:
        graph: of 32 bits.
        target: the .onnx file to write.
        checker: measures on text how alike a graph is to PyTorch.
        say: is told what was kept, and why.

    Returns:
        How alike the graph written is, and what was kept in 32 bits.
    """
    products = large_products(graph)
    everything = [name for names in products.values() for name in names]
    quantize_products(graph, target, everything)
    found = checker.measure(target)
    if found.is_enough or len(products) < 2:
        return found, ()
    say(f"int8 throughout: {found}; finding the layers that cost most")
    alone: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=target.parent) as room:
        for part, names in products.items():
            trial = Path(room) / "trial.onnx"
            quantize_products(graph, trial, names)
            alone[part] = checker.measure(trial).alike
    kept: list[str] = []
    for part in sorted(products, key=alone.__getitem__)[:-1]:
        if found.is_enough:
            break
        kept.append(part)
        quantize_products(
            graph, target, [name for other in products if other not in kept for name in products[other]]
        )
        found = checker.measure(target)
    say(f"kept in 32 bits: {', '.join(kept)}")
    return found, tuple(kept)


@contextmanager
def _quiet():
    """Without advice to preprocess the graph, which its exporter has done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
