import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from moebert_kernels.compress.report.terminal import StageBars, environment_table, results_table
from moebert_kernels.compress.report.units import short_count
from moebert_kernels.environment import Backend, Environment


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


def lines(console):
    return console.file.getvalue().splitlines()


def test_stages_are_told_in_order_with_their_time(console):
    with StageBars(console) as bars:
        bars("importance", 0, 1)
        bars("importance", 5, 10)
        bars("importance", 10, 10)
        bars("adapt", 0, 0)
        bars("distill", 0, 1)
    told = lines(console)
    assert told[0] == "importance ..."
    assert told[1].startswith("importance: ")
    assert told[1].endswith(" s")
    assert told[2:4] == ["adapt: reused", "distill ..."]
    assert told[4].startswith("distill: ")
    assert len(told) == 5


def test_a_stage_that_fails_is_not_said_to_be_done(console):
    def fail(bars):
        with bars:
            bars("distill", 3, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(StageBars(console))
    assert lines(console) == ["distill ..."]


def test_long_work_in_a_file_says_how_far_it_is(console, monkeypatch):
    """Fine-tuning into a file was silent for half an hour."""
    seconds = 0.0
    monkeypatch.setattr("moebert_kernels.compress.report.terminal.time.monotonic", lambda: seconds)
    with StageBars(console) as bars:
        bars("distill", 0, 1)
        for step in range(1, 10):
            seconds += 25
            bars("distill", step, 2_000)
    told = [f"distill: {step} of 2,000" for step in (3, 6, 9)]
    assert lines(console) == ["distill ...", *told, "distill: 225.0 s"]


def test_in_a_terminal_the_bar_stands_where_the_work_does():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with StageBars(console) as bars:
        bars("distill", 0, 1)
        bars("distill", 120, 480)  # goes on where it was
        (task,) = bars._bars.tasks
        assert (task.completed, task.total) == (120, 480)
        bars("measure", 0, 1)
        (task,) = bars._bars.tasks
        assert task.description == "measure"
        assert task.total is None  # it has not said how much there is to do
    assert "distill: " in console.file.getvalue()


class Told(StageBars):
    def __init__(self, console):
        super().__init__(console)
        self.calls = []

    def __call__(self, *call):
        self.calls.append(call)


def test_a_trainer_tells_its_steps_and_whether_it_goes_on(console):
    bars = Told(console)
    progress = bars.of_training("fine-tune")
    progress.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=9), None)
    assert lines(console) == []
    progress.on_train_begin(None, SimpleNamespace(global_step=4, max_steps=9), None)
    progress.on_step_end(None, SimpleNamespace(global_step=5, max_steps=9), None)
    assert bars.calls == [("fine-tune", 0, 9), ("fine-tune", 4, 9), ("fine-tune", 5, 9)]
    assert lines(console) == ["fine-tune: goes on from the checkpoint of step 4 of 9"]


WIDE = {
    "name": "random split before distillation",
    "latency_ms": {"median": 1234.5, "batch_size": 1},
    "throughput_per_s": {"median": 123_456.0, "batch_size": 32},
}


def results(latency):
    return {
        "task": {"name": "csv", "main_metric": "macro_f1", "validation_rows": 1000},
        "models": [
            {
                "name": name,
                "quality": {"macro_f1": 0.5},
                "parameters_stored": 22_740_000,
                "parameters_used_per_token": 17_400_000,
                "ffn_flops_per_token": 3_538_944,
                "latency_ms": latency,
                "throughput_per_s": None,
            }
            for name in ("teacher", "student")
        ],
    }


def test_results_table_has_every_column(console):
    console.print(results_table(results({"median": 6.523, "batch_size": 1})))
    text = console.file.getvalue()
    figures = ("0.500", "22.7 M", "17.4 M", "3.54 M", "6.52")
    for expected in ("macro f1", *figures, "batch 1", "1,000 validation rows"):
        assert expected in text


def test_results_without_speed_have_no_columns_for_it(console):
    console.print(results_table(results(None)))
    text = console.file.getvalue()
    assert "3.54 M" in text
    assert "ms" not in text.split()
    assert "texts/s" not in text


def test_results_of_a_small_model_have_digits_and_fit_80_columns():
    """A model of a few thousand parameters had "0.0 M" of everything."""
    found = results(None)
    for entry in found["models"]:
        entry |= {"parameters_used_per_token": 40_512, "ffn_flops_per_token": 512, **WIDE}
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(found))
    assert "before distillation" in console.file.getvalue()
    row = next(line for line in lines(console) if "22.7 M" in line)
    assert row.split()[2:] == ["0.500", "22.7", "M", "40.5", "K", "512", "1,234.50", "123,456"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7.4, "7"),
        (999, "999"),
        (999.6, "1.00 K"),
        (1000, "1.00 K"),
        (9994, "9.99 K"),
        (9996, "10.0 K"),
        (99_960, "100 K"),
        (999_499, "999 K"),
        (999_500, "1.00 M"),
        (3_538_944, "3.54 M"),
        (109_482_240, "109 M"),
        (1_415_577_600, "1.42 G"),
        (12_345_000_000_000, "12345 G"),
    ],
)
def test_a_count_has_three_digits_and_its_unit(count, text):
    assert short_count(count) == text


def test_results_table_of_several_seeds_and_of_fewer_layers(console):
    found = results({"median": 6.523, "batch_size": 1})
    changes = {"name": "fewer layers", "kept_layers": [2, 4], "spread": {"macro_f1": 0.0123}}
    found["models"].append(found["models"][1] | changes)
    for model in found["models"]:
        model["encoder_flops_per_token"] = 10_616_832
    console.print(results_table(found))
    text = console.file.getvalue()
    assert "0.500 ± 0.012" in text
    assert "encoder" in text
    assert "10.6 M" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_a_long_metric_leaves_room_for_the_figures():
    """The figures of a "spearman_pairs" were cut short at 80 columns."""
    found = results(None)
    found["task"]["main_metric"] = "spearman_pairs"
    for entry in found["models"]:
        entry |= {"quality": {"spearman_pairs": 0.5}, **WIDE}
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(found))
    text = console.file.getvalue()
    assert "…" not in text
    assert "spearman" in text
    assert "123,456" in text


def test_environment_table_says_why_not(console):
    versions = {"torch": "2.11.0", "triton": None}
    backends = (Backend("Triton kernels", False, "[no] device"), Backend("PyTorch", True, "any device"))
    environment = Environment("3.11.7", "Linux x86_64", versions, "Some CPU", 2, 2, (), None, backends)
    console.print(environment_table(environment))
    text = console.file.getvalue()
    absent = ("not installed", "not a git checkout", "no accelerator")
    for expected in (*absent, "no: [no] device", "yes: any device"):
        assert expected in text
