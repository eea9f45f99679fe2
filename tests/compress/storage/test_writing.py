"""A full disk, a folder that cannot be written: every writer says so, and leaves no part of a file."""

import errno
import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moebert_kernels.compress.demo import write_tables
from moebert_kernels.compress.report import page as report
from moebert_kernels.compress.report.page import write_report
from moebert_kernels.compress.runs.pipeline import compress
from moebert_kernels.compress.runs.stages import Stage
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.storage import artifacts
from moebert_kernels.compress.storage.artifacts import (
    claim,
    exclusive,
    fingerprint,
    replace_whole,
    workroom,
    write_json,
)
from moebert_kernels.compress.storage.loading import save_encoder
from moebert_kernels.compress.storage.writing import check_writable, explain, writing
from moebert_kernels.compress.training.finetuning import finetune
from moebert_kernels.errors import OutputError, UserError
from tests.compress.toys import SETTINGS, assert_same_outcome, make_data, make_teacher
from tests.full_disk import no_file_above


def failing(number):
    """Takes the place of a function of the system, which fails with that error."""
    return Mock(side_effect=OSError(number, os.strerror(number)))


@contextmanager
def as_nobody():
    """Without the rights of root, if the tests have them."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("writing") / "teacher")


@pytest.fixture
def locked_up(tmp_path):
    folder = tmp_path / "locked up"
    folder.mkdir(mode=0o555)
    return folder


def test_a_run_that_meets_a_full_disk_goes_on_when_there_is_room(teacher, tmp_path):
    """Each of the libraries that write has words of its own for it, and none names the folder."""
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    settings = replace(SETTINGS, epochs=1, routing="hash-random")  # scores smaller than experts
    compress(settings, make_data(), teacher, undisturbed)
    for size, folder, reason in (
        (500, output, "File too large"),  # importance, by safetensors
        (20_000, output / "work" / "student", "File too large"),  # the split model, by safetensors
        (200_000, output / "work" / "student" / "checkpoints-", "a file ended too early"),  # optimizer: torch
    ):
        with no_file_above(size), pytest.raises(OutputError) as told:
            compress(settings, make_data(), teacher, output)
        assert str(told.value).startswith(f"cannot write to the folder {folder}")
        assert reason in str(told.value)
        assert str(told.value).endswith("run the same command again")
        assert not list(output.rglob(".unfinished-*"))
        assert not (output / "results.json").exists()
        for path in output.rglob("*.safetensors"):
            if "checkpoint" not in str(path):
                assert safe_open(path, "pt").keys()
    compress(settings, make_data(), teacher, output)
    assert_same_outcome(undisturbed, output)


def test_fine_tuning_that_meets_a_full_disk_goes_on(teacher, tmp_path):
    message = r"cannot write to the folder .*fresh.*again"
    with no_file_above(200_000), pytest.raises(OutputError, match=message):
        finetune(teacher, make_data(), tmp_path / "fresh", epochs=1, batch_size=8)
    assert not (tmp_path / "fresh").exists()
    finetune(teacher, make_data(), tmp_path / "fresh", epochs=1, batch_size=8)
    assert (tmp_path / "fresh" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["fresh"]


def finish_stage(path):
    """With inputs that change each time, as it would do nothing otherwise."""
    Stage(path, str(os.urandom(8))).run(lambda: "result")


def save_model(path):
    teacher = path.parent.parent / "teacher"
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    save_encoder(model, AutoTokenizer.from_pretrained(teacher), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda path: write_json(path, [1])),
        ("report.html", lambda path: write_report({}, path)),
        ("scores.safetensors", lambda path: Importance(torch.ones(2, 3), "m", "t", 1).save(path)),
        ("model", save_model),
        ("stage.json", finish_stage),
        ("train.csv", lambda path: write_tables(make_data(), path.parent)),
    ],
)
def test_every_writer_leaves_what_was_there_when_it_cannot_write(name, write, tmp_path, monkeypatch):
    """Where a disk reports late that it is full, only syncing tells."""
    make_teacher(tmp_path / "teacher")
    monkeypatch.setattr(report, "render_report", lambda results: "page")
    room = tmp_path / "room"
    write(room / name)
    before = {path: path.read_bytes() for path in room.rglob("*") if path.is_file()}

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(OutputError) as told:
            write(room / name)
    assert str(told.value) == (
        f"cannot write to the folder {room}: No space left on device; make room there and run the same "
        "command again"
    )
    assert {path: path.read_bytes() for path in room.rglob("*") if path.is_file()} == before
    write(room / name)


def test_an_interruption_is_told_even_if_its_time_cannot_be_noted(tmp_path, monkeypatch):
    """A full disk must not turn Ctrl-C into another error."""
    stage = Stage(tmp_path / "stage.json", "made from")

    def work():
        monkeypatch.setattr(artifacts.os, "fsync", failing(errno.ENOSPC))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.run(work)
    monkeypatch.undo()
    assert stage.run(lambda: "result") == "result"


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: exclusive(folder).__enter__(),
        lambda folder: workroom(folder / "model", "made from").__enter__(),
        lambda folder: replace_whole(folder / "model").__enter__(),
        lambda folder: check_writable(folder),
        lambda folder: claim(folder),
    ],
)
def test_a_folder_without_permission(use, locked_up):
    message = "^cannot write to the folder .*locked up.*: Permission denied; get the right"
    with as_nobody(), pytest.raises(OutputError, match=message):
        use(locked_up)
    assert not list(locked_up.iterdir())


def test_a_workroom_holds_its_own_work_alone(tmp_path, monkeypatch):
    """Stops a folder of another's from being emptied, and one of ours from being refused after a kill."""
    output, room = tmp_path / "model", tmp_path / "model.unfinished"
    room.mkdir()
    with workroom(output, fingerprint(1)) as found:  # an empty folder does
        assert found == room
        (room / "checkpoint-1").mkdir()
        (room / "checkpoint-1" / "weights").touch()
    assert not room.exists()

    with suppress(KeyboardInterrupt), workroom(output, fingerprint(1)):
        (room / "checkpoint-1").mkdir()
        raise KeyboardInterrupt
    with suppress(KeyboardInterrupt), workroom(output, fingerprint(1)):
        assert (room / "checkpoint-1").is_dir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # while a call with other arguments clears it
        patched.setattr(artifacts.shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), workroom(output, fingerprint(2)):
            pass
    with workroom(output, fingerprint(1)):
        assert not (room / "checkpoint-1").exists()

    room.mkdir()
    (room / "made_from").write_text("flour and water")
    with pytest.raises(UserError, match="holds made_from, which no run"), workroom(output, fingerprint(1)):
        pass
    assert [path.name for path in room.iterdir()] == ["made_from"]


@pytest.mark.parametrize("use", [claim, check_writable, lambda folder: exclusive(folder).__enter__()])
def test_a_file_where_a_folder_should_be(use, tmp_path):
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(OutputError, match=r"file/out: .*file is a file; give another"):
        use(tmp_path / "file" / "out")
    with pytest.raises(UserError, match="file"):
        use(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "years of work"


def test_a_lock_that_cannot_be_noted_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.os, "write", failing(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left"), exclusive(tmp_path):
        pass
    monkeypatch.undo()
    with exclusive(tmp_path):
        pass


def test_a_file_system_without_locks_is_not_said_to_be_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.fcntl, "flock", failing(errno.ENOLCK))
    message = "No locks available; give another output folder"
    with pytest.raises(OutputError, match=message), exclusive(tmp_path):
        pass


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "give another output folder"),
        (errno.EIO, "see what is wrong with the disk"),
        (errno.ENOENT, "give another output folder"),
    ],
)
def test_what_to_do_depends_on_the_error(number, advice):
    told = explain(OSError(number, "a library's words"), Path("runs/a"))
    assert str(told).startswith("cannot write to the folder runs/a: ")
    assert advice in str(told)


def test_words_of_safetensors_and_torch_are_understood():
    """Neither raises an OSError; /dev/full is always full."""
    tensors = {"a": torch.zeros(100_000)}
    for save in (lambda: save_file(tensors, "/dev/full/a"), lambda: torch.save(tensors, "/dev/full")):
        with pytest.raises(OutputError, match="cannot write to the folder /dev: "), writing(Path("/dev")):
            save()


def test_other_errors_pass_as_they_are():
    for error in (ValueError("shapes differ"), RuntimeError("no memory"), KeyError("name"), OSError("odd")):
        with pytest.raises(type(error)) as passed, writing(Path("out")):
            raise error
        assert passed.value is error
    assert explain(BrokenPipeError(errno.EPIPE, "closed")) is None


def test_claimed_folders_are_empty_or_of_a_run(tmp_path):
    claim(tmp_path / "new")
    claim(tmp_path / "new")
    (tmp_path / "killed" / "work").mkdir(parents=True)
    (tmp_path / "killed" / ".lock").touch()
    claim(tmp_path / "killed")
    for held in ("work/notes.txt", "thesis.tex"):
        other = tmp_path / held.partition("/")[0]
        (other / held).parent.mkdir(parents=True)
        (other / held).touch()
        with pytest.raises(UserError, match="which no run of this command has made: give a new or an empty"):
            claim(other)
        assert [str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()] == [held]
