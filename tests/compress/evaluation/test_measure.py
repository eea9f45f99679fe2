"""Measurement: inputs like the task's, models taking turns, figures that mean what they say."""

import pytest
import torch
from torch import nn

from moebert_kernels import timing
from moebert_kernels.compress.evaluation.speed import measure, packed_inputs, summarize, time_models


class Recorder(nn.Module):
    """A model that takes a known time, by a clock of its own, and notes when it is called."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, name, seconds_per_token, calls, clock):
        super().__init__()
        self.name, self.seconds_per_token, self.calls, self.clock = name, seconds_per_token, calls, clock

    def forward(self, input_ids, attention_mask):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert attention_mask.all()
        self.calls.append((self.name, tuple(input_ids.shape)))
        self.clock[0] += self.seconds_per_token * input_ids.numel()


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_inputs_are_the_tasks_tokens_without_padding():
    rows = [[2, 7, 8, 3], [2, 9, 3]]
    inputs = packed_inputs(rows, batch_size=2, sequence_length=5)
    assert inputs["input_ids"].tolist() == [[2, 7, 8, 3, 2], [9, 3, 2, 7, 8]]
    assert inputs["attention_mask"].tolist() == [[1] * 5] * 2
    with pytest.raises(ValueError, match="no token ids"):
        packed_inputs([[], []], 1, 4)


def test_models_take_turns_and_warm_up_uncounted(clock):
    calls = []
    models = {name: Recorder(name, 1.0, calls, clock) for name in "abc"}
    inputs = packed_inputs([[1, 2]], 1, 2)
    seconds = time_models(models, inputs, rounds=4, warmup=2, max_seconds=1e9)
    names = "".join(name for name, _ in calls)
    assert names == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert seconds == {name: [2.0] * 4 for name in "abc"}


def test_latency_and_throughput_of_models_of_known_speed(clock):
    calls, progress = [], []
    models = {"slow": Recorder("slow", 0.002, calls, clock), "fast": Recorder("fast", 0.001, calls, clock)}
    how = {"sequence_length": 10, "throughput_batch_size": 4, "rounds": 5}
    speed = measure(models, [[1, 2, 3]], **how, progress=lambda *call: progress.append(call))
    assert speed.dtype == "float32"
    for figure, value, batch_size in (
        (speed.models["slow"]["latency_ms"], 20, 1),
        (speed.models["fast"]["throughput_per_s"], 100, 4),
    ):
        spread = dict.fromkeys(("median", "low", "high"), pytest.approx(value))
        assert figure == {**spread, "batch_size": batch_size, "sequence_length": 10}
    assert {shape for _, shape in calls} == {(1, 10), (4, 10)}
    assert progress[0] == (1, 10)
    assert progress[-1] == (10, 10)
    assert progress == sorted(progress)


def test_slow_models_are_measured_less_often_but_three_times(clock):
    models = {"slow": Recorder("slow", 100.0, [], clock)}
    seconds = time_models(models, packed_inputs([[1]], 1, 1), rounds=50, warmup=0, max_seconds=1)
    assert seconds == {"slow": [100.0] * 3}


def test_spread_is_the_tenth_and_ninetieth_percentile():
    values = [float(v) for v in range(101)]
    assert summarize(values) == {"median": 50, "low": 10, "high": 90}
    assert summarize([3.0]) == {"median": 3, "low": 3, "high": 3}


@pytest.mark.gpu
def test_on_cuda_the_device_is_timed_and_not_the_launch():
    class Work(nn.Module):
        device = torch.device("cuda")

        def __init__(self, repeats):
            super().__init__()
            self.repeats = repeats
            self.x = torch.randn(4096, 4096, device="cuda")

        def forward(self, input_ids, attention_mask):
            for _ in range(self.repeats):
                self.x @ self.x

    models = {"one": Work(1), "twenty": Work(20)}
    seconds = time_models(models, packed_inputs([[1]], 1, 1), rounds=5)
    assert min(seconds["twenty"]) > 5 * min(seconds["one"])
