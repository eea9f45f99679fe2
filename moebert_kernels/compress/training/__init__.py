"""Teachers are fine-tuned, students distilled from every layer of theirs (Eq. 5 to 7): resumed where it was
broken off, on one device or several, with the weights kept that are nearest to the teacher.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.training.distillation import Distilled, DistillSettings, distill
    from moebert_kernels.compress.training.finetuning import finetune
    from moebert_kernels.compress.training.trainer import DistillationTrainer

__all__ = ["DistillSettings", "DistillationTrainer", "Distilled", "distill", "finetune"]

__getattr__ = getter(
    __name__,
    {
        "distillation": ["DistillSettings", "Distilled", "distill"],
        "finetuning": ["finetune"],
        "trainer": ["DistillationTrainer"],
    },
)
