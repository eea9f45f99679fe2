"""Encoders for serving tools: one ONNX graph of standard operators, no padding inside, int8 beside it.

The folder that `export` writes is taken as it is by ONNX Runtime, OpenVINO, text-embeddings-inference,
sentence-transformers, optimum and transformers.js; none of them needs this package. Writing one needs
`pip install 'moebert-kernels[export]'`.

Example:
    >>> import moebert_kernels
    >>> moebert_kernels.export("runs/sst2/student", "served", quantize="int8")
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.export.exporting import export

__all__ = ["export"]

__getattr__ = getter(__name__, {"exporting": ["export"]})


class _Package(ModuleType):
    """Called, the package does what its function of the same name does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from moebert_kernels.export.exporting import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Package
