"""From a fine-tuned encoder to its MoE: data, importance, adaptation, fitting, distillation, report.

Example:
    >>> from moebert_kernels import CompressSettings, compress, load_texts
    >>> compress(CompressSettings(distill=False), load_texts("sentences.txt"), "teacher", "runs/mine")
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports, make_callable

if TYPE_CHECKING:
    from moebert_kernels.compress.runs.pipeline import compress as compress

__all__, __getattr__ = exports(__name__, {"runs.pipeline": ["compress"]})
make_callable(__name__, "runs.pipeline")
