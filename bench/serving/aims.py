"""What is aimed at in int8, and in fp32 as far as its matrix products let it: ratios of times in one run."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import Row
from .contenders import FORMS

SHORT, FULL, TEXT = ("1×16", "1×32"), ("1×128", "8×128"), ("text",)


@dataclass(frozen=True)
class Aim:
    """A bound on `rival / ours`: how many times as fast ours is.

    Attributes:
        rival: "teacher" or "narrow".
        cases: it holds for.
        least: of the ratio.
    """

    rival: str
    cases: tuple[str, ...]
    least: float


AIMS = (
    Aim("teacher", FULL, 1.5),
    Aim("teacher", TEXT, 2.5),
    Aim("teacher", SHORT, 1.0),
    Aim("narrow", SHORT, 1 / 1.15),
    Aim("narrow", FULL, 1 / 1.05),
    Aim("narrow", TEXT, 1.5),
)


@dataclass(frozen=True)
class Reached:
    """An aim in one case.

    Attributes:
        rival, case: what it is about.
        least: aimed at.
        ratios: rival / ours, by the rival's form; those that were timed.
    """

    rival: str
    case: str
    least: float
    ratios: dict[str, float]


def reached(rows: list[Row], runtime: str, precision: str) -> list[Reached]:
    """How near a shape's rows come, case by case; without cases in which ours or every rival has no time."""
    times = {
        (row.entry, row.case["form"], row.case["case"]): row.seconds.median
        for row in rows
        if row.seconds and (row.case["runtime"], row.case["precision"]) == (runtime, precision)
    }
    found = []
    for aim in AIMS:
        for case in aim.cases:
            ours = times.get(("ours", "unpadded", case))
            theirs = {form: times.get((aim.rival, form, case)) for form in FORMS}
            ratios = {form: seconds / ours for form, seconds in theirs.items() if ours and seconds}
            if ratios:
                found.append(Reached(aim.rival, case, aim.least, ratios))
    return found
