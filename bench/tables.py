"""Results as tables: one per pass, routing, dtype, launch and cache, entries down, token counts across."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from moebert_kernels.timing import Spread

from .cases import DTYPES, SHAPES
from .results import Results, Row
from .verify import LIMITS

NOTHING = "–"


@dataclass(frozen=True)
class Group:
    """What the rows of one table have in common: everything but the entry and the token count."""

    pass_: str
    launch: str
    cache: str
    case: tuple[tuple[str, object], ...]

    def title(self) -> str:
        """In words, without the sizes that every table of a file shares."""
        case = dict(self.case)
        parts = [self.pass_, *(str(case[name]) for name in ("dtype", "routing") if name in case)]
        parts += ["with LayerNorm"] if case.get("norm") else []
        parts += [shape] if (shape := shape_name(case)) not in (None, "bert-base") else []
        parts += [f"sequences of {case['sequence']}"] if "sequence" in case else []
        parts += [f"padded, {case['text']}"] if case.get("text") else []
        return ", ".join([*parts, f"{self.launch}, {self.cache}"])


def shape_name(case: dict[str, Any]) -> str | None:
    """Which of `SHAPES` a case has, if any."""
    for name, sizes in SHAPES.items():
        if "E" not in case:  # one dense network, as wide as all experts together
            sizes = sizes | {"F": sizes["E"] * sizes["F"]}
        if "F" in case and all(case.get(size, value) == value for size, value in sizes.items()):
            return name
    return None


@dataclass(frozen=True)
class Line:
    """One line: a name and a cell for each column. Strong lines are ours."""

    name: str
    cells: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table ready to be drawn."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def group_of(row: Row) -> Group:
    """The table a row belongs to."""
    case = tuple((name, value) for name, value in row.case.items() if name != "T")
    return Group(row.pass_, row.launch, row.cache, case)


def grouped(results: Results) -> dict[Group, list[Row]]:
    """Rows by table, in the order they were measured."""
    groups: dict[Group, list[Row]] = {}
    for row in results.rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def telling(results: Results, asked: Collection[str] = ()) -> dict[Group, list[Row]]:
    """Enough for a reader: of the tables the first routing's; graphs and cold caches where there are any.

    Args:
        results: of one run.
        asked: which of "routing", "launch" and "cache" were chosen by name: all of those are told.
    """
    groups = grouped(results)
    launches, caches = {group.launch for group in groups}, {group.cache for group in groups}
    told: dict[str, object] = {
        "launch": "graph" if "graph" in launches else "eager",
        "cache": "cold" if "cold" in caches else "warm",
        "routing": next((row.case.get("routing") for row in results.rows), None),
    }

    def is_told(group: Group) -> bool:
        found = {"launch": group.launch, "cache": group.cache, "routing": dict(group.case).get("routing")}
        return all(name in asked or found[name] == told[name] for name in told)

    return {group: rows for group, rows in groups.items() if is_told(group)}


def tables(results: Results, baselines: tuple[str, ...]) -> Iterator[Table]:
    """One table per group; the first entry is ours and is set in ratio to `baselines`."""
    for group, rows in grouped(results).items():
        yield table(group.title(), rows, baselines)


def table(title: str, rows: list[Row], baselines: tuple[str, ...]) -> Table:
    """Arrange the rows of one group."""
    tokens = list(dict.fromkeys(row.case["T"] for row in rows))
    entries = list(dict.fromkeys(row.entry for row in rows))
    cells = {(row.entry, row.case["T"]): row for row in rows}
    ours = entries[0]
    lines = [
        Line(
            _name(entry, rows),
            tuple(_cell(cells.get((entry, count))) for count in tokens),
            strong=entry == ours,
        )
        for entry in entries
        if any(row.seconds for row in rows if row.entry == entry)
    ]
    for baseline in baselines:
        ratios = [ratio(cells.get((baseline, count)), cells.get((ours, count))) for count in tokens]
        if any(ratio != NOTHING for ratio in ratios):
            lines.append(Line(f"{baseline} / {ours}", tuple(ratios)))
    return Table(title, tuple(f"T={count}" for count in tokens), tuple(lines), tuple(notes_of(rows)))


def _name(entry: str, rows: list[Row]) -> str:
    mine = [row for row in rows if row.entry == entry]
    inside = mine[0].dispatch == "inside" and not mine[0].pass_.startswith("dispatch")
    return entry + (" †" if inside else "") + (" ≈" if any(map(_imprecise, mine)) else "")


def _imprecise(row: Row) -> dict[str, float]:
    dtype = DTYPES.get(row.case.get("dtype", "float32"))
    limit = LIMITS[dtype][0] if dtype is not None else 0.0
    return {name: error for name, error in row.errors.items() if name.startswith("d") and error > limit}


def _cell(row: Row | None) -> str:
    if row is None or row.seconds is None:
        return NOTHING
    share = row.floor_s / row.seconds.median
    return f"{duration(row.seconds.median)} ±{half_width(row.seconds):.0%} ({share:.0%})"


def half_width(seconds: Spread) -> float:
    """Half the distance of the deciles, relative to the median."""
    return (seconds.high - seconds.low) / 2 / seconds.median


def ratio(numerator: Row | None, denominator: Row | None) -> str:
    """Of the medians; a dash where one is missing."""
    if numerator is None or denominator is None or not (numerator.seconds and denominator.seconds):
        return NOTHING
    return f"{numerator.seconds.median / denominator.seconds.median:.2f}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def notes_of(rows: list[Row]) -> Iterator[str]:
    """What did not run and why, and what the marks mean."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.did_not_run:
            reasons.setdefault((row.entry, row.did_not_run), []).append(row.case["T"])
    everywhere = len({row.case["T"] for row in rows})
    for (entry, reason), tokens in reasons.items():
        at = "" if len(tokens) == everywhere else f" at T={', '.join(map(str, tokens))}"
        yield f"{entry} did not run{at}: {reason}"
    if any(row.dispatch == "inside" and not row.pass_.startswith("dispatch") for row in rows):
        yield "† sorts its tokens in every pass: its dispatch cannot be taken out"
    for entry in dict.fromkeys(row.entry for row in rows):
        found = [item for row in rows if row.entry == entry for item in _imprecise(row).items()]
        if found:
            names, errors = zip(*found, strict=True)
            yield f"≈ {entry}: {', '.join(dict.fromkeys(names))} off by up to {max(errors):.1%} (rms)"


LEGEND = (
    "Median, ± half the distance of the 10th and 90th percentile; in brackets the share of the roofline, by "
    "the ceilings measured in the same run"
)


def plain_text(content: Table) -> str:
    """For terminals and logs: columns below each other, no figure wrapped or cut short."""
    rows = [("", *content.columns), *((line.name, *line.cells) for line in content.lines)]
    names, *columns = ([row[index] for row in rows] for index in range(len(rows[0])))
    aligned = [_aligned(names, str.ljust), *(_aligned(column, str.rjust) for column in columns)]
    head, *body = ("   ".join(cells).rstrip() for cells in zip(*aligned, strict=True))
    return "\n".join([content.title, head, "─" * len(head), *body, *content.notes])


def _aligned(cells: list[str], justify: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, cells))
    return [justify(cell, width) for cell in cells]


def markdown(content: Table) -> str:
    """For a README."""
    head = f"| {content.title} | {' | '.join(content.columns)} |"
    rule = "|---|" + "--:|" * len(content.columns)
    body = []
    for line in content.lines:
        cells = (
            [f"**{cell}**" for cell in (line.name, *line.cells)] if line.strong else [line.name, *line.cells]
        )
        body.append(f"| {' | '.join(cells)} |")
    notes = [f"- {note}" for note in content.notes]
    return "\n".join([head, rule, *body, *(["", *notes] if notes else [])])
