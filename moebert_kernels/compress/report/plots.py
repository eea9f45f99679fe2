"""The report's figures: SVG that takes its colours from the page, so that it fits light, dark and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Colours no plot would use by chance; each becomes a CSS variable of the page.
_VARIABLES = {
    "ink": "#a10001",
    "muted": "#a10002",
    "grid": "#a10003",
    "paper": "#a10004",
    "teacher": "#a10005",
    "student": "#a10006",
    "random": "#a10007",
    "narrow": "#a10012",
    "layers": "#a10013",
    "term-a": "#a10008",
    "term-b": "#a10009",
    "term-c": "#a10010",
    "term-d": "#a10011",
}
_INK, _MUTED, _GRID, _PAPER = (_VARIABLES[name] for name in ("ink", "muted", "grid", "paper"))

# From the first layer to the last, through most hues; all stand out from white and from near-black.
_LAYER_COLOURS = LinearSegmentedColormap.from_list(
    "layers", ["#b8860b", "#5a9a2a", "#12998c", "#3a83d8", "#8f5fd6", "#d8458c"]
)

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "figure.facecolor": "none",
}


_COLOUR_OF = {
    "teacher": "teacher",
    "student": "student",
    "random split": "random",
    "narrow FFN": "narrow",
    "fewer layers": "layers",
}


def model_colour(name: str) -> str:
    """The CSS variable that is the colour of a row of results.json's "models"."""
    return _COLOUR_OF.get(name.removesuffix(" before distillation"), "muted")


def plot_quality_against_speed(models: Sequence[dict[str, Any]], metric: str) -> str | None:
    """A point for each model with a measured throughput; hollow before distillation. None if none has one.

    A vertical line is the spread of a model's seeds.
    """
    measured = [model for model in models if model["throughput_per_s"]]
    if not measured:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for model in measured:
            speed, quality = model["throughput_per_s"], model["quality"][metric]
            before = model["name"].endswith("before distillation")
            colour = _VARIABLES[model_colour(model["name"])]
            axes.plot([speed["low"], speed["high"]], [quality] * 2, color=colour, linewidth=1, alpha=0.5)
            if "spread" in model:
                low, high = (quality + sign * model["spread"][metric] for sign in (-1, 1))
                axes.plot([speed["median"]] * 2, [low, high], color=colour, linewidth=1, alpha=0.5)
            face = _PAPER if before else colour
            style: Any = {"linestyle": "none", "marker": "o", "markersize": 8, "markerfacecolor": face}
            axes.plot(speed["median"], quality, color=colour, label=model["name"], **style)
        axes.margins(y=0.12)
        axes.set_xlim(0, 1.05 * max(model["throughput_per_s"]["high"] for model in measured))
        sample = measured[0]["throughput_per_s"]
        axes.set_xlabel(f"sequences per second, {_batch(sample)} (right is better)")
        axes.set_ylabel(metric.replace("_", " "))
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return _svg(figure, "speed")


def plot_importance(share_curve_LQ: Sequence[Sequence[float]]) -> str:
    """Cumulative share of importance against the share of neurons, a curve per layer."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        num_layers = len(share_curve_LQ)
        for layer, curve_Q in enumerate(share_curve_LQ):
            x_Q = [100 * q / (len(curve_Q) - 1) for q in range(len(curve_Q))]
            colour = _LAYER_COLOURS(layer / max(num_layers - 1, 1))
            axes.plot(
                x_Q, [100 * y for y in curve_Q], color=colour, label=f"layer {layer + 1}", linewidth=1.8
            )
        axes.plot([0, 100], [0, 100], color=_MUTED, linestyle=":", linewidth=1.2, label="all alike")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 101)
        axes.set_xlabel("neurons, most important first (%)")
        axes.set_ylabel("share of the layer's importance (%)")
        axes.legend(loc="lower right", ncols=1 + num_layers // 9, fontsize=9)
        return _svg(figure, "importance")


def plot_expert_load(load_LE: Sequence[Sequence[float]]) -> str:
    """A bar per layer, cut into its experts' shares of the tokens; dotted lines mark even shares."""
    num_layers, num_experts = len(load_LE), len(load_LE[0])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.34 * num_layers), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=False)
        for layer, load_E in enumerate(load_LE):
            total, left = sum(load_E) or 1, 0.0
            for expert, load in enumerate(load_E):
                share = 100 * load / total
                axes.add_patch(
                    Rectangle(
                        (left, layer - 0.38),
                        share,
                        0.76,
                        facecolor=_VARIABLES["student"],
                        alpha=0.28 if expert % 2 else 0.5,
                    )
                )
                if share >= 4 and num_experts <= 16:
                    axes.text(left + share / 2, layer, f"{share:.0f}", ha="center", va="center", fontsize=9)
                left += share
        for expert in range(1, num_experts):
            axes.axvline(100 * expert / num_experts, color=_INK, linestyle=":", linewidth=1)
        axes.set_xlim(0, 100)
        axes.set_ylim(num_layers - 0.5, -0.5)
        axes.set_yticks(range(num_layers), [f"layer {layer + 1}" for layer in range(num_layers)])
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlabel(f"share of the tokens each of {num_experts} experts gets (%)")
        return _svg(figure, "load")


def plot_training_load(load: dict[str, Sequence[Sequence[Sequence[float]]]]) -> str:
    """The share of each layer's fullest expert by epoch, a curve per layer; a panel per model.

    Args:
        load: by model, the experts' shares [N][L][E] in each of N epochs.
    """
    with matplotlib.rc_context(_STYLE):
        num_rows = math.ceil(len(load) / 2)
        figure = Figure(figsize=(6.4, 0.8 + 2.6 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, min(len(load), 2), sharey=True, squeeze=False)
        panels = grid.flatten()
        for axes in panels[len(load) :]:
            axes.remove()
        for axes, (name, load_NLE) in zip(panels, load.items(), strict=False):
            epochs_N, num_layers = range(1, len(load_NLE) + 1), len(load_NLE[0])
            for layer in range(num_layers):
                fullest_N = [100 * max(load_LE[layer]) for load_LE in load_NLE]
                colour = _LAYER_COLOURS(layer / max(num_layers - 1, 1))
                style: Any = {"linewidth": 1.5, "marker": "o", "markersize": 4}
                axes.plot(epochs_N, fullest_N, color=colour, label=f"layer {layer + 1}", **style)
            even = 100 / len(load_NLE[0][0])
            axes.axhline(even, color=_MUTED, linestyle=":", linewidth=1.2, label="even")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(name)
            axes.set_xlabel("epoch")
        for axes in grid[:, 0]:
            axes.set_ylabel("tokens of the fullest expert (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=9)
        return _svg(figure, "training-load")


def plot_losses(losses: dict[str, Sequence[dict[str, float]]]) -> str | None:
    """The terms of each distilled model's loss by step, on a logarithmic scale. None if none was logged."""
    logged = {name: points for name, points in losses.items() if points}
    if not logged:
        return None
    terms = list(dict.fromkeys(key for points in logged.values() for key in points[0] if key != "step"))
    colours = [_VARIABLES[f"term-{letter}"] for letter in "abcd"]
    with matplotlib.rc_context(_STYLE):
        num_rows = math.ceil(len(logged) / 2)
        figure = Figure(figsize=(6.4, 0.6 + 2.8 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, min(len(logged), 2), sharey=True, squeeze=False)
        panels = grid.flatten()
        for axes in panels[len(logged) :]:
            axes.remove()
        for axes, (name, points) in zip(panels, logged.items(), strict=False):
            for i, term in enumerate(terms):
                drawn = [(point["step"], point[term]) for point in points if point.get(term, 0) > 0]
                colour, width = (_INK, 2.0) if term == "total" else (colours[i % 4], 1.5)
                axes.plot(
                    [s for s, _ in drawn], [v for _, v in drawn], label=term, color=colour, linewidth=width
                )
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(name)
            axes.set_xlabel("step")
        for axes in grid[:, 0]:
            axes.set_ylabel("loss")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(terms), fontsize=9)
        return _svg(figure, "losses")


def _batch(timing: dict[str, Any]) -> str:
    return f"batch {timing['batch_size']} of {timing['sequence_length']} tokens"


def _svg(figure: Figure, name: str) -> str:
    """Draw, then make it fit to stand inside a page: no XML head, no links, ids of its own, CSS colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for variable, colour in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    width_height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    if width_height:
        svg = svg.replace(width_height[0], 'aria-hidden="true" focusable="false"', 1)
    return svg
