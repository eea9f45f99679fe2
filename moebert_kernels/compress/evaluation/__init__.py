"""How good a model is by its task's metrics, how alike two are in what they say, how fast one is, and which
experts its tokens go to.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.evaluation.likeness import embedding_likeness as embedding_likeness
    from moebert_kernels.compress.evaluation.likeness import prediction_likeness as prediction_likeness
    from moebert_kernels.compress.evaluation.quality import batches as batches
    from moebert_kernels.compress.evaluation.quality import evaluate as evaluate
    from moebert_kernels.compress.evaluation.quality import expert_load as expert_load
    from moebert_kernels.compress.evaluation.quality import predict as predict
    from moebert_kernels.compress.evaluation.speed import Speed as Speed
    from moebert_kernels.compress.evaluation.speed import measure as measure

__all__, __getattr__ = exports(
    __name__,
    {
        "quality": ["batches", "evaluate", "expert_load", "predict"],
        "likeness": ["embedding_likeness", "prediction_likeness"],
        "speed": ["Speed", "measure"],
    },
)
