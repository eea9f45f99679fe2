"""Quality against latency, of one text and of a batch of 32: what a model costs, and what it answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ..plot import NotDrawn
from ..results import Results, Row
from .contenders import MODELS, PRECISIONS
from .quality import FILE

SHAPE, RUNTIME = "minilm", "onnxruntime"  # of the model whose quality is known
PANELS = {"1×32": "one text of 32 tokens", "text": "32 texts, padded"}
_COLOURS = {"teacher": "C7", "narrow": "C1", "ours": "C0"}
_MARKERS = {"fp32": "o", "int8": "s"}


def draw(results: Results, folder: Path, path: Path) -> Path:
    """Draw a run of `python -m bench serve`; the format is the path's ending.

    Args:
        results: of the run.
        folder: holds what `measure_quality` wrote.
        path: of the picture.

    Raises:
        NotDrawn: matplotlib is not installed, or one of the two was never measured.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise NotDrawn("matplotlib is not installed")
    if not (folder / FILE).is_file():
        raise NotDrawn(f"{folder} has no {FILE}, which python -m bench serve --quality writes")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quality = json.loads((folder / FILE).read_text(encoding="utf-8"))
    rows = [
        row
        for row in results.rows
        if row.seconds and (row.case["shape"], row.case["runtime"]) == (SHAPE, RUNTIME)
    ]
    cases = [case for case in PANELS if any(row.case["case"] == case for row in rows)]
    if not cases:
        raise NotDrawn(f"{SHAPE} was not timed in {RUNTIME}")
    figure = Figure(figsize=(4.6 * len(cases), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axis, case in zip(axes, cases, strict=True):
        _panel(axis, case, rows, quality["models"])
    axes[0].set_ylabel("agrees with the teacher, % of texts")
    axes[0].legend(loc="lower right", fontsize=8)
    figure.suptitle(
        f"MiniLM in ONNX Runtime, {results.run.threads} threads: fp32 (round) → int8 (square)", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _panel(axis: Any, case: str, rows: list[Row], models: dict[str, Any]) -> None:
    for model in MODELS:
        points = []
        for precision in PRECISIONS:
            seconds = fastest(rows, case, model, precision)
            if seconds is not None:
                points.append(
                    (1e3 * seconds, 100 * models[model][precision]["agreement"], _MARKERS[precision])
                )
        axis.plot([x for x, *_ in points], [y for _, y, _ in points], color=_COLOURS[model], label=model)
        for x, y, marker in points:
            axis.plot([x], [y], color=_COLOURS[model], marker=marker, markersize=8)
    axis.set(xlabel="milliseconds", title=PANELS[case])
    axis.set_xlim(left=0)
    axis.grid(True, alpha=0.3)


def fastest(rows: list[Row], case: str, model: str, precision: str) -> float | None:
    """Seconds of a model's faster form, that with padding or that without; None if neither was timed."""
    return min(
        (
            row.seconds.median
            for row in rows
            if row.seconds
            and (row.entry, row.case["precision"], row.case["case"]) == (model, precision, case)
        ),
        default=None,
    )
