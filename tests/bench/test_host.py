"""The host's benchmark: what runs, and what it says where something is missing."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import host
from bench.results import Row
from moebert_kernels.timing import Spread
from tests import ROOT


def measured(*options: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "host", "--toy", "--device", "cpu", *options],
        env=env,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_toy_run_measures_everything(tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("transformers")
    text = measured("--out", str(tmp_path))
    assert "did not run" not in text
    (file,) = tmp_path.iterdir()
    head, *rows = map(json.loads, file.read_text().splitlines())
    assert head["op"] == "host"
    passes = [(row["entry"], row["pass_"]) for row in rows]
    assert passes == [
        ("CUDA path", "forward"),
        ("CUDA path", "forward+backward"),
        ("CPU", "forward"),
        ("CPU, dense", "forward"),
        ("encoder", "forward"),
        ("encoder of one expert", "forward"),
    ]
    assert all(0 < row["seconds"]["median"] < 1 for row in rows)


def test_interpreted_kernels_are_not_the_cuda_path(interpreter):
    """In the interpreter a launch takes milliseconds: its time would be taken for the host's."""
    pytest.importorskip("triton")
    rows = host.rows(host.TOY, torch.device("cpu"))
    assert [next(rows).did_not_run for _ in range(2)] == ["TRITON_INTERPRET is set"] * 2


def test_time_within_products_does_not_count():
    a = torch.randn(700, 700)
    alone = host.outside_products(lambda: [torch.mm(a, a) for _ in range(4)])
    beside = host.outside_products(lambda: [torch.matmul(a, a) for _ in range(4)])
    assert min(alone() for _ in range(5)) < 0.2 * min(beside() for _ in range(5))


def test_the_table_sets_the_aims_beside():
    def row(entry, pass_, seconds, reason=None):
        taken = None if seconds is None else Spread(seconds, seconds, seconds, 3)
        return Row({}, entry, "host", pass_, "eager", "warm", "apart", taken, reason)

    table = [
        *host.lines(
            [
                row("CUDA path", "forward", 30e-6),
                row("CUDA path", "forward+backward", None, "Triton is not installed"),
                row("encoder", "forward", 3.3e-3),
                row("encoder of one expert", "forward", 3e-3),
            ]
        )
    ]
    assert table[1].split() == ["CUDA", "path", "forward", "30.0", "µs", "30.0", "µs", "35", "µs"]
    assert table[2].endswith("did not run: Triton is not installed")
    assert table[-1].split() == ["encoder", "/", "its", "twin", "forward", "1.100", "1.05"]
