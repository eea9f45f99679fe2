"""Two processes do what one does: the same scores, steps of the same rows, one voice, and no hanging."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from moebert_kernels.compress import distributed
from moebert_kernels.compress.data.batching import LengthGroupedSampler, SharedBatchSampler
from moebert_kernels.compress.runs.pipeline import compress
from moebert_kernels.compress.storage.artifacts import exclusive
from moebert_kernels.errors import ArgumentError
from tests import ROOT
from tests.compress.runs import several_processes as jobs
from tests.compress.toys import make_data

TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--mixed_precision", "no"]
ACCELERATE += ["--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]


def start(launcher, *command):
    """What two processes print, and how they end."""
    inherited = {name: value for name, value in os.environ.items() if name not in distributed._LAUNCHED}
    environment = inherited | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # one GPU would not do for two
    }
    return subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jobs.prepare(tmp_path_factory.mktemp("processes"))


@functools.cache
def started(folder):
    """Every job by two processes, and in the end one that fails in one of them."""
    done = start(TORCHRUN, jobs.__file__, "score,train,whole,broken", folder, folder / "two")
    assert (folder / "two" / "results-1.json").exists(), done.stderr
    return done


@pytest.fixture(scope="module")
def two(folder):
    """What two processes have made of every job."""
    started(folder)
    return folder / "two"


@pytest.fixture(scope="module")
def one(folder):
    """The same in this process, with as many threads as each of the two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for job in (jobs.score, jobs.train, jobs.whole):
        job(folder, folder / "one")
    torch.set_num_threads(threads)
    return folder / "one"


def read(path):
    return json.loads(path.read_text())


def test_importance_is_equal_to_the_last_bit(one, two):
    """The processes' sums are added in the order of the batches; sums of sums would round otherwise."""
    alone = load_file(one / "importance-0.safetensors")
    for index in (0, 1):
        shared = load_file(two / f"importance-{index}.safetensors")
        assert torch.equal(shared["scores_LF"], alone["scores_LF"])
        torch.testing.assert_close(
            shared["token_scores_LGF"], alone["token_scores_LGF"], rtol=1e-5, atol=1e-9
        )
        assert read(two / f"counted-{index}.json") == [27, 27]


def test_distillation_takes_the_steps_of_one_process(one, two):
    """Stops losses that are means of means: last batches have 3 rows or 1, tokens unlike many labels."""
    for name in ("three", "one", "tokens"):
        alone, shared = read(one / f"log-{name}.json"), read(two / f"log-{name}.json")
        assert len(alone) == len(shared) == 12
        for ours, theirs in zip(shared, alone, strict=True):
            balances = ours.pop("balance", 1.0), theirs.pop("balance", 1.0)
            assert ours == pytest.approx(theirs, rel=1e-4)
            assert balances[0] == pytest.approx(balances[1], rel=0.02)


def test_every_token_is_counted_once(one, two):
    """A last batch of one row is taken by both processes."""
    for name in ("one", "tokens"):
        load_NLE = read(two / f"load-{name}.json")
        assert load_NLE == read(one / f"load-{name}.json")
        assert len(load_NLE) == 3
    gated, alone = (torch.tensor(read(out / "load-three.json")) for out in (two, one))
    torch.testing.assert_close(gated, alone, atol=0.02, rtol=0)  # a gate may part with its twin by rounding


def test_trained_models_say_the_same(one, two):
    for name in ("three", "one", "tuned"):
        alone, shared = (load_file(out / f"logits-{name}.safetensors")["logits"] for out in (one, two))
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)
    assert read(two / "metrics-0.json") == read(two / "metrics-1.json") == read(one / "metrics-0.json")


def test_compress_as_a_whole(one, two):
    results, alone = read(two / "results-0.json"), read(one / "results-0.json")
    assert results == read(two / "results-1.json") == read(two / "whole" / "results.json")
    assert results["importance"] == alone["importance"]
    for key in ("expert_load_LE", "training_load_NLE"):
        assert results[key] == alone[key]
    assert [m["quality"] for m in results["models"]] == [m["quality"] for m in alone["models"]]
    ours, theirs = (found["fitting"]["student"] for found in (results, alone))
    assert (ours["rows"], ours["num_tokens"]) == (theirs["rows"], theirs["num_tokens"])
    for errors in ("cut_L", "fitted_L"):
        assert ours[errors] == pytest.approx(theirs[errors], rel=1e-4)
    shared, fitted = (
        load_file(out / "whole" / "work" / "student" / "fitted" / "model.safetensors") for out in (two, one)
    )
    for name, value in fitted.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-5)
    for name, curve in alone["losses"].items():
        for ours, theirs in zip(results["losses"][name], curve, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    told, told_alone = (read(out / "calls-0.json") for out in (two, one))
    # Importance tells of two batches at a time.
    assert told == [call for call in told_alone if call != ["importance", 32, 48]]
    assert read(two / "calls-1.json") == []
    assert not list((two / "whole").rglob("checkpoint-*"))


def test_an_error_in_one_process_ends_both_and_another_number_of_them_goes_on(folder, one):
    """Stops a main process that waits for ever for one that has failed, and work that is lost."""
    done, output = started(folder), folder / "two" / "broken"
    assert done.returncode != 0
    said, _, summary = done.stderr.partition(" FAILED\n")  # whichever of the two is seen to end first
    assert said.count("RuntimeError: pulled the plug") == 1
    assert "RuntimeError: pulled the plug" in summary
    assert "Connection closed" not in done.stderr
    assert not (output / "results.json").exists()
    calls = []
    results = compress(
        jobs.SETTINGS, make_data(), folder / "teacher", output, progress=lambda *call: calls.append(call)
    )
    assert ("importance", 0, 0) in calls
    assert next(call for call in calls if call[0] == "distill student" and call[2] == 12)[1] == 5
    alone = read(one / "results-0.json")
    assert results["importance"] == alone["importance"]
    for ours, theirs in zip(results["losses"]["student"], alone["losses"]["student"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_make_one_complaint(folder, tmp_path):
    """The main process finds the folder in use; the other must neither go on nor explain itself."""
    table = tmp_path / "rows.csv"
    rows = make_data()
    lines = [f"{text},{label}" for text, label in zip(rows.train["text"], rows.train["label"], strict=True)]
    table.write_text("\n".join(["text,label", *lines]))
    command = ["-m", "moebert_kernels.cli", "compress", "--teacher", folder / "teacher", "--task", "csv"]
    command += ["--data", table, "--text-column", "text", "--label-column", "label"]
    command += ["--max-length", "16", "--batch-size", "8", "--output", tmp_path / "out"]
    with exclusive(tmp_path / "out"):
        done = start(ACCELERATE, *command)
    assert done.returncode != 0
    assert done.stderr.count("is in use by process") == 1, done.stderr
    assert "OtherProcessError" not in done.stderr


def test_rows_of_a_step_must_divide(monkeypatch):
    for name, value in zip(distributed._LAUNCHED, ("1", "1", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (2, 1, False)
    assert distributed.rows_each(8) == 4
    with pytest.raises(ArgumentError, match="batch_size is 7, expected a multiple of 2"):
        distributed.rows_each(7)


@given(rows=st.integers(1, 60), each=st.integers(1, 4), count=st.integers(1, 5), epoch=st.integers(0, 2))
def test_shares_make_up_the_batches_of_one_process(rows, each, count, epoch):
    def sampler():
        order = LengthGroupedSampler([7 * row % 11 for row in range(rows)], each * count, seed=3)
        order.set_epoch(epoch)
        return order

    (whole,) = [list(SharedBatchSampler(sampler(), each * count, 1, 0))]
    shares = [list(SharedBatchSampler(sampler(), each * count, count, index)) for index in range(count)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert all(parts)
        if len(batch) < count:
            assert all(part == batch for part in parts)
        else:
            assert sorted(row for part in parts for row in part) == sorted(batch)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
