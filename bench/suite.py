"""The four benchmarks, and what it is to run them: tables in the terminal, files and plots in a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moebert_kernels.environment import BUSY

from .dispatch import DISPATCH
from .ffn import FFN
from .importance import IMPORTANCE
from .model import MODEL
from .plot import plot
from .ratios import ratio_tables
from .registry import Op
from .results import Results, Row, slug, write
from .run import Settings, start
from .tables import LEGEND, group_of, grouped, rich_table, tables, telling

_LOG_COLUMNS = 160
# The longest last: what a time limit cuts off is then the end of one table, not a whole one.
OPS: dict[str, Op] = {op.name: op for op in (DISPATCH, IMPORTANCE, MODEL, FFN)}


def run_benchmarks(
    names: Sequence[str], settings: Settings, out: str | Path | None = None, console: Console | None = None
) -> list[Results]:
    """Run benchmarks one after the other.

    Args:
        names: of `OPS`.
        settings: of all of them.
        out: folder for a result file and a plot of each; None to print only.
        console: where tables and progress go.

    Raises:
        ValueError: a name, or something in the settings, does not exist.
    """
    console = console or _console()
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise ValueError(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(OPS)}")
    begin, done = time.monotonic(), []
    for name in names:
        left = None if settings.limit is None else settings.limit - (time.monotonic() - begin)
        done.append(_run(OPS[name], _applicable(OPS[name], replace(settings, limit=left)), out, console))
    return done


def _applicable(op: Op, settings: Settings) -> Settings:
    """Passes that only other benchmarks have are left out; if none is left, this one's own are timed."""
    if settings.passes is None:
        return settings
    return replace(settings, passes=tuple(name for name in settings.passes if name in op.passes) or None)


def _console() -> Console:
    """A log has no width of its own: rich's 80 columns would cut figures short."""
    console = Console()
    return console if console.is_terminal else Console(width=_LOG_COLUMNS)


def _run(op: Op, settings: Settings, out: str | Path | None, console: Console) -> Results:
    with console.status(f"{op.name}: measuring the machine's ceilings"):
        run, rows = start(op, settings)
    for dtype, ceiling in run.ceilings.items():
        console.print(
            f"{op.name}, {dtype}: at most {ceiling.flops_per_s / 1e9:.4g} GFLOP/s, "
            f"{ceiling.bytes_per_s / 1e9:.4g} GB/s on this machine"
        )
    if (run.busy_cpus or 0) > BUSY:
        console.print(
            f"[yellow]Other work keeps {run.busy_cpus:.1f} processors busy: it will distort the figures."
        )
    kept: list[Row] = []
    with console.status(op.name) as status:

        def watched() -> Iterator[Row]:
            for row in rows:
                kept.append(row)
                status.update(f"{op.name}: T={row.case['T']}, {group_of(row).title()}: {row.entry}")
                yield row

        if out is None:
            for _ in watched():
                pass
        else:
            write(out, run, watched())
    results = Results(run, tuple(kept))
    groups = telling(results, _asked(settings))
    told = Results(run, tuple(row for rows in groups.values() for row in rows))
    for table in (*tables(told, op.baselines), *ratio_tables(told)):
        console.print(rich_table(table))
    console.print(LEGEND, style="dim")
    untold = len(grouped(results)) - len(groups)
    if untold:
        console.print(
            f"{untold} more such tables, not printed: name what to see by --launch and --cache", style="dim"
        )
    if out is not None:
        path = plot(results, Path(out) / f"{slug(run)}.svg")
        console.print(f"{path.with_suffix('.jsonl')}, with all figures, and {path.name} written")
    return results


def _asked(settings: Settings) -> set[str]:
    """What of a table's kind was chosen by name."""
    chosen = {
        "routing": settings.request.routings,
        "launch": settings.launches,
        "cache": settings.caches,
    }
    return {name for name, choice in chosen.items() if choice}
