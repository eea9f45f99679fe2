"""What packing is worth: `python -m bench.packing` and what its choice of windows was measured by."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from bench import packing, windows
from bench.readme import update


@pytest.mark.parametrize("trained", [True, False])
def test_ratios_are_measured_written_and_told(tmp_path, monkeypatch, capsys, trained):
    text, to = tmp_path / "sentences.txt", tmp_path / "packing.json"
    text.write_text("\n".join("word " * (1 + n % 9) for n in range(64)))
    monkeypatch.setitem(packing.SHAPES, "minilm", {"D": 24, "F": 16, "E": 2, "L": 1, "head_size": 12})
    monkeypatch.setattr(packing, "FULL", ((1, 4),))
    monkeypatch.setattr(packing, "STEPS", 2)
    monkeypatch.setattr(packing, "BLOCK", 1)
    options = ["--text", str(text), "--shape", "minilm", "--dtype", "float32", "--seconds", "0.01"]
    options += ["--threads", "1", "--to", str(to), *([] if trained else ["--no-distil"])]
    monkeypatch.setattr(sys, "argv", ["packing", *options])
    packing.main()
    (run,) = json.loads(to.read_text())["runs"]
    assert 0.3 < run["padding"] < 0.6
    names = {
        "padded / packed",
        "packed / unpadded",
        "dense padded / packed",
        "dense packed / packed",
        "full 1x4",
    }
    assert run["ratios"].keys() == (names | {"distil"} if trained else names)
    assert all(found["low"] <= found["median"] <= found["high"] for found in run["ratios"].values())
    said = capsys.readouterr().out
    assert "| MiniLM, float32 |" in said
    block = "<!-- bench:packing:begin -->\n{}<!-- bench:packing:end -->\n"
    table = said[said.index("| |") :].strip()
    assert update(block.format(""), tmp_path) == block.format(table + "\n")


def test_a_fit_of_costs_is_never_negative():
    sizes = np.array(windows.SIZES)
    assert windows.fit(windows.SIZES, list(2 + 0.07 * sizes + 0.0014 * sizes**2)) == pytest.approx(
        [2, 0.07, 0.0014]
    )
    falling = windows.fit(windows.SIZES, list(0.1 * sizes - 0.0001 * sizes**2))
    assert min(falling) >= 0


def test_costs_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["windows", "--seconds", "0.001"])
    monkeypatch.setattr(windows, "SIZES", (8, 16, 24))
    monkeypatch.setattr(windows, "ROWS", 24)
    windows.main()
    assert "chosen by 2.00 + 0.070 n + 0.00140 n²" in capsys.readouterr().out
