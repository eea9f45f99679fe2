"""The tuning pass times each GEMM's candidates, verified, and keeps every figure as it comes."""

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from bench.cases import FFNCase
from moebert_kernels.kernels.triton import configs, hopper
from moebert_kernels.kernels.triton.configs import Tile

TILE = Tile(16, 16, 16, 4, 2)


@pytest.fixture(scope="module")
def bench():
    return tune.Bench(FFNCase(5, D=16, F=16, E=2, dtype="float32"), torch.device("cpu"))


def test_each_role_is_the_launch_it_names(bench):
    for name, role in tune.ROLES.items():
        found = bench._ran(0, role.pass_, tune.Candidate(name, TILE).config(bench.base)).of(role)
        assert next(one.kernel.__name__ for one in found).startswith(role.kernels[0]), name
        tiles = {one.arguments["BLOCK_M"] for one in found}
        assert tiles == {TILE.m}, name


def test_streamed_candidates_are_timed_with_the_join():
    case = FFNCase(40, D=16, F=16, E=2, dtype="float32")
    bench = tune.Bench(case, torch.device("cpu"))
    config = tune.Candidate("weight_grad", TILE, stream_k=True).config(bench.base)
    role = tune.ROLES["weight_grad"]
    names = [one.kernel.__name__ for one in bench._ran(0, "backward", config).of(role)]
    assert names == ["weight_grad_stream_kernel", "join_kernel"]


def test_warp_specialised_kernels_are_candidates_beside_the_plain_ones(monkeypatch):
    """Tiles would not be timed where the table's own kernels took a role from them."""
    monkeypatch.setattr(hopper.launches, "IS_THERE", True)
    base = configs.TABLE["sm_90", "half", "large"]
    for name, role in tune.ROLES.items():
        chosen = [c.config(base) for c in tune.candidates(name)]
        own = [config for config in chosen if config.specialised]
        if name in ("up_training", "weight_grad"):
            assert not own
        else:
            assert own == [replace(base, specialised=(role.field,))]


def test_wrong_results_are_no_figure(bench, monkeypatch, tmp_path):
    """A candidate that computes something else must not win."""
    monkeypatch.setitem(bench.expected["inference"], "y", bench.expected["inference"]["y"] + 1)
    found = tune.measure(bench, [tune.Candidate("up", TILE)], float("inf"), tmp_path / "tiles.jsonl")
    assert found == {}
    (row,) = map(json.loads, (tmp_path / "tiles.jsonl").read_text().splitlines())
    assert "off by" in row["failed"]
    assert "seconds" not in row


def test_nothing_is_timed_past_the_deadline(bench):
    assert tune.measure(bench, [tune.Candidate("up", TILE)], 0.0, None) == {}


def test_candidates_are_distinct_and_of_their_role():
    for role in tune.ROLES:
        found = list(tune.candidates(role))
        assert len(found) == len(set(found))
        assert all(replace(one, role=role) == one for one in found)


def test_the_whole_pass_at_toy_size(monkeypatch, tmp_path, capsys):
    out = str(tmp_path / "tiles.jsonl")
    monkeypatch.setattr(sys, "argv", ["tune", "--toy", "--commit", "abc", "--out", out])
    tune.main()
    rows = [json.loads(line) for line in (tmp_path / "tiles.jsonl").read_text().splitlines()]
    assert {(row["device"], row["commit"]) for row in rows} == {("cpu", "abc")}
    assert all(row["seconds"] > 0 for row in rows)
    assert "T=24 weight_grad" in capsys.readouterr().out


def test_unknown_roles_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", "--toy", "--roles", "up,upp"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "got upp" in capsys.readouterr().err
