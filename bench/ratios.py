"""Results where many shapes matter: a line for each, and how ours stands to the dense networks across."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .results import Results, Row
from .tables import NOTHING, Line, Table, duration, half_width, notes_of, ratio, shape_name

RATIO_LEGEND = "Median of ours, ± half the distance of the 10th and 90th percentile, and ratios of medians"
_VARY = ("T", "sequence", "text", "tokenizer", "real")
_TITLES = {"bert-base": "BERT-base", "minilm": "MiniLM"}


def ratio_tables(results: Results) -> Iterator[Table]:
    """One table per dtype, shape and mode with a line per batch; none where no dense network was timed.

    For every pass: the median of ours, of a model also its throughput; dense / ours, how many times as fast
    ours is as the network it replaces; ours / bound, how far it is from one expert's work alone; ours / tied,
    how many times as fast it is where experts' shared neurons are stored once.
    """
    ours = next((row.entry for row in results.rows), None)
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in networks(results.rows, ours):
        fixed = tuple(item for item in row.case.items() if item[0] not in _VARY)
        groups.setdefault((fixed, row.launch, row.cache), []).append(row)
    for rows in groups.values():
        if any(row.work == "dense" and row.seconds for row in rows):
            yield _table(rows)


def networks(rows: Iterable[Row], ours: str | None) -> Iterator[Row]:
    """Ours, and the networks it is measured by; not those who compute the same otherwise."""
    return (row for row in rows if row.entry == ours or row.work != "experts")


def _table(rows: list[Row]) -> Table:
    ours = rows[0].entry
    others = {row.entry: row.work for row in rows if row.entry != ours and row.seconds}
    passes = list(dict.fromkeys(row.pass_ for row in rows))
    cells = {(_label(row.case), row.pass_, row.entry): row for row in rows}
    columns: list[str] = []
    for pass_ in passes:
        columns += [pass_, *(["sequences/s"] if "sequence" in rows[0].case else [])]
        columns += [_heading(entry, work) for entry, work in others.items()]
    lines = []
    for label in dict.fromkeys(_label(row.case) for row in rows):
        line: list[str] = []
        for pass_ in passes:
            mine = cells.get((label, pass_, ours))
            line += _times(mine, rows[0].case)
            for entry, work in others.items():
                other = cells.get((label, pass_, entry))
                line.append(ratio(mine, other) if work in ("bound", "tied") else ratio(other, mine))
        lines.append(Line(label, tuple(line)))
    return Table(_title(rows[0]), tuple(columns), tuple(lines), (*notes_of(rows), *_texts(rows)))


def _heading(entry: str, work: str) -> str:
    if work in ("bound", "tied"):
        return f"ours / {work}"
    return f"{'dense' if work == 'dense' else entry} / ours"


def _label(case: dict[str, Any]) -> str:
    if "sequence" not in case:
        return f"T={case['T']}"
    batch = f"{max(1, case['T'] // case['sequence'])}×{case['sequence']}"
    if not case.get("text"):
        return batch
    return f"text, {batch}, {1 - case['real'] / case['T']:.0%} padding"


def _times(row: Row | None, case: dict[str, Any]) -> list[str]:
    if row is None or row.seconds is None:
        return [NOTHING] * (2 if "sequence" in case else 1)
    time = f"{duration(row.seconds.median)} ±{half_width(row.seconds):.0%}"
    if "sequence" not in case:
        return [time]
    batch = max(1, row.case["T"] // row.case["sequence"])
    return [time, f"{batch / row.seconds.median:.3g}"]


def _title(row: Row) -> str:
    shape = shape_name(row.case)
    sizes = ", ".join(f"{name}={row.case[name]}" for name in ("D", "F", "E") if name in row.case)
    parts = [_TITLES[shape] if shape else sizes, row.case.get("dtype"), row.case.get("routing")]
    parts += ["with LayerNorm" if row.case.get("norm") else None, row.launch, row.cache]
    return ", ".join(str(part) for part in parts if part)


def _texts(rows: list[Row]) -> Iterator[str]:
    """Where padded batches are from."""
    found = {(row.case["text"], row.case["tokenizer"]) for row in rows if row.case.get("text")}
    for text, tokenizer in sorted(found):
        yield f"text: {text}, by {tokenizer}, the batch of median length"
