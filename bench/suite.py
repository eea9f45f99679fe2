"""The four benchmarks, and what it is to run them: tables in the terminal, files and plots in a folder."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from moebert_kernels.environment import BUSY

from .dispatch import DISPATCH
from .ffn import FFN
from .importance import IMPORTANCE
from .model import MODEL
from .plot import NotDrawn, plot
from .ratios import ratio_tables
from .registry import Op
from .results import Results, Row, slug, write
from .run import Settings, start
from .tables import LEGEND, group_of, grouped, plain_text, tables, telling

# The longest last: what a time limit cuts off is then the end of one table, not a whole one.
OPS: dict[str, Op] = {op.name: op for op in (DISPATCH, IMPORTANCE, MODEL, FFN)}


def _print(text: str) -> None:
    print(text, flush=True)


def run_benchmarks(
    names: Sequence[str],
    settings: Settings,
    out: str | Path | None = None,
    say: Callable[[str], None] = _print,
) -> list[Results]:
    """Run benchmarks one after the other.

    Args:
        names: of `OPS`.
        settings: of all of them.
        out: folder for a result file and a plot of each; None to print only.
        say: what becomes of tables and of sentences about the run.

    Raises:
        ValueError: a name, or something in the settings, does not exist; a package that a benchmark needs is
            not installed.
    """
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise ValueError(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(OPS)}")
    for name in names:
        missing = [package for package in OPS[name].needs if importlib.util.find_spec(package) is None]
        if missing:
            raise ValueError(f"the benchmark {name} needs packages not installed here: {', '.join(missing)}")
    begin, done = time.monotonic(), []
    for name in names:
        left = None if settings.limit is None else settings.limit - (time.monotonic() - begin)
        done.append(_run(OPS[name], _applicable(OPS[name], replace(settings, limit=left)), out, say))
    return done


def _applicable(op: Op, settings: Settings) -> Settings:
    """Passes that only other benchmarks have are left out; if none is left, this one's own are timed."""
    if settings.passes is None:
        return settings
    return replace(settings, passes=tuple(name for name in settings.passes if name in op.passes) or None)


def _show_progress(words: str) -> None:
    """On stderr, in one line that the next one replaces; a log needs none."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{words}", end="", file=sys.stderr, flush=True)


def _run(op: Op, settings: Settings, out: str | Path | None, say: Callable[[str], None]) -> Results:
    _show_progress(f"{op.name}: measuring the machine's ceilings")
    run, rows = start(op, settings)
    _show_progress("")
    for dtype, ceiling in run.ceilings.items():
        say(
            f"{op.name}, {dtype}: at most {ceiling.flops_per_s / 1e9:.4g} GFLOP/s, "
            f"{ceiling.bytes_per_s / 1e9:.4g} GB/s on this machine"
        )
    if (run.busy_cpus or 0) > BUSY:
        say(f"Other work keeps {run.busy_cpus:.1f} processors busy: it will distort the figures.")
    kept: list[Row] = []

    def watched() -> Iterator[Row]:
        for row in rows:
            kept.append(row)
            _show_progress(f"{op.name}: T={row.case['T']}, {group_of(row).title()}: {row.entry}")
            yield row

    if out is None:
        for _ in watched():
            pass
    else:
        write(out, run, watched())
    _show_progress("")
    results = Results(run, tuple(kept))
    groups = telling(results, _asked(settings))
    told = Results(run, tuple(row for rows in groups.values() for row in rows))
    for table in (*tables(told, op.baselines), *ratio_tables(told)):
        say(f"\n{plain_text(table)}")
    say(f"\n{LEGEND}")
    untold = len(grouped(results)) - len(groups)
    if untold:
        say(f"{untold} more such tables, not printed: name what to see by --launch and --cache")
    if out is not None:
        path = Path(out) / f"{slug(run)}.svg"
        drawn = f"and {path.name} written"
        try:
            plot(results, path)
        except NotDrawn as error:
            drawn = f"written; no plot: {error}"
        say(f"{path.with_suffix('.jsonl')}, with all figures, {drawn}")
    return results


def _asked(settings: Settings) -> set[str]:
    """What of a table's kind was chosen by name."""
    chosen = {
        "routing": settings.request.routings,
        "launch": settings.launches,
        "cache": settings.caches,
    }
    return {name for name, choice in chosen.items() if choice}
