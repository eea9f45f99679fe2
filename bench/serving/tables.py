"""Result tables of `python -m bench serve`: times, and how ours stands to its rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..results import Results, Row
from ..tables import NOTHING, Line, Table, duration, half_width
from .aims import Reached, reached
from .contenders import EXPERTS_OF, FORMS, PRECISIONS

_MAIN = ("torch", "onnxruntime")
TITLES = {"minilm": "MiniLM", "bert-base": "BERT-base", "toy": "toy"}
LEGEND = "Median of a call, ± half the distance of the 10th and 90th percentile; sequences/s in brackets"
SPEEDUP_LEGEND = "Ratios of medians; the teacher's graph as exporters write it, which computes padding"
AIMS_LEGEND = (
    "How many times as fast ours is as a rival whose graph computes padding, or does not, and what was aimed "
    "at; **bold** where that is reached"
)


def time_tables(results: Results) -> Iterator[Table]:
    """A table for each shape: contenders down, cases across."""
    for shape, rows in by_shape(results).items():
        cases = list(dict.fromkeys(row.case["case"] for row in rows))
        lines = []
        for name, mine in _by(rows, contender_name).items():
            if any(row.seconds for row in mine):
                cells = {row.case["case"]: row for row in mine}
                lines.append(Line(name, tuple(_cell(cells.get(case)) for case in cases)))
        columns = tuple(_heading(case, rows) for case in cases)
        yield Table(
            f"{TITLES.get(shape, shape)}, {results.run.threads} threads", columns, tuple(lines), _notes(rows)
        )


def aim_tables(results: Results) -> Iterator[Table]:
    """A table for each shape, runtime and precision of graphs: rivals and cases down, forms across."""
    for shape, rows in by_shape(results).items():
        runtimes = dict.fromkeys(row.case["runtime"] for row in rows if row.case["runtime"] != "torch")
        for runtime in runtimes:
            for precision in PRECISIONS:
                found = reached(rows, runtime, precision)
                if found:
                    title = f"{TITLES.get(shape, shape)}, {runtime}, {precision}"
                    yield Table(title, (*FORMS, "aim"), tuple(map(_aim_line, found)), ())


def speedup_table(results: Results) -> Table:
    """How many times as fast ours is as its teacher, whose graph computes padding: settings by cases."""
    shapes = by_shape(results)
    settings = dict.fromkeys(
        (shape, row.case["runtime"], row.case["precision"])
        for shape, rows in shapes.items()
        for row in rows
        if row.entry == "ours" and row.case["runtime"] in _MAIN
    )
    cases = list(dict.fromkeys(row.case["case"] for row in results.rows))

    def seconds(setting: tuple[str, ...], entry: str, case: str) -> float | None:
        for row in shapes[setting[0]]:
            found = (
                (row.case["shape"], row.case["runtime"], row.case["precision"]),
                row.entry,
                row.case["case"],
            )
            is_padded = entry == "ours" or row.case["runtime"] == "torch" or row.case["form"] == "padded"
            if found == (setting, entry, case) and is_padded and row.seconds:
                return row.seconds.median
        return None

    def cell(setting: tuple[str, ...], case: str) -> str:
        theirs, ours = (seconds(setting, entry, case) for entry in ("teacher", "ours"))
        return NOTHING if theirs is None or ours is None else f"{theirs / ours:.2f}"

    lines = tuple(
        Line(
            f"{TITLES.get(setting[0], setting[0])}, {setting[1]} {setting[2]}",
            tuple(cell(setting, case) for case in cases),
        )
        for setting in settings
    )
    columns = tuple(_heading(case, list(results.rows)) for case in cases)
    return Table("teacher's time / ours", columns, lines, ())


def main_tables(results: Results) -> Iterator[Table]:
    """Times in PyTorch and ONNX Runtime, and the aims in int8."""
    told = _in_runtimes(results, lambda runtime: runtime in _MAIN)
    yield from time_tables(told)
    yield from (table for table in aim_tables(told) if table.title.endswith("int8"))


def more_tables(results: Results) -> Iterator[Table]:
    """Times in the other runtimes, and all aims but those."""
    yield from time_tables(_in_runtimes(results, lambda runtime: runtime not in _MAIN))
    shown = {table.title for table in main_tables(results)}
    yield from (table for table in aim_tables(results) if table.title not in shown)


def _in_runtimes(results: Results, choose: Callable[[str], bool]) -> Results:
    return Results(results.run, tuple(row for row in results.rows if choose(row.case["runtime"])))


def by_shape(results: Results) -> dict[str, list[Row]]:
    """The rows of each shape, in their order."""
    return _by(list(results.rows), lambda row: row.case["shape"])


def contender_name(row: Row) -> str:
    """In words: model, runtime, precision and, of rivals' graphs, whether they compute padding."""
    case = row.case
    form = f", {case['form']}" if case["runtime"] != "torch" and row.entry not in EXPERTS_OF else ""
    return f"{case['runtime']} {case['precision']}: {row.entry}{form}"


def _by(rows: list[Row], key) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _heading(case: str, rows: list[Row]) -> str:
    first = next(row.case for row in rows if row.case["case"] == case)
    if not first.get("text"):
        return case
    batch = first["T"] // first["sequence"]
    return f"text, {batch}×{first['sequence']}, {1 - first['real'] / first['T']:.0%} padding"


def _cell(row: Row | None) -> str:
    if row is None or row.seconds is None:
        return NOTHING
    sequences = row.case["T"] // row.case["sequence"] / row.seconds.median
    return f"{duration(row.seconds.median)} ±{half_width(row.seconds):.0%} ({sequences:.3g}/s)"


def _notes(rows: list[Row]) -> tuple[str, ...]:
    reasons = dict.fromkeys((contender_name(row), row.did_not_run) for row in rows if row.did_not_run)
    texts = dict.fromkeys(row.case["text"] for row in rows if row.case.get("text"))
    return (
        *(f"{name} did not run: {reason}" for name, reason in reasons),
        *(f"text: {text}, the batch of median length" for text in texts),
    )


def _aim_line(found: Reached) -> Line:
    def cell(form: str) -> str:
        ratio = found.ratios.get(form)
        if ratio is None:
            return NOTHING
        return f"**{ratio:.2f}**" if ratio >= found.least else f"{ratio:.2f}"

    return Line(f"{found.rival} / ours, {found.case}", (*map(cell, FORMS), f"≥ {found.least:.2f}"))
