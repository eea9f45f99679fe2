"""Plots of a result file: time against the number of tokens, and every figure under the roofline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .results import Results, Row
from .tables import Group, grouped


class NotDrawn(ValueError):  # noqa: N818 - the figures are there all the same
    """Why there is no picture."""


def plot(results: Results, path: str | Path) -> Path:
    """Draw the passes side by side: time above, roofline below. The format is the path's ending.

    Of the launch modes and cache states one each is drawn: graphs and cold caches where there are any.

    Raises:
        NotDrawn: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise NotDrawn("matplotlib is not installed")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _drawn(results)
    figure = Figure(figsize=(5.2 * max(1, len(groups)), 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, max(1, len(groups)), squeeze=False)
    for column, (group, rows) in enumerate(groups.items()):
        _time_against_tokens(axes[0][column], group, rows)
        _roofline(axes[1][column], results, rows)
    figure.suptitle(_where(results))
    if groups:
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _drawn(results: Results) -> dict[Group, list[Row]]:
    groups = grouped(results)
    launch = "graph" if any(group.launch == "graph" for group in groups) else "eager"
    cache = "cold" if any(group.cache == "cold" for group in groups) else "warm"
    first_routing = next((row.case.get("routing") for row in results.rows), None)
    return {
        group: rows
        for group, rows in groups.items()
        if (group.launch, group.cache) == (launch, cache) and dict(group.case).get("routing") == first_routing
    }


def _where(results: Results) -> str:
    run = results.run
    device = run.environment.get("cpu") if run.device_type == "cpu" else run.device
    threads = f", {run.threads} threads" if run.device_type == "cpu" else ""
    return f"{run.op}: {device}{threads}, commit {run.environment.get('commit')}"


def _timed_by_entry(rows: list[Row]) -> dict[str, list[Row]]:
    by_entry: dict[str, list[Row]] = {}
    for row in rows:
        if row.seconds is not None:
            by_entry.setdefault(row.entry, []).append(row)
    return by_entry


def _style(index: int) -> dict[str, Any]:
    if index == 0:
        return {"color": "black", "linewidth": 2.4, "marker": "o", "zorder": 3}
    return {"color": f"C{index % 10}", "linewidth": 1.2, "marker": "osD^vP*X"[index % 8], "markersize": 4}


def _time_against_tokens(axes: Any, group: Group, rows: list[Row]) -> None:
    order = list(dict.fromkeys(row.entry for row in rows))
    for entry, mine in _timed_by_entry(rows).items():
        times = [row.seconds for row in mine if row.seconds is not None]
        style = _style(order.index(entry))
        tokens = [row.case["T"] for row in mine]
        axes.plot(tokens, [time.median for time in times], label=entry, **style)
        axes.fill_between(
            tokens,
            [time.low for time in times],
            [time.high for time in times],
            color=style["color"],
            alpha=0.15,
        )
    ours = [row for row in rows if row.entry == order[0]]
    axes.plot(
        [row.case["T"] for row in ours], [row.floor_s for row in ours], "k--", linewidth=1, label="roofline"
    )
    axes.set(title=group.title(), xlabel="tokens", ylabel="seconds", xscale="log", yscale="log")
    counts = sorted({row.case["T"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)


def _roofline(axes: Any, results: Results, rows: list[Row]) -> None:
    timed = [row for row in rows if row.seconds is not None and row.flops and row.bytes]
    axes.set(xlabel="operations per byte", ylabel="operations per second", xscale="log", yscale="log")
    axes.grid(True, which="major", alpha=0.3)
    if not timed:
        axes.text(0.5, 0.5, "no arithmetic to speak of", ha="center", transform=axes.transAxes)
        return
    ceiling = results.run.ceilings[timed[0].case.get("dtype", "float32")]
    ridge = ceiling.flops_per_s / ceiling.bytes_per_s
    intensities = [row.flops / row.bytes for row in timed]
    reach = [min(*intensities, ridge) / 2, ridge, max(*intensities, ridge) * 2]
    axes.plot(reach, [min(ceiling.flops_per_s, x * ceiling.bytes_per_s) for x in reach], "k--", linewidth=1)
    order = list(dict.fromkeys(row.entry for row in rows))
    for row, intensity in zip(timed, intensities, strict=True):
        style = _style(order.index(row.entry))
        speed = row.flops / row.seconds.median if row.seconds else 0.0
        axes.plot([intensity], [speed], color=style["color"], marker=style["marker"])
