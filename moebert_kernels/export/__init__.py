"""Encoders for serving tools: one ONNX graph of standard operators, no padding inside, int8 beside it.

The folder that `export` writes is taken as it is by ONNX Runtime, OpenVINO, text-embeddings-inference,
sentence-transformers, optimum and transformers.js; none of them needs this package. Writing one needs
`pip install 'moebert-kernels[export]'`.

Example:
    >>> import moebert_kernels
    >>> moebert_kernels.export("runs/sst2/student", "served", quantize="int8")
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports, make_callable

if TYPE_CHECKING:
    from moebert_kernels.export.exporting import export as export

__all__, __getattr__ = exports(__name__, {"exporting": ["export"]})
make_callable(__name__, "exporting")
