import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from moebert_kernels.compress.terminal import StageBars, TrainingProgress, environment_table, results_table
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


def test_a_trainer_tells_its_steps():
    told = []
    progress = TrainingProgress("fine-tune", lambda *call: told.append(call))
    progress.on_train_begin(None, SimpleNamespace(global_step=4, max_steps=9), None)
    progress.on_step_end(None, SimpleNamespace(global_step=5, max_steps=9), None)
    assert told == [("fine-tune", 4, 9), ("fine-tune", 5, 9)]


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
    for expected in (
        "macro f1",
        "0.500",
        "22.7 M",
        "17.4 M",
        "3.5 M",
        "6.52",
        "batch 1",
        "1,000 validation rows",
    ):
        assert expected in text


def test_results_table_of_several_seeds_and_of_fewer_layers(console):
    found = results({"median": 6.523, "batch_size": 1})
    found["models"].append(
        found["models"][1] | {"name": "fewer layers", "kept_layers": [2, 4], "spread": {"macro_f1": 0.0123}}
    )
    for model in found["models"]:
        model["encoder_flops_per_token"] = 10_616_832
    console.print(results_table(found))
    text = console.file.getvalue()
    assert "0.500 ± 0.012" in text
    assert "encoder" in text
    assert "10.6 M" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_results_table_without_measurements(console):
    console.print(results_table(results(None)))
    assert "ms" in console.file.getvalue()
    assert "texts/s" in console.file.getvalue()


def test_environment_table_says_why_not(console):
    environment = Environment(
        "3.11.7",
        "Linux x86_64",
        {"torch": "2.11.0", "triton": None},
        "Some CPU",
        2,
        2,
        (),
        None,
        (Backend("Triton kernels", False, "[no] device"), Backend("PyTorch", True, "any device")),
    )
    console.print(environment_table(environment))
    text = console.file.getvalue()
    for expected in (
        "not installed",
        "not a git checkout",
        "no accelerator",
        "no: [no] device",
        "yes: any device",
    ):
        assert expected in text
