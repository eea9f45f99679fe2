"""What a session on a GPU does with its time, by a stand-in clock, and with what it has measured at its end.

That its parts run at all shows `bash bench/gpu.sh first --dry-run`, in tests/test_bare_machine.py.
"""

import argparse
import json
import re
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_parts, smoke
from bench.cases import FFNCase, expert_ids
from bench.gpu import CALLS, FIRST, RESERVE_S, Host, Part, StandIn, chosen, command_of, files_of, go_through
from bench.results import read
from tests import ROOT
from tests.forked import python


class Scripted(StandIn):
    """Parts that take so many seconds and end with such a status."""

    def __init__(self, seconds, codes=()):
        super().__init__()
        self.seconds, self.codes, self.given = seconds, dict(codes), {}

    def run(self, part, seconds):
        self.given[part.name] = seconds
        self._now += min(seconds, self.seconds)
        return None if self.seconds > seconds else self.codes.get(part.name, 0)


def test_what_matters_most_comes_first():
    assert [part.name for part in FIRST] == ["machine", "smoke", "ffn", "kernels", "tests", "tiles"]
    assert gpu_parts.TOKENS == (16384, 65536, 4096, 512, 64)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_ends_in_time_however_slow_its_parts(call):
    parts, limit = CALLS[call]
    outcomes = list(go_through(parts, limit, StandIn()))
    assert outcomes[-1].ended_s <= limit - RESERVE_S
    assert all(outcome.became in ("ok", "cut off") for outcome in outcomes)
    assert sum(limit for _, limit in CALLS.values()) <= 12 * 60  # a machine's start counts too


def test_what_a_part_leaves_of_its_time_is_the_next_ones():
    machine = Scripted(seconds=1)
    list(go_through(FIRST, 480, machine))
    ends = 0
    for number, part in enumerate(FIRST[:-1]):
        ends += part.seconds
        assert machine.given[part.name] == pytest.approx(ends - number - part.grace_s)
    assert machine.given["tiles"] > 400


def became(machine):
    """What became of each part of the first call."""
    return {outcome.part: outcome.became for outcome in go_through(FIRST, 480, machine)}


def test_a_part_that_fails_stops_no_other():
    found = became(Scripted(seconds=2, codes={"ffn": 1, "machine": 2}))
    of_others = dict.fromkeys(("smoke", "kernels", "tests", "tiles"), "ok")
    assert found == of_others | {"machine": "failed (2)", "ffn": "failed (1)"}


def test_without_a_device_nothing_else_is_tried():
    """A newcomer without a GPU was told that the layer is wrong."""
    found = became(Scripted(seconds=2, codes={"machine": gpu.NO_DEVICE}))
    assert {*found.values()} == {"failed (3)", "not run, since machine failed (3)"}


def test_nothing_is_timed_of_a_layer_that_is_wrong():
    machine = Scripted(seconds=2, codes={"smoke": 1})
    assert [*became(machine).values()] == ["ok", "failed (1)", *["not run, since smoke failed (1)"] * 4]
    assert list(machine.given) == ["machine", "smoke"]


def test_a_smoke_test_without_enough_time_stops_nothing():
    """It has found nothing wrong, and the benchmarks verify what they time."""
    found = became(Scripted(seconds=100))
    assert found["machine"] == found["smoke"] == "cut off"
    assert not any(text.startswith("not run") for text in found.values())


def test_no_more_files_than_come_back():
    assert len(files_of(FIRST)) <= gpu.MOST_FILES
    with pytest.raises(ValueError, match=r"these parts leave \d+ files, at most 8 come back"):
        chosen("second", [part.name for part in CALLS["second"][0] if part.name != "ffn"])
    with pytest.raises(ValueError, match="ffn and columns write the same file"):
        chosen("second", ["ffn", "columns"])


def test_each_call_makes_its_bare_machine_ready():
    assert [part.name for part in chosen("second", ["tests", "counters"])] == ["machine", "tests", "counters"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["third"], "invalid choice: 'third'"),
        (["first", "--only", "model"], "the first call has no part 'model'; it has machine, smoke, ffn"),
        (["second", "--dry-run"], "the second call needs --only"),
        (["first"], "--out is needed"),
        (["first", "--dry-run", "--limit", "20"], "--limit must be at least 57 s for these parts, got 20"),
        (["first", "--out", str(ROOT)], "--out must be a new or an empty folder"),
        (
            ["first", "--dry-run", "--kernels", "none.zip"],
            "--kernels must be a file, there is none at ./none.zip",
        ),
    ],
)
def test_wrong_options_are_told_before_any_time_is_spent(wrong, message, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.parse(wrong)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_commands_of_the_parts_exist(tmp_path):
    """An option that is gone would waste a GPU's time."""
    (tmp_path / "kernels.zip").touch()
    given = ["--peer-path", str(tmp_path), "--kernels", str(tmp_path / "kernels.zip"), "--commit", "abc"]
    options = gpu.parse(["first", "--out", str(tmp_path / "out"), *given])
    for part in {part.name: part for parts, _ in CALLS.values() for part in parts}.values():
        command = command_of(part, 30.0, options)
        assert command is not None, part.name
        while command[0] != sys.executable:  # what ncu wraps
            command = command[1:]
        target = command[2:] if command[1] == "-m" else command[1:]
        if target[0].startswith("bench."):
            parser = ROOT / (target[0].replace(".", "/") + ".py")
            assert parser.is_file()
            used = [word for word in target[1:] if word.startswith("--")]
            assert all(f'"{option}"' in parser.read_text() for option in used), part.name
        if target[0] == "bench.gpu_parts":
            assert target[1] in gpu_parts.PARTS


@pytest.fixture
def host(tmp_path):
    options = gpu.parse(["first", "--out", str(tmp_path), "--dry-run"])
    with (tmp_path / "gpu.log").open("ab") as log:
        yield Host(options, log)


def test_a_part_that_hangs_is_cut_off_with_all_it_started(host, tmp_path, monkeypatch):
    script = """
        import signal, subprocess, sys
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "60"])
        print("figure 1, child", child.pid, flush=True)
        child.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    monkeypatch.setattr(gpu, "command_of", lambda *_: command)
    begin = time.monotonic()
    assert host.run(Part("ffn", 9, "hangs", grace_s=2), 3.0) is None
    assert time.monotonic() - begin < 20
    text = (tmp_path / "gpu.log").read_text()
    assert "figure 1" in text
    child = int(text.rpartition(" ")[2])
    status = Path(f"/proc/{child}/status")
    until = time.monotonic() + 10  # it has been told to end, and does on a processor's next moment
    while (alive := status.exists() and "\nState:\tZ" not in status.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive


def test_what_a_killed_run_had_measured_can_be_read(tmp_path):
    """It was in a hidden file that no reader looked for."""
    script = """
        import os, sys
        from bench.cases import TOY
        from bench import ceilings
        from bench.ffn import FFN
        from bench.results import write
        from bench.run import Settings, start
        settings = Settings(request=TOY, rounds=1, threads=1, probes=ceilings.TOY, passes=("forward",))
        run, rows = start(FFN, settings)
        def killed():
            for number, row in enumerate(rows):
                if number == 2:
                    os.kill(os.getpid(), 9)
                yield row
        write(sys.argv[1], run, killed())
    """
    assert python("-c", textwrap.dedent(script), tmp_path).returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == ["ffn-cpu.jsonl"]
    found = read(tmp_path / "ffn-cpu.jsonl")
    assert [row.entry for row in found.rows] == ["moebert_kernels", "moebert_kernels tied"]
    with (tmp_path / "ffn-cpu.jsonl").open("a") as file:
        file.write('{"case": {"T"')  # cut off within a line
    assert read(tmp_path / "ffn-cpu.jsonl") == found


def test_help_says_what_always_runs(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "first: all its parts, in their order; second: what the first one's results ask for" in text
    assert "* always runs: first, 480 s: * machine 60 s" in text


@pytest.mark.parametrize("brought", [None, "kernels.zip"])
def test_kernels_that_were_brought_are_unpacked_before_any_is_compiled(brought):
    commands = gpu_parts._commands(argparse.Namespace(toy=False, kernels=brought))
    assert commands["kernels"] == ["-m", "bench.ahead", *(["--unpack", brought] if brought else [])]
    assert "native extension" in commands


CASE = FFNCase(40, D=16, F=24, E=3, routing="dropped", dtype="float32", gate=True)


def compared(change):
    t = smoke.make_inputs(CASE, torch.device("cpu"))
    ids_TK = expert_ids(CASE)
    exact = smoke.reference(t, ids_TK)
    outputs = {name: value.float() for name, value in exact.items()}
    change(outputs, ids_TK[:, 0])
    return smoke.compare(outputs, exact, ids_TK, CASE)[0]


def test_the_smoke_test_says_which_output_and_which_expert_is_wrong():
    assert compared(lambda outputs, ids_T: None) == []

    def lose_a_row(outputs, ids_T):
        outputs["y"][(ids_T == 1).nonzero()[2]] = float("nan")

    (wrong,) = compared(lose_a_row)
    assert wrong.startswith("y of expert 1 is off by inf rms")
    assert "in 1 of" in wrong
    assert wrong.endswith("from 2 to 2")

    def write_to_dropped_tokens(outputs, ids_T):
        outputs["dx"][ids_T == -1] = 1e-3

    assert compared(write_to_dropped_tokens)[0].startswith("dx of tokens without an expert is off")

    def lose_a_gradient(outputs, ids_T):
        outputs["dw2"][2] *= 0.9

    assert [text.split(" is off")[0] for text in compared(lose_a_gradient)] == ["dw2 of expert 2"]


def test_a_wrong_case_hides_none_of_the_others(tmp_path):
    judge = smoke.Judge(smoke.appending(tmp_path / "smoke.jsonl"))
    judge("first", lambda: ([], {"y": 1e-3}))
    judge("second", lambda: (["dw1 of expert 0"], {}))
    judge("third", lambda: 1 / 0)
    judge("fourth", lambda: ([], {}))
    wrong = [json.loads(line)["wrong"] for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert wrong == [[], ["dw1 of expert 0"], ["ZeroDivisionError: division by zero"], []]
    assert not judge.all_right


def test_on_a_lost_device_no_check_passes(tmp_path):
    judge = smoke.Judge(smoke.appending(tmp_path / "smoke.jsonl"))

    def lose_it():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    judge("first", lose_it)
    judge("second", lambda: ([], {}))
    last = json.loads((tmp_path / "smoke.jsonl").read_text().splitlines()[1])
    assert last["wrong"] == ["not checked: the device was lost in first"]


def test_a_second_run_that_differs_is_wrong():
    t = smoke.make_inputs(CASE, torch.device("cpu"))
    first = smoke.reference(t, expert_ids(CASE))
    second = first | {"dw1": first["dw1"].clone()}
    second["dw1"][0, 0, 0] += 1
    assert smoke._different(first, second) == [f"dw1 differs in 1 of {first['dw1'].numel()} elements"]


def test_aims_scale_with_the_card():
    """An H100 has 3.0 of an H200's 4.3 TB/s: the same microseconds would ask more of it."""
    target = gpu_parts.target_of(4096, "forward")
    assert target.aim_s(target.floor_us * 1e-6) == pytest.approx(target.aim_us * 1e-6)
    assert target.aim_s(2 * target.floor_us * 1e-6) == pytest.approx(2 * target.aim_us * 1e-6)
    assert replace(target, aim_us=None).aim_s(1.0) is None
    assert gpu_parts.target_of(4097, "forward") is None


def test_a_report_keeps_no_folder_of_the_machine(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        f'<testsuite hostname="one"><skipped>{ROOT}/tests/conftest.py:3: no</skipped></testsuite>'
    )
    gpu.forget_this_machine(tmp_path)
    assert report.read_text() == "<testsuite><skipped>tests/conftest.py:3: no</skipped></testsuite>"


def test_no_result_names_a_folder_of_a_machine():
    """Stops what a run prints from being kept with the paths of where it ran."""
    for path in (ROOT / "bench" / "results").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".xml", ".svg"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w./])/(work|root|home|tmp|mnt|Users)/", text), path.name
