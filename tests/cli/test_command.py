"""How commands end when something is wrong outside of them: one sentence, an exit code, no traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebert_kernels.cli_command import FAILED, INTERRUPTED
from moebert_kernels.compress.data import files
from moebert_kernels.compress.runs import pipeline
from moebert_kernels.compress.storage import artifacts
from moebert_kernels.compress.storage.artifacts import exclusive
from tests import ROOT
from tests.compress.toys import make_data, make_teacher
from tests.full_disk import no_file_above

ROWS = "--task csv --data rows.csv"
TRAINING = f"{ROWS} --batch-size 16 --max-length 16 --lr 1e-3 --epochs 1"
COMPRESS = f"compress --teacher teacher {TRAINING} --measure-length 8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    make_teacher(folder / "teacher")
    make_data(n=60).train.to_csv(folder / "rows.csv", index=False)
    return folder


def assert_failed(result, *words):
    assert result.exit_code == FAILED == 1, result.output
    assert isinstance(result.exception, SystemExit)
    *progress, sentence = result.stderr.splitlines()
    assert not progress or progress[0] == "evaluate ..."
    for word in words:
        assert word in sentence
    assert "Traceback" not in result.output


def test_a_full_disk_and_room_again(call, run, folder):
    with no_file_above(200_000):
        result = call(f"{COMPRESS} --epochs 2 --output full")
    checkpoints = Path("full", "work", "student", "checkpoints-")
    assert_failed(result, f"cannot write to the folder {checkpoints}", "command again")
    assert "evaluate student before distillation: reused" in run(f"{COMPRESS} --epochs 2 --output full")
    assert (folder / "full" / "report.html").is_file()


def test_a_second_run_on_the_same_folder(call, folder):
    with exclusive(folder / "taken"):
        result = call(f"{COMPRESS} --output taken")
    assert_failed(result, f"the output folder taken is in use by process {os.getpid()}; wait for it")


@pytest.mark.parametrize(
    "command",
    [
        f"{COMPRESS} --output rows.csv/out",
        f"importance --teacher teacher {ROWS} --output rows.csv/scores.safetensors",
        "adapt --teacher teacher --random-split --no-fit --output rows.csv/adapted",
        f"finetune --model teacher {TRAINING} --output rows.csv/fresh",
        f"evaluate --model teacher {ROWS} --output rows.csv/metrics.json",
    ],
)
def test_an_output_that_cannot_be_made(call, command):
    assert_failed(
        call(command), "cannot write to the folder rows.csv", "rows.csv is a file; give another output folder"
    )


def test_metrics_are_printed_even_if_they_cannot_be_written(call):
    result = call(f"evaluate --model teacher {ROWS} --output rows.csv/metrics.json")
    assert "accuracy 0." in result.stdout


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(number, call, monkeypatch):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(artifacts.tempfile, "mkdtemp", refused)
    result = call("adapt --teacher teacher --random-split --no-fit --output locked/out")
    assert_failed(
        result, f"cannot write to the folder locked: {os.strerror(number)}; ", "another output folder"
    )


def test_what_cannot_be_read_is_named(call, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files.Path, "read_bytes", forbidden)
    assert_failed(call(f"{COMPRESS} --output unread"), "cannot use rows.csv: Permission denied")


def test_a_closed_pipe_is_nobodys_fault(call, monkeypatch):
    """`moebert ... | head` is no defect; nor is it one that a folder could put right."""

    def closed(*args, **kwargs):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(pipeline, "compress", closed)
    result = call(f"{COMPRESS} --output piped")
    assert result.exit_code == 1
    assert "cannot" not in result.stderr


INTERRUPT = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell hands on that it is ignored
when = sys.argv.pop()

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == when:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
if when == "the end":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
import moebert
moebert.main()
"""


@pytest.mark.parametrize("when", ["torch", "transformers", "the end"])
def test_ctrl_c_before_and_after_the_work_is_quiet(when):
    """It showed the traceback of whatever was being imported, or "Aborted!", in the first seconds."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPT, "--version" if when == "the end" else "env", when],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == INTERRUPTED
    assert done.stderr == ""


def test_output_that_is_not_utf8_is_no_error():
    """Stops a finished run from ending in UnicodeEncodeError because its folder has an umlaut."""
    script = (
        "import typer\n"
        "from rich.console import Console\n"
        "from moebert_kernels.cli_command import run_app\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def say():\n"
        "    typer.echo('\\u00fc \\udcfc')\n"
        "    Console().print('\\u2192')\n"
        "run_app(app)\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\\u2192\n")
