"""From a teacher and rows to a student and its figures: `compress` whole, with its settings, its stages, what
it is compared with; or one stage at a time.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import getter

if TYPE_CHECKING:
    from moebert_kernels.compress.runs.pipeline import compress, stage_names
    from moebert_kernels.compress.runs.settings import CompressSettings
    from moebert_kernels.compress.runs.stage_by_stage import (
        distill_student,
        evaluate_model,
        score_teacher,
        split_teacher,
    )

__all__ = [
    "CompressSettings",
    "compress",
    "distill_student",
    "evaluate_model",
    "score_teacher",
    "split_teacher",
    "stage_names",
]

__getattr__ = getter(
    __name__,
    {
        "pipeline": ["compress", "stage_names"],
        "settings": ["CompressSettings"],
        "stage_by_stage": ["distill_student", "evaluate_model", "score_teacher", "split_teacher"],
    },
)
