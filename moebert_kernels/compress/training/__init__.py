"""Teachers are fine-tuned, students distilled from every layer of theirs (Eq. 5 to 7): resumed where it was
broken off, on one device or several, with the weights kept that are nearest to the teacher.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.training.distillation import Distilled as Distilled
    from moebert_kernels.compress.training.distillation import DistillSettings as DistillSettings
    from moebert_kernels.compress.training.distillation import distill as distill
    from moebert_kernels.compress.training.finetuning import finetune as finetune
    from moebert_kernels.compress.training.trainer import DistillationTrainer as DistillationTrainer

__all__, __getattr__ = exports(
    __name__,
    {
        "distillation": ["DistillSettings", "Distilled", "distill"],
        "finetuning": ["finetune"],
        "trainer": ["DistillationTrainer"],
    },
)
