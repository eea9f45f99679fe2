"""Killed anywhere, `moebert compress` goes on when it is started again, and ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moebert_kernels.compress.runs.pipeline import stage_names
from moebert_kernels.compress.runs.settings import CompressSettings
from tests import ROOT

TIMES = ("timings_s", "latency_ms", "throughput_per_s", "busy_cpus")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of an undisturbed run and of one that was killed, and where that was."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_runs.py"), folder, "0"],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},  # a device cannot be used on both sides of a fork
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder / "undisturbed", folder / "killed", json.loads(done.stdout)


def without_times(value):
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    if isinstance(value, list):
        # A warning of a busy machine says what else it did while speed was measured.
        return [without_times(part) for part in value if "processors busy" not in str(part)]
    return value


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_it_was_killed_in_every_stage_and_in_mid_file(runs):
    _, _, told = runs
    assert list(told["events"]) == ["beginning", *stage_names(CompressSettings(comparisons=("narrow",)))]
    where = [stage for stage, *_ in told["deaths"]]
    assert set(where) == {*told["events"], "time", "writing"}
    assert len(where) >= 15


def test_what_it_makes_is_what_an_undisturbed_run_makes(runs):
    undisturbed, killed, _ = runs
    assert files(killed) == files(undisturbed)
    for name in files(undisturbed):
        if name.endswith(".safetensors"):
            expected, found = load_file(undisturbed / name), load_file(killed / name)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert torch.equal(found[key], value), (name, key)
    expected, found = (json.loads((folder / "results.json").read_text()) for folder in (undisturbed, killed))
    assert without_times(found) == without_times(expected)
    for name in ("latency_ms", "throughput_per_s"):
        assert all(model[name]["median"] > 0 for model in found["models"])


def test_what_it_leaves_can_be_read_by_others(runs):
    """safetensors makes files that nobody else can read, though the rest of the folder can be."""
    undisturbed, _, _ = runs
    for path in undisturbed.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o444 == path.parent.stat().st_mode & 0o444, path
