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
    us = (2 + 0.0014 * sizes**2) * np.where(sizes % 16, 1.7, 1.0)
    assert windows.fit(windows.SIZES, us) == pytest.approx((2, 0.0014, 1.7))
    assert min(windows.fit(windows.SIZES, 0.1 * sizes - 0.0001 * sizes**2)) >= 0


def test_costs_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["windows", "--seconds", "0.001"])
    monkeypatch.setattr(windows, "SIZES", (16, 24, 32))
    monkeypatch.setattr(windows, "ROWS", 32)
    windows.main()
    assert "chosen by 1.50 + 0.00260 n², times 1.70 where 16 does not divide n" in capsys.readouterr().out
