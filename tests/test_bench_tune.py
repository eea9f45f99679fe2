"""The tuning pass chooses what is faster, verified, and leaves the rest as it was."""

import re
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from moebert_kernels.kernels import configs


@pytest.fixture(autouse=True)
def _tf32_as_before():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def tuner(seconds, monkeypatch, deadline=float("inf")):
    made = tune.Tuner(tune._copies(replace(tune.TOY.case, T=5), torch.device("cpu")), deadline, samples=1)
    monkeypatch.setattr(tune.Tuner, "seconds", lambda self, pass_, config, expected=None: seconds(config))
    monkeypatch.setattr(tune.Tuner, "forward", lambda self, inputs, config: lambda: {"y": torch.ones(1)})
    return made


def test_each_field_gets_its_fastest_candidate(monkeypatch):
    def seconds(config):
        return config.up.m + config.down.n + (0 if config.tma else 10)

    start = configs.SAFE
    found, best, before = tuner(seconds, monkeypatch).tune(start, "forward", tune._FORWARD, tune.FULL)
    assert (found.up.m, found.down.n, found.tma) == (64, 64, True)
    assert best == 128
    assert before == seconds(start)
    assert found.weight_grad == start.weight_grad


def test_noise_and_failures_change_nothing(monkeypatch):
    def seconds(config):
        return 1.0 if config == configs.SAFE else 0.99 if config.tma else float("inf")

    found, _, _ = tuner(seconds, monkeypatch).tune(configs.SAFE, "forward", tune._FORWARD, tune.FULL)
    assert found == configs.SAFE


def test_nothing_is_tried_past_the_deadline(monkeypatch):
    past = tuner(lambda config: float(config == configs.SAFE), monkeypatch, time.monotonic() - 1)
    assert past.tune(configs.SAFE, "forward", tune._FORWARD, tune.FULL)[0] == configs.SAFE


def test_a_candidate_with_other_results_is_passed_over():
    """In the interpreter, through the kernels themselves."""
    made = tune.Tuner(tune._copies(replace(tune.TOY.case, T=5), torch.device("cpu")), float("inf"), samples=1)
    inputs = made.copies[0]
    expected = {name: value.double() for name, value in made.forward(inputs, configs.SAFE)().items()}
    assert made.seconds("forward", configs.SAFE, expected) < float("inf")
    assert made.seconds("forward", configs.SAFE, {"y": expected["y"] + 1}) == float("inf")
    assert made.seconds("forward", replace(configs.SAFE, up=None), expected) == float("inf")


def test_lines_are_kept_as_they_come(tmp_path, monkeypatch):
    """What was tuned before a time limit or a lost device is not to be lost with it."""

    def lines(scale, device, deadline):
        yield "first"
        raise RuntimeError("device lost")

    monkeypatch.setattr(tune, "table_lines", lines)
    with pytest.raises(RuntimeError, match="device lost"):
        tune.main(["--device", "cpu", "--out", str(tmp_path / "new" / "tune.txt")])
    assert (tmp_path / "new" / "tune.txt").read_text() == "first\n"


def test_the_whole_pass_at_toy_size(tmp_path):
    out = tmp_path / "tune.txt"
    tune.main(["--device", "cpu", "--toy", "--out", str(out)])
    times, entry = out.read_text().splitlines()
    assert re.fullmatch(r"    # T=8: forward .* \(before .*\), backward .* \(before .*\)", times)
    table = eval("{" + entry + "}", {"Config": configs.Config, "Tile": configs.Tile})
    ((key, config),) = table.items()
    assert key == (configs.family(torch.device("cpu")), "ieee", "small")
    assert isinstance(config, configs.Config)


def test_wrong_arithmetic_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--arithmetic", "half,full"])
    assert "--arithmetic must be some of half, tf32, ieee, got full" in capsys.readouterr().err


def test_a_line_is_a_valid_entry_of_the_table():
    config = replace(configs.SAFE, tma=True, dense_slots=64)
    assert eval(tune._source(config), {"Config": configs.Config, "Tile": configs.Tile}) == config
