import csv
import dataclasses
import html
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from typer.testing import CliRunner

import moebert_kernels
from moebert_kernels import cli, cli_command, cli_options
from moebert_kernels.cli import app
from moebert_kernels.cli_command import INTERRUPTED, USER_ERROR
from moebert_kernels.compress import demo
from moebert_kernels.compress.data.tasks import task_names
from moebert_kernels.compress.runs import pipeline
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.training.distillation import DistillSettings
from moebert_kernels.compress.training.finetuning import finetune
from moebert_kernels.errors import UserError
from moebert_kernels.models import ROUTINGS, MoEBertConfig
from tests import tiny
from tests.sentence_encoders import TEXTS, make_folder

WORDS = ["good", "bad", "a", "b", "c", "d"]
COMMANDS = ("demo", "finetune", "importance", "adapt", "distill", "evaluate", "compress", "env")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT classifier in teacher/, and reviews.csv, labelled by whether the text says good or bad."""
    folder = tmp_path_factory.mktemp("cli")
    with (folder / "reviews.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["review", "stars"])
        filler = ["a", "b c", "d a b", "c c c d"]
        table.writerows(
            [f"{filler[i % 4]} {('bad', 'good')[i % 2]}", ("low", "high")[i % 2]] for i in range(40)
        )
    words = tiny.tokenizer(folder, WORDS, model_max_length=16)
    changes = {"vocab_size": len(words), "id2label": {0: "high", 1: "low"}}
    teacher = tiny.initialised(BertForSequenceClassification, **tiny.SMALLER, **changes)
    for saved in (teacher, words):
        saved.save_pretrained(folder / "teacher")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("years of work")
    shutil.copytree(folder / "teacher", folder / "another")
    shutil.copytree(folder / "teacher", folder / "untokenized", ignore=shutil.ignore_patterns("*token*"))
    return folder


@pytest.fixture
def call(folder, monkeypatch):
    """Run the command in `folder`; the two outputs apart, wide enough for no line to be broken."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")

    def run(command):
        return CliRunner().invoke(app, command.split())

    return run


COMPRESS = "compress --teacher teacher --output x --measure-length 8"
TABLE = "--task csv --data reviews.csv --text-column review --label-column stars --max-length 12"


def assert_user_error(result, *words):
    """One sentence on stderr, exit code 2, no traceback."""
    assert result.exit_code == USER_ERROR
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.output


def test_compress_end_to_end(call, folder):
    command = (
        f"compress --teacher teacher {TABLE} --output out --epochs 1 --measure-length 8 --compare random"
    )
    result = call(command)
    assert result.exit_code == 0, result.output + result.stderr
    for expected in ("student before distillation", "random split", "importance:", "distill student:"):
        assert expected in result.stdout
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [model["name"] for model in results["models"]][:1] == ["teacher"]
    assert results["settings"]["expert_size"] == 8
    assert "MoEBERT on reviews" in (folder / "out" / "report.html").read_text()
    student = AutoModelForSequenceClassification.from_pretrained(folder / "out" / "student")
    assert isinstance(student.config, MoEBertConfig)

    again = call(command)
    assert again.exit_code == 0
    assert "distill student: reused" in again.stdout
    assert json.loads((folder / "out" / "results.json").read_text()) == results


def test_what_makes_results_say_little_stands_in_results_report_and_terminal(call, folder):
    """A teacher that has learned nothing, few rows and empty texts were accepted without a word."""
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    torch.nn.init.zeros_(teacher.classifier.weight)
    shutil.copytree(folder / "teacher", folder / "dull")
    teacher.save_pretrained(folder / "dull")
    (folder / "odd.csv").write_text((folder / "reviews.csv").read_text() + " ,low\n")
    options = TABLE.replace("reviews", "odd") + " --no-distill --no-fit --no-measure"
    with pytest.warns(UserWarning, match="is empty") as at_once:
        result = call(f"compress --teacher dull {options} --output odd")
    assert result.exit_code == 0, result.output + result.stderr
    told = json.loads((folder / "odd" / "results.json").read_text())["warnings"]
    assert told[0].startswith("odd.csv, line 42: the text in column 'review' is empty")
    assert told[1] == "Scores say little: there are 4 rows to validate on, fewer than 30."
    assert told[2].startswith("The teacher is no better than one answer to all rows would be: accuracy 0.500")
    assert [str(warning.message) for warning in at_once] == told[:1]
    assert [sentence in result.stdout for sentence in told] == [False, True, True]
    report = html.unescape((folder / "odd" / "report.html").read_text())
    assert all(sentence in report for sentence in told)


def test_a_moe_is_no_teacher(call):
    """It was said to have no feed-forward network."""
    made = call("adapt --teacher teacher --random-split --no-fit --output experts")
    assert made.exit_code == 0, made.output + made.stderr
    result = call("adapt --teacher experts --random-split --no-fit --output x")
    assert_user_error(result, "the model in experts is a MoE already")


@pytest.mark.parametrize("fit", ["", "--no-fit "])
def test_the_stages_one_by_one_make_what_compress_makes(call, folder, fit):
    """Fitted, the same rows are held out; and as in the paper, when none are."""
    one, every = f"one{fit.strip()}", f"all{fit.strip()}"
    common = f"--teacher teacher {TABLE}"
    said = {}
    for command in (
        f"importance {common} --per-token --output {one}/scores.safetensors",
        f"adapt {common} --importance {one}/scores.safetensors --routing hash-affinity {fit}"
        f"--output {one}/adapted",
        f"distill --student {one}/adapted {common} --epochs 1 --output {one}/student",
        f"evaluate --model {one}/student {TABLE} --output {one}/metrics.json",
        f"compress {common} --epochs 1 {fit}--no-measure --output {every}",
    ):
        result = call(command)
        assert result.exit_code == 0, command + result.output + result.stderr
        said[command.split()[0]] = result.stdout.splitlines()[-1]
    assert said["distill"] == f"see how good it is: moebert evaluate --model {one}/student {TABLE}"
    mine = AutoModelForSequenceClassification.from_pretrained(folder / one / "student")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / every / "student")
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name
    models = json.loads((folder / every / "results.json").read_text())["models"]
    quality = {model["name"]: model["quality"] for model in models}
    assert json.loads((folder / one / "metrics.json").read_text()) == quality["student"]
    assert not list((folder / one / "student").glob("checkpoints-*"))


def test_teacher_and_text_in_student_out(call, folder):
    """No label, no training, no name of a task; csv without a label column, and step by step."""
    rows = (folder / "reviews.csv").read_text().splitlines()
    texts = [row.rsplit(",", 1)[0] for row in rows[1:]]
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "texts.csv").write_text("\n".join(["text", *texts]))
    for data, out in (("texts.txt", "plain"), ("texts.csv --task csv", "table")):
        result = call(f"compress --teacher teacher --data {data} --no-distill --no-measure --output {out}")
        assert result.exit_code == 0, result.output + result.stderr
        assert {"agreement", "divergence"} <= set(result.stdout.split())
        assert "wrong" in result.stdout  # of what a layer puts out
        assert "held out; no labels" in result.stdout
        assert "one answer to all rows" not in result.stdout
        results = json.loads((folder / out / "results.json").read_text())
        assert set(results["models"][1]["quality"]) == {"agreement", "divergence"}
        assert results["losses"] == {}
        AutoModelForSequenceClassification.from_pretrained(folder / out / "student")
    for command in (
        "importance --teacher teacher --data texts.txt --output texts.safetensors",
        "adapt --teacher teacher --importance texts.safetensors --data texts.txt --output from-texts",
        "distill --student from-texts --teacher teacher --data texts.txt --epochs 0.1 --output distilled",
    ):
        result = call(command)
        assert result.exit_code == 0, command + result.output + result.stderr
        if command.startswith("adapt"):
            assert "is wrong" in " ".join(result.stdout.split())


def test_affinity_step_by_step(call, folder):
    result = call(f"importance --teacher teacher {TABLE} --output plain.safetensors")
    assert result.exit_code == 0, result.output + result.stderr
    adapt = f"adapt --teacher teacher --routing hash-affinity --experts 8 --expert-size 16 --shared 4 {TABLE}"
    result = call(f"{adapt} --importance plain.safetensors --output affine")
    assert result.exit_code == 2
    assert_user_error(result, "--importance: plain.safetensors has no scores", "importance --per-token`")
    assert "compute_importance" not in result.stderr
    result = call(f"importance --teacher teacher {TABLE} --per-token --output tokens.safetensors")
    assert result.exit_code == 0, result.output + result.stderr
    result = call(f"{adapt} --importance tokens.safetensors --output affine")
    assert result.exit_code == 0, result.output + result.stderr
    config = json.loads((folder / "affine" / "config.json").read_text())
    assert (config["routing"], config["num_experts"], config["num_shared_neurons"]) == ("hash-affinity", 8, 4)


def test_finetune_makes_a_teacher(call, folder):
    result = call(f"finetune --model teacher {TABLE} --epochs 1 --lr 1e-3 --output fresh")
    assert result.exit_code == 0, result.output + result.stderr
    assert "accuracy" in result.stdout
    assert AutoModelForSequenceClassification.from_pretrained(folder / "fresh").config.num_labels == 2


def test_the_seed_of_training_does_not_move_held_out_rows(call, monkeypatch):
    """Stops a student from being validated on its teacher's training rows when --seed is changed between."""
    seen = []

    def take(settings, data, *others, **options):
        seen.append((settings.seed, data.validation["text"][:]))
        raise UserError("seen")

    monkeypatch.setattr(pipeline, "compress", take)
    for options in ("--seed 0", "--seed 1", "--seed 1 --split-seed 1"):
        call(f"{COMPRESS} {TABLE} {options}")
    (first, rows), (second, same_rows), (_, other_rows) = seen
    assert (first, second) == (0, 1)
    assert same_rows == rows
    assert other_rows != rows


def test_random_split_and_hash_balance(call, folder):
    result = call(f"adapt --teacher teacher --random-split --routing hash-balance {TABLE} --output balanced")
    assert result.exit_code == 0, result.output + result.stderr
    assert "4 experts of 8 neurons per layer, 5 of them shared" in result.stdout
    config = json.loads((folder / "balanced" / "config.json").read_text())
    assert config["routing"] == "hash-balance"


def test_published_importance_converts(call, folder):
    import pickle

    published = {"importance": [[3.0, 2.0, 1.0]] * 1, "idx": [[2, 0, 1]]}
    (folder / "importance_sst2.pkl").write_bytes(pickle.dumps(published))
    result = call("importance --convert importance_sst2.pkl --output converted.safetensors")
    assert result.exit_code == 0, result.output + result.stderr
    assert "1 layers of 3 neurons" in result.stdout
    assert Importance.load(folder / "converted.safetensors").scores_LF.tolist() == [[2.0, 1.0, 3.0]]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"compress --teacher nowhere {TABLE} --output x", ["--teacher: there is no folder nowhere"]),
        (f"compress --teacher reviews.csv {TABLE} --output x", ["--teacher: reviews.csv is a file"]),
        (
            "compress --teacher teacher --task sst2 --data nowhere --output x",
            ["--data: nowhere", "train.tsv"],
        ),
        ("compress --teacher teacher --task csv --data nowhere.csv --output x", ["--data: nowhere.csv"]),
        (
            f"{COMPRESS} {TABLE} --validation-data nowhere.csv",
            ["--validation-data: nowhere.csv is not a file"],
        ),
        ("compress --teacher teacher --output x", ["--task", "--data"]),
        ("finetune --model teacher --data texts.txt --output x", ["--task must be given"]),
        (
            "evaluate --model teacher --data reviews.csv --text-column review",
            ["--teacher must be given", "for labelled rows, name a task"],
        ),
        (
            "compress --teacher teacher --data reviews.csv --label-column stars --output x",
            ["--label-column does not apply to text without labels; for labelled rows, name a --task"],
        ),
        ("adapt --teacher teacher --random-split --output x", ["--data must be given", "--no-fit"]),
        (
            "compress --teacher teacher --task csv --data reviews.csv --output x",
            [
                "--data: reviews.csv has no column 'text' and no column 'label'",
                "its columns are review, stars; choose from them by --text-column, --label-column",
            ],
        ),
        (
            f"{COMPRESS} {TABLE} --pair-column other",
            ["has no column 'other'; its columns are review, stars;", "by --pair-column"],
        ),
        (
            "compress --teacher teacher --task sst2 --data . --text-column review --output x",
            ["belong to task csv"],
        ),
        (f"{COMPRESS} {TABLE} --validation-data reviews.csv --validation-fraction 0.2", ["not both"]),
        (
            f"{COMPRESS} {TABLE} --routing hash-random --experts 4 --expert-size 16 --shared 0",
            ["need 64", "32"],
        ),
        (
            f"{COMPRESS} {TABLE} --expert-size 8 --shared 9",
            ["--shared must be 0 to the expert size 8, got 9"],
        ),
        (f"{COMPRESS} {TABLE} --expert-size 99", ["--expert-size must be 1 to the dense width 32, got 99"]),
        (f"{COMPRESS} {TABLE} --experts 0", ["at least 1", "got 0"]),
        (f"{COMPRESS} {TABLE} --top-k 2", ["--top-k must be 1, got 2", "hash-affinity"]),
        (f"{COMPRESS} {TABLE} --epochs 0", ["--epochs must be more than 0"]),
        (f"{COMPRESS} {TABLE} --compare narrow,best", ["--compare must be from random, narrow", "'best'"]),
        (f"{COMPRESS} {TABLE} --seeds 0", ["--seeds must be at least 1, got 0"]),
        (f"{COMPRESS} {TABLE} --lr -1", ["--lr must be more than 0, got -1"]),
        (f"{COMPRESS} {TABLE} --lr 1e9", ["--lr must be less than 1, got 1e+09"]),
        (f"finetune --model teacher {TABLE} --lr 1e9 --output x", ["--lr must be less than 1"]),
        (f"{COMPRESS} {TABLE} --measure-length 99", ["--measure-length is 99", "at most 16"]),
        (f"{COMPRESS} {TABLE} --no-measure", ["--measure-length must not be given", "got 8"]),
        (f"{COMPRESS} {TABLE} --no-distill --lr 1e-4", ["--lr must not be given where nothing is trained"]),
        (
            f"compress --teacher teacher {TABLE} --measure-length 8 --output teacher",
            ["already holds a model"],
        ),
        (f"compress --teacher teacher {TABLE} --output another", ["--output: another already holds a model"]),
        (f"compress --teacher teacher {TABLE} --output reviews.csv", ["--output: reviews.csv is a file"]),
        (
            f"compress --teacher teacher {TABLE} --measure-length 8 --output mine",
            [
                "--output: mine holds thesis.tex, which no run of this command has made",
                "an empty output folder",
            ],
        ),
        (
            "adapt --teacher teacher --random-split --no-fit --output mine",
            ["--output: mine holds thesis.tex: give a new or an empty"],
        ),
        (f"compress --teacher untokenized {TABLE} --output x", ["--teacher: untokenized holds no tokenizer"]),
        (f"importance --teacher untokenized {TABLE} --output x.safetensors", ["holds no tokenizer"]),
        (f"evaluate --model untokenized {TABLE}", ["--model: untokenized holds no tokenizer"]),
        (f"evaluate --model teacher {TABLE.replace('12', '17')}", ["--max-length is 17", "at most 16"]),
        (
            f"importance --teacher teacher {TABLE.replace('12', '17')} --output x.safetensors",
            ["--max-length is 17"],
        ),
        (
            f"importance --teacher teacher {TABLE} --output reviews.csv",
            ["--output: reviews.csv must be named .safetensors"],
        ),
        (
            f"importance --teacher teacher {TABLE} --output teacher/model.safetensors",
            ["does not hold importance scores"],
        ),
        (f"evaluate --model teacher {TABLE} --output teacher", ["must be a file named .json"]),
        ("compress --teacher teacher --task csv --output x", ["--data must be given"]),
        ("compress --teacher teacher --task csv --data hub --output x", ["task csv has no data set"]),
        ("compress --teacher teacher --task sst2 --data hub: --output x", ["'hub:' lacks a name"]),
        (f"compress --teacher teacher {TABLE} --n-best 5 --output x", ["belong to squad and squad_v2"]),
        ("evaluate --model teacher --task squad --data . --n-best 0", ["--n-best must be at least 1, got 0"]),
        ("evaluate --model teacher --task squad --data .", ["no train-v1.1.json nor train.json"]),
        ("evaluate --model teacher --task conll --data .", ["no train file"]),
        (f"importance {TABLE} --output x", ["--teacher", "--convert"]),
        ("importance --teacher teacher --output x", ["--task and --data must be given"]),
        ("importance --convert reviews.csv --output x.safetensors", ["--convert: reviews.csv"]),
        ("adapt --teacher teacher --output x", ["--importance", "--random-split"]),
        (
            "adapt --teacher teacher --importance nowhere --no-fit --output x",
            ["--importance: there is no importance file nowhere"],
        ),
        ("adapt --teacher teacher --random-split --routing hash-balance --output x", ["--task"]),
        ("adapt --teacher teacher --random-split --routing hash-affinity --output x", ["--task"]),
        (
            f"adapt --teacher teacher --random-split --routing hash-affinity {TABLE} --output x",
            ["--routing must not be hash-affinity in a split at random"],
        ),
        ("adapt --teacher teacher --random-split --no-fit --output teacher", ["already holds a model"]),
        (
            f"distill --student teacher --teacher teacher {TABLE} --output x",
            ["--student: ", "no experts", "moebert adapt"],
        ),
        (f"evaluate --model nowhere {TABLE}", ["--model: there is no folder nowhere"]),
        (
            f"finetune --model nowhere/at/all {TABLE} --output x",
            ["--model: there is no folder nowhere/at/all", "the hub"],
        ),
        (f"finetune --model teacher {TABLE} --output teacher", ["--output: teacher exists already"]),
    ],
)
def test_wrong_input_gets_one_sentence(call, folder, command, words):
    before = sorted(folder.rglob("*"))
    assert_user_error(call(command), *words)
    assert sorted(folder.rglob("*")) == before, "something was begun"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "compress --routing hash-fancy --teacher t --output o",
            ["hash-fancy", "hash-balance", "gate-token"],
        ),
        ("compress --task imdb --teacher t --output o", ["imdb", "sst2", "csv"]),
        ("compress --output o", ["--teacher"]),
        ("compress --task sst --teacher t --output o", ["--task", "'sst' is not one of"]),
        ("compress --epochs many --teacher t --output o", ["--epochs", "valid number"]),
        ("bench ffn --tokens x", ["--tokens", "'x'"]),
        ("squeeze", ["squeeze"]),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_imported(call, monkeypatch, command, words):
    monkeypatch.setattr(cli_command, "import_libraries", pytest.fail)
    result = call(command)
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr


def test_a_process_of_its_own_says_it_on_stderr():
    """What the tests above see through a runner, once for real: stderr, exit code, standard output empty."""
    command = ["moebert_kernels.cli", "evaluate", "--model", "x", "--task", "csv", "--data", "y.csv"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == USER_ERROR
    assert done.stdout == ""
    assert "y.csv" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_how_to_go_on(call, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress", interrupt)
    result = call(f"{COMPRESS} {TABLE}")
    assert result.exit_code == INTERRUPTED == 130
    assert result.stderr.strip() == "interrupted; run the same command again to go on"


def test_being_terminated_is_like_ctrl_c(tmp_path, monkeypatch):
    """A scheduler or `timeout` sends SIGTERM, which ends a process without a word by default."""
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["moebert", "demo"])
    told = tmp_path / "told"
    child = os.fork()  # which has imported everything
    if child == 0:
        try:
            sys.stderr = told.open("w")
            cli.main()
        except SystemExit as left:
            sys.stderr.flush()
            os._exit(left.code)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == INTERRUPTED
    assert told.read_text().strip() == "interrupted; run the same command again to go on"


def test_a_defect_keeps_its_traceback(call, monkeypatch):
    """Only what a user can put right is said without one: a plain ValueError is ours."""

    def fail(*args, **kwargs):
        raise ValueError("shapes differ")

    monkeypatch.setattr(pipeline, "compress", fail)
    result = call(f"{COMPRESS} {TABLE}")
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_help_names_every_command_and_shows_how_to_begin(call):
    text = call("--help").stdout
    for name in COMMANDS:
        assert re.search(rf"^\W*{name}\s", text, re.MULTILINE), name
    assert "moebert demo" in text
    assert "moebert compress --teacher" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example_or_needs_none(call, name):
    result = call(f"{name} --help")
    assert result.exit_code == 0
    if name not in ("demo", "env"):
        assert f"moebert {name} --" in result.stdout


def test_help_offers_a_task_to_the_commands_that_know_it(call):
    """Stops a command from explaining embed, and refusing it."""
    for name in COMMANDS:
        listed = re.sub(r"[^a-z0-9_|]", "", call(f"{name} --help").stdout)
        assert ("|embed" in listed) == (name in ("compress", "importance", "adapt", "distill", "evaluate")), (
            name
        )
        if name not in ("demo", "env"):
            assert "|".join(task_names()) in listed, name


def test_help_of_compress_says_where_defaults_come_from(call):
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", call("compress --help").stdout).split())
    for expected in (
        "4 in the paper",
        "dense width / experts",
        "two thirds of the expert size",
        "1e-5 to 5e-5 in the paper",
        "1 to 5 in the paper",
        "goes on where it was",
    ):
        assert expected in text


def test_version(call):
    result = call("--version")
    assert result.exit_code == 0
    assert moebert_kernels.__version__ in result.stdout


def test_env_in_words_and_for_programs(call):
    text = call("env").stdout
    assert torch.__version__.split("+")[0] in text
    assert "PyTorch" in text
    found = json.loads(call("env --json").stdout)
    assert found["versions"]["torch"] in text
    (packing,) = (b for b in found["backends"] if b["name"] == "Batches without padding")
    packs, pads = packing["detail"].split("; padded")
    assert "Bert, Roberta" in packs
    assert "MPNet, DebertaV2" in pads


def test_the_options_are_those_of_the_library():
    """The command line repeats names and defaults to answer without importing the library."""
    assert cli_options.Routing.__args__ == ROUTINGS
    assert cli_options.TaskName.__args__ == (*task_names(), "embed")
    theirs = {field.name: field.default for field in dataclasses.fields(CompressSettings)}
    mine = cli_options.compress_settings(
        cli_options.RunOptions(), cli_options.ExpertOptions(), cli_options.DistillOptions()
    )
    assert dataclasses.asdict(mine) == theirs
    assert theirs["comparisons"] == ()  # each costs as much as the student
    assert DistillSettings().epochs == theirs["epochs"]
    signature = inspect.signature(finetune).parameters
    for field in dataclasses.fields(cli_options.FinetuneOptions):
        assert signature[field.name].default == field.default, field.name


def test_a_model_that_embeds_sentences_end_to_end(call, folder):
    make_folder(folder / "embedder")
    (folder / "sentences.txt").write_text("\n".join(TEXTS))
    pairs = "\n".join(f"{a},{b},{i}" for i, (a, b) in enumerate(itertools.pairwise(TEXTS)))
    (folder / "pairs.csv").write_text(f"one,two,score\n{pairs}\n")
    result = call(
        "compress --teacher embedder --task embed --data sentences.txt --output embedded --epochs 1 "
        "--batch-size 8 --measure-length 8 --pairs pairs.csv --text-column one --pair-column two "
        "--label-column score --routing gate-token"
    )
    assert result.exit_code == 0, result.output + result.stderr
    for expected in ("spearman", "distill student, epoch 1 of 1: fullest expert "):
        assert expected in result.stdout
    results = json.loads((folder / "embedded" / "results.json").read_text())
    assert set(results["models"][-1]["quality"]) == {"cosine", "similarity_spearman", "spearman_pairs"}
    assert "MoEBERT on sentence embeddings" in (folder / "embedded" / "report.html").read_text()
    assert (folder / "embedded" / "student" / "modules.json").is_file()


def test_a_model_that_embeds_sentences_stage_by_stage(call, folder):
    make_folder(folder / "embedder-2")
    (folder / "sentences.txt").write_text("\n".join(TEXTS))
    (folder / "pairs-2.csv").write_text(
        "text,text_pair,label\n"
        + "\n".join(f"{a},{b},{i}" for i, (a, b) in enumerate(itertools.pairwise(TEXTS)))
    )
    rows = "--task embed --data sentences.txt"
    for command in (
        f"importance --teacher embedder-2 {rows} --output s.safetensors --per-token",
        f"adapt --teacher embedder-2 {rows} --importance s.safetensors --output cut --routing hash-affinity",
        f"distill --teacher embedder-2 --student cut {rows} --output taught --epochs 1 --batch-size 8",
        f"evaluate --model taught --teacher embedder-2 {rows} --output against.json",
        f"evaluate --model taught {rows} --pairs pairs-2.csv --output pairs.json",
        "adapt --teacher embedder-2 --random-split --no-fit --output dealt",
    ):
        result = call(command)
        assert result.exit_code == 0, result.output + result.stderr
    for name in ("cut", "taught", "dealt"):
        assert (folder / name / "modules.json").is_file(), name
    assert set(json.loads((folder / "against.json").read_text())) == {"cosine", "similarity_spearman"}
    assert set(json.loads((folder / "pairs.json").read_text())) == {"spearman_pairs"}


def test_texts_are_scored_against_a_teacher(call, folder):
    (folder / "some.txt").write_text("\n".join(TEXTS))
    result = call("evaluate --model teacher --teacher teacher --data some.txt --output same.json")
    assert result.exit_code == 0, result.output + result.stderr
    found = json.loads((folder / "same.json").read_text())
    assert found == pytest.approx({"agreement": 1.0, "divergence": 0.0}, abs=1e-6)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "finetune --model teacher --output x --task embed --data sentences.txt",
            ["--task embed has no labels"],
        ),
        (
            "evaluate --model teacher --data sentences.txt",
            ["--teacher must be given: rows without labels are scored against a teacher"],
        ),
        (
            f"evaluate --model teacher --teacher teacher {TABLE}",
            ["--teacher must not be given where rows have labels"],
        ),
        (
            "export teacher --output x --check --task embed --data sentences.txt",
            ["--task embed does not apply to export"],
        ),
        (f"{COMPRESS} {TABLE} --pairs p.csv", ["--pairs", "belongs to --task embed"]),
        (
            f"{COMPRESS} --task embed --data s.txt --kind regression",
            ["--kind does not apply to --task embed"],
        ),
        (f"{COMPRESS} --task embed", ["--data must be given"]),
        (f"{COMPRESS} --task embed --data s.txt", ["--data: s.txt is not a file"]),
        (f"{COMPRESS} --task embed --data {__file__}", [f"--data: {__file__} must be named .csv"]),
        (
            "compress --teacher nowhere --output x --task embed --data sentences.txt",
            ["--teacher: there is no nowhere/modules.json"],
        ),
        (
            f"{COMPRESS} --task embed --data sentences.txt --pairs mine",
            ["--pairs: mine/train.tsv is not a file"],
        ),
    ],
)
def test_options_of_embedding_that_do_not_fit(call, folder, command, words):
    (folder / "sentences.txt").write_text("\n".join(TEXTS))
    assert_user_error(call(command), *words)


def test_shared_neurons_are_tied_on_demand():
    from moebert_kernels.cli_options import ExpertOptions, compress_settings

    assert not compress_settings(ExpertOptions()).tie_shared
    assert compress_settings(ExpertOptions(tie_shared=True)).tie_shared
