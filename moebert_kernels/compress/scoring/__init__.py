"""What neurons and predictions are worth: importance by one backward pass a batch (Eq. 4), of neurons and of
tokens, from labels or from the teacher alone; and the losses of Eq. 5 to 7.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.scoring.importance import Importance as Importance
    from moebert_kernels.compress.scoring.importance import LossFunction as LossFunction
    from moebert_kernels.compress.scoring.importance import compute_importance as compute_importance
    from moebert_kernels.compress.scoring.losses import embedding_loss as embedding_loss
    from moebert_kernels.compress.scoring.losses import label_loss as label_loss
    from moebert_kernels.compress.scoring.losses import layer_loss as layer_loss
    from moebert_kernels.compress.scoring.losses import prediction_loss as prediction_loss
    from moebert_kernels.compress.scoring.losses import symmetric_kl as symmetric_kl
    from moebert_kernels.compress.scoring.published import convert_published as convert_published
    from moebert_kernels.compress.scoring.teacher_loss import embedding_shift_loss as embedding_shift_loss
    from moebert_kernels.compress.scoring.teacher_loss import prediction_shift_loss as prediction_shift_loss

__all__, __getattr__ = exports(
    __name__,
    {
        "importance": ["Importance", "LossFunction", "compute_importance"],
        "teacher_loss": ["embedding_shift_loss", "prediction_shift_loss"],
        "losses": ["embedding_loss", "label_loss", "layer_loss", "prediction_loss", "symmetric_kl"],
        "published": ["convert_published"],
    },
)
