"""The models that `compress` makes of a teacher: the student, and others of the same cost to compare."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from moebert_kernels.compress.experts.adaptation import COUNTING_ROUTINGS, narrow, random_scores
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.runs.subjects import Report, Subject
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.models import find_ffns, keep_layers, layers_of_equal_cost


class Source(Protocol):
    """What variants are made of.

    Attributes:
        settings: resolved.
        subject: the fine-tuned teacher, left as it is, and its rows.
        teacher_print: fingerprint of the teacher.
        train_print: fingerprint of the training rows.
        importance_print: fingerprint of what importance is taken from.
        student_flops: encoder FLOPs per token of the student, known once it has been evaluated.
    """

    settings: CompressSettings
    subject: Subject
    teacher_print: str
    train_print: str
    importance_print: str
    student_flops: int

    @property
    def importance(self) -> Importance:
        """Of the teacher's neurons."""

    def cut(self, scores: Importance | Tensor, settings: CompressSettings, report: Report) -> PreTrainedModel:
        """Make a MoE of the teacher; see `Subject.cut`."""


@dataclass(frozen=True)
class Variant:
    """A model to be made of the teacher, distilled and measured.

    Attributes:
        name: in results.json.
        folder: of its files, under the output folder's work/.
        is_drawn: whether chance has a part in what is made: every seed then makes another.
        build: makes it with a seed, and says how far it is.
        made_from: everything that decides what `build` makes, for json.
        kept_layers: indices of the teacher's layers that it has; None for all of them.
        can_be_fitted: whether it has the teacher's layers, one to one.
    """

    name: str
    folder: str
    is_drawn: bool
    build: Callable[[Source, int, Report], PreTrainedModel]
    made_from: Callable[[Source, int], list[Any]]
    kept_layers: Callable[[Source], list[int] | None] = lambda source: None
    can_be_fitted: bool = True


@dataclass(frozen=True)
class Trial:
    """A variant with one of the seeds.

    Attributes:
        variant: what is made.
        seed: of what is drawn in it and of its distillation.
        is_first: whether the seed is the first; its model is the one to be kept and measured.
    """

    variant: Variant
    seed: int
    is_first: bool

    @property
    def name(self) -> str:
        """Of its stages."""
        return self.variant.name if self.is_first else f"{self.variant.name} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Of its files, under the output folder's work/."""
        folder = Path(self.variant.folder)
        return folder if self.is_first else folder / f"seed-{self.seed}"

    @property
    def is_adapted(self) -> bool:
        """Whether it begins with a model of its own, and not with that of the first seed."""
        return self.is_first or self.variant.is_drawn

    def is_fitted(self, settings: CompressSettings) -> bool:
        """Whether it is fitted once it is cut."""
        return settings.fit and self.variant.can_be_fitted

    def stages(self, settings: CompressSettings) -> list[str]:
        """The names of its stages in their order."""
        made, name = [], self.name
        if self.is_adapted:
            made = [f"adapt {name}", *([f"fit {name}"] if self.is_fitted(settings) else [])]
        if not settings.distill:
            return [*made, *([f"evaluate {name}"] if made else [])]
        before = [*made, f"evaluate {name} before distillation"] if made else []
        return [*before, f"distill {name}", f"evaluate {name}"]


def trials(settings: CompressSettings) -> dict[Variant, list[Trial]]:
    """What is to be made, in order: of each variant a trial for every seed. The student comes first."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    variants = [STUDENT, *(_COMPARISONS[name] for name in dict.fromkeys(settings.comparisons))]
    return {v: [Trial(v, seed, seed == settings.seed) for seed in seeds] for v in variants}


def over_seeds(records: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """One model's record of the records of its seeds.

    Args:
        records: with "quality", metrics to values; what else they hold is the same in all.
        seeds: of the records.

    Returns:
        The record itself if there is one. Otherwise "quality" holds the means, "spread" the sample standard
        deviations, and "seeds" for each seed its "seed" and "quality".
    """
    if len(records) == 1:
        return records[0]
    values = {name: [r["quality"][name] for r in records] for name in records[0]["quality"]}
    return records[0] | {
        "quality": {name: statistics.mean(found) for name, found in values.items()},
        "spread": {name: statistics.stdev(found) for name, found in values.items()},
        "seeds": [{"seed": seed, "quality": r["quality"]} for seed, r in zip(seeds, records, strict=True)],
    }


def _split_from(source: Source, seed: int) -> list[Any]:
    """What a split depends on beside the scores."""
    s = source.settings
    counts = source.train_print if s.routing in COUNTING_ROUTINGS else None
    sizes = [s.num_experts, s.expert_size, s.num_shared, *(["tied"] if s.tie_shared else [])]
    return [source.teacher_print, *sizes, s.routing, s.top_k, seed, counts]


def _build_student(source: Source, seed: int, report: Report) -> PreTrainedModel:
    return source.cut(source.importance, replace(source.settings, seed=seed), report)


def _build_random(source: Source, seed: int, report: Report) -> PreTrainedModel:
    ffns, settings = find_ffns(source.subject.model), replace(source.settings, seed=seed)
    if settings.routing == "hash-affinity":  # neurons drawn at random suit no token better than another
        settings = replace(settings, routing="hash-random")
    scores_LF = random_scores(len(ffns), ffns[0].w1.out_features, seed=seed)
    return source.cut(scores_LF, settings, report)


def _narrow_width(source: Source) -> int:
    """As many neurons as a token meets in a layer of the student."""
    s = source.settings
    assert s.expert_size is not None  # resolved
    return min(s.top_k * s.expert_size, find_ffns(source.subject.model)[0].w1.out_features)


def _build_narrow(source: Source, seed: int, report: Report) -> PreTrainedModel:
    return narrow(source.subject.model, source.importance.scores_LF, _narrow_width(source))


def _kept_layers(source: Source) -> list[int]:
    return layers_of_equal_cost(source.subject.model, source.student_flops)


STUDENT = Variant(
    "student",
    "student",
    is_drawn=True,
    build=_build_student,
    made_from=lambda source, seed: [source.importance_print, *_split_from(source, seed)],
)
_COMPARISONS = {
    "random": Variant(
        "random split",
        "random",
        is_drawn=True,
        build=_build_random,
        made_from=_split_from,
    ),
    "narrow": Variant(
        "narrow FFN",
        "narrow",
        is_drawn=False,
        build=_build_narrow,
        made_from=lambda source, seed: [source.teacher_print, source.importance_print, _narrow_width(source)],
    ),
    "layers": Variant(
        "fewer layers",
        "layers",
        is_drawn=False,
        build=lambda source, seed, report: keep_layers(source.subject.model, _kept_layers(source)),
        made_from=lambda source, seed: [source.teacher_print, _kept_layers(source)],
        kept_layers=_kept_layers,
        can_be_fitted=False,
    ),
}
