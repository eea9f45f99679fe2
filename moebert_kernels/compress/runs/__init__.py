"""From a teacher and rows to a student and its figures: `compress` whole, with its settings, its stages, what
it is compared with; or one stage at a time.
"""

from typing import TYPE_CHECKING

from moebert_kernels.lazy import exports

if TYPE_CHECKING:
    from moebert_kernels.compress.runs.pipeline import compress as compress
    from moebert_kernels.compress.runs.pipeline import stage_names as stage_names
    from moebert_kernels.compress.runs.settings import CompressSettings as CompressSettings
    from moebert_kernels.compress.runs.stage_by_stage import distill_student as distill_student
    from moebert_kernels.compress.runs.stage_by_stage import evaluate_model as evaluate_model
    from moebert_kernels.compress.runs.stage_by_stage import score_teacher as score_teacher
    from moebert_kernels.compress.runs.stage_by_stage import split_teacher as split_teacher

__all__, __getattr__ = exports(
    __name__,
    {
        "pipeline": ["compress", "stage_names"],
        "settings": ["CompressSettings"],
        "stage_by_stage": ["distill_student", "evaluate_model", "score_teacher", "split_teacher"],
    },
)
