"""What neurons and predictions are worth: importance by one backward pass a batch (Eq. 4), of neurons and of
tokens, from labels or from the teacher alone; and the losses of Eq. 5 to 7.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.scoring.importance import Importance, LossFunction, compute_importance
    from moebert_kernels.compress.scoring.losses import (
        embedding_loss,
        label_loss,
        layer_loss,
        prediction_loss,
        symmetric_kl,
    )
    from moebert_kernels.compress.scoring.published import convert_published
    from moebert_kernels.compress.scoring.teacher_loss import embedding_shift_loss, prediction_shift_loss

__all__ = [
    "Importance",
    "LossFunction",
    "compute_importance",
    "convert_published",
    "embedding_loss",
    "embedding_shift_loss",
    "label_loss",
    "layer_loss",
    "prediction_loss",
    "prediction_shift_loss",
    "symmetric_kl",
]

__getattr__ = getter(
    __name__,
    {
        "importance": ["Importance", "LossFunction", "compute_importance"],
        "teacher_loss": ["embedding_shift_loss", "prediction_shift_loss"],
        "losses": ["embedding_loss", "label_loss", "layer_loss", "prediction_loss", "symmetric_kl"],
        "published": ["convert_published"],
    },
)
