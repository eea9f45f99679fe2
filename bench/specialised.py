"""The table of warp-specialised kernels beside the plain ones, from results/h200/specialised.jsonl.

A trial of the kernels alone measured it, before they were put into the layer: a row for each form that was
tried, with microseconds of the plain kernel ("ours") and of the form ("ws") by T, and for those that are
launched now a hash of their machine code. `python -m bench.tune` times the two beside each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOKENS = (4096, 16384, 65536)
_PINGPONG = "pp 128x128x64x6"
SHOWN = {
    f"gather {_PINGPONG}": "gather, inference",
    f"scatter {_PINGPONG}": "scatter",
    f"gather_backward {_PINGPONG} parts 4": "gather_backward",
    f"scatter_backward {_PINGPONG}": "scatter, backward",
    f"forward {_PINGPONG} / {_PINGPONG}": "forward, inference",
    f"gather_slope {_PINGPONG} parts 4": "gather, training: not taken",
    "gather_slope co 128x256x64x4 parts 4": "gather, training, both consumers on one tile: not taken",
}


def table(folder: Path) -> str:
    """A line for each of SHOWN.

    Args:
        folder: of result files.
    """
    lines = (folder / "h200" / "specialised.jsonl").read_text(encoding="utf-8").splitlines()
    rows: dict[str, dict[str, Any]] = {row["variant"]: row for row in map(json.loads, lines)}
    first = next(iter(rows.values()))
    told = [f"| {first['device']}, µs | " + " | ".join(f"T = {T}" for T in TOKENS) + " |"]
    told.append("|---|" + "--:|" * len(TOKENS))
    for variant, name in SHOWN.items():
        cells = [name]
        for T in TOKENS:
            plain, own = (rows[variant][f"T={T}"][who]["us"] for who in ("ours", "ws"))
            cells.append(f"{plain:.1f} → {own:.1f} ({plain / own:.2f})")
        told.append(f"| {' | '.join(cells)} |")
    source = (
        "*Plain → specialised (ratio), in turn, each alone in a CUDA graph with cold caches; "
        f"{first['date']}, a trial of the kernels at commit {first['commit']}.*"
    )
    return "\n".join([*told, "", source])
