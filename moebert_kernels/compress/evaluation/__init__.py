"""How good a model is by its task's metrics, how alike two are in what they say, how fast one is, and which
experts its tokens go to.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.evaluation.likeness import embedding_likeness, prediction_likeness
    from moebert_kernels.compress.evaluation.quality import batches, evaluate, expert_load, predict
    from moebert_kernels.compress.evaluation.speed import Speed, measure

__all__ = [
    "Speed",
    "batches",
    "embedding_likeness",
    "evaluate",
    "expert_load",
    "measure",
    "predict",
    "prediction_likeness",
]

__getattr__ = getter(
    __name__,
    {
        "quality": ["batches", "evaluate", "expert_load", "predict"],
        "likeness": ["embedding_likeness", "prediction_likeness"],
        "speed": ["Speed", "measure"],
    },
)
