import csv
import dataclasses
import html
import inspect
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import moebert_kernels
from moebert_kernels import cli, cli_command, cli_options
from moebert_kernels.cli_command import INTERRUPTED, USER_ERROR
from moebert_kernels.compress import demo
from moebert_kernels.compress.data.files import read_json
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


TABLE = "--task csv --data reviews.csv --text-column review --label-column stars --max-length 12"
# What commands begin with; of an option that is given twice, the second counts.
TEACHER = "--teacher teacher --output x"
COMPRESS = f"compress {TEACHER} --measure-length 8 {TABLE}"
IMPORTANCE = f"importance {TEACHER}.safetensors {TABLE}"
ADAPT = f"adapt {TEACHER} --random-split"
FINETUNE = f"finetune --model teacher --output x {TABLE}"
EVALUATE = "evaluate --model teacher"
EMBED = f"compress {TEACHER} --measure-length 8 --task embed"


def assert_user_error(result, *words):
    """One sentence on stderr, exit code 2, no traceback."""
    assert result.exit_code == USER_ERROR
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.output


def test_compress_end_to_end(run, folder):
    command = f"{COMPRESS} --output out --epochs 1 --compare random"
    told = run(command)
    for expected in ("student before distillation", "random split", "importance:", "distill student:"):
        assert expected in told
    results = read_json(folder / "out" / "results.json")
    assert results["models"][0]["name"] == "teacher"
    assert results["settings"]["expert_size"] == 8
    assert "MoEBERT on reviews" in (folder / "out" / "report.html").read_text()
    student = AutoModelForSequenceClassification.from_pretrained(folder / "out" / "student")
    assert isinstance(student.config, MoEBertConfig)

    assert "distill student: reused" in run(command)
    assert read_json(folder / "out" / "results.json") == results


def test_what_makes_results_say_little_stands_in_results_report_and_terminal(run, folder):
    """A teacher that has learned nothing, few rows and empty texts were accepted without a word."""
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    torch.nn.init.zeros_(teacher.classifier.weight)
    shutil.copytree(folder / "teacher", folder / "dull")
    teacher.save_pretrained(folder / "dull")
    (folder / "odd.csv").write_text((folder / "reviews.csv").read_text() + " ,low\n")
    options = TABLE.replace("reviews", "odd") + " --no-distill --no-fit --no-measure"
    with pytest.warns(UserWarning, match="is empty") as at_once:
        printed = run(f"compress --teacher dull {options} --output odd")
    told = read_json(folder / "odd" / "results.json")["warnings"]
    assert told[0].startswith("odd.csv, line 42: the text in column 'review' is empty")
    assert told[1] == "Scores say little: there are 4 rows to validate on, fewer than 30."
    assert told[2].startswith("The teacher is no better than one answer to all rows would be: accuracy 0.500")
    assert [str(warning.message) for warning in at_once] == told[:1]
    assert [sentence in printed for sentence in told] == [False, True, True]
    report = html.unescape((folder / "odd" / "report.html").read_text())
    assert all(sentence in report for sentence in told)


def test_a_moe_is_no_teacher(call, run):
    """It was said to have no feed-forward network."""
    run(f"{ADAPT} --no-fit --output experts")
    result = call(f"{ADAPT} --no-fit --teacher experts")
    assert_user_error(result, "the model in experts is a MoE already")


@pytest.mark.parametrize("fit", ["", "--no-fit "])
def test_the_stages_one_by_one_make_what_compress_makes(run, folder, fit):
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
        said[command.split()[0]] = run(command).splitlines()[-1]
    assert said["distill"] == f"see how good it is: moebert evaluate --model {one}/student {TABLE}"
    mine, theirs = (
        AutoModelForSequenceClassification.from_pretrained(folder / out / "student") for out in (one, every)
    )
    tiny.assert_same(mine.state_dict(), theirs.state_dict())
    models = read_json(folder / every / "results.json")["models"]
    quality = {model["name"]: model["quality"] for model in models}
    assert read_json(folder / one / "metrics.json") == quality["student"]
    assert not list((folder / one / "student").glob("checkpoints-*"))


def test_teacher_and_text_in_student_out(run, folder):
    """No label, no training, no name of a task; csv without a label column, and step by step."""
    rows = (folder / "reviews.csv").read_text().splitlines()
    texts = [row.rsplit(",", 1)[0] for row in rows[1:]]
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "texts.csv").write_text("\n".join(["text", *texts]))
    for data, out in (("texts.txt", "plain"), ("texts.csv --task csv", "table")):
        told = run(f"compress --teacher teacher --data {data} --no-distill --no-measure --output {out}")
        assert {"agreement", "divergence"} <= set(told.split())
        assert "wrong" in told  # of what a layer puts out
        assert "held out; no labels" in told
        assert "one answer to all rows" not in told
        results = read_json(folder / out / "results.json")
        assert set(results["models"][1]["quality"]) == {"agreement", "divergence"}
        assert results["losses"] == {}
        AutoModelForSequenceClassification.from_pretrained(folder / out / "student")
    given = "--teacher teacher --data texts.txt"
    run(f"importance {given} --output texts.safetensors")
    told = run(f"adapt {given} --importance texts.safetensors --output from-texts")
    assert "is wrong" in " ".join(told.split())
    run(f"distill {given} --student from-texts --epochs 0.1 --output distilled")


def test_affinity_step_by_step(call, run, folder):
    run(f"{IMPORTANCE} --output plain.safetensors")
    adapt = f"adapt --teacher teacher --routing hash-affinity --experts 8 --expert-size 16 --shared 4 {TABLE}"
    result = call(f"{adapt} --importance plain.safetensors --output affine")
    assert_user_error(result, "--importance: plain.safetensors has no scores", "importance --per-token`")
    assert "compute_importance" not in result.stderr
    run(f"{IMPORTANCE} --per-token --output tokens.safetensors")
    run(f"{adapt} --importance tokens.safetensors --output affine")
    expected = {"routing": "hash-affinity", "num_experts": 8, "num_shared_neurons": 4}
    assert expected.items() <= read_json(folder / "affine" / "config.json").items()


def test_finetune_makes_a_teacher(run, folder):
    assert "accuracy" in run(f"{FINETUNE} --epochs 1 --lr 1e-3 --output fresh")
    assert AutoModelForSequenceClassification.from_pretrained(folder / "fresh").config.num_labels == 2


def test_the_seed_of_training_does_not_move_held_out_rows(call, monkeypatch):
    """Stops a student from being validated on its teacher's training rows when --seed is changed between."""
    seen = []

    def take(settings, data, *others, **options):
        seen.append((settings.seed, data.validation["text"][:]))
        raise UserError("seen")

    monkeypatch.setattr(pipeline, "compress", take)
    for options in ("--seed 0", "--seed 1", "--seed 1 --split-seed 1"):
        call(f"{COMPRESS} {options}")
    (first, rows), (second, same_rows), (_, other_rows) = seen
    assert (first, second) == (0, 1)
    assert same_rows == rows
    assert other_rows != rows


def test_random_split_and_hash_balance(run, folder):
    told = run(f"{ADAPT} --routing hash-balance {TABLE} --output balanced")
    assert "4 experts of 8 neurons per layer, 5 of them shared" in told
    assert read_json(folder / "balanced" / "config.json")["routing"] == "hash-balance"


def test_published_importance_converts(run, folder):
    published = {"importance": [[3.0, 2.0, 1.0]], "idx": [[2, 0, 1]]}
    (folder / "importance_sst2.pkl").write_bytes(pickle.dumps(published))
    told = run("importance --convert importance_sst2.pkl --output converted.safetensors")
    assert "1 layers of 3 neurons" in told
    assert Importance.load(folder / "converted.safetensors").scores_LF.tolist() == [[2.0, 1.0, 3.0]]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"compress {TEACHER} --task sst2 --data nowhere", ["--data: nowhere", "train.tsv"]),
        (f"compress {TEACHER} --task csv --data nowhere.csv", ["--data: nowhere.csv"]),
        (f"{COMPRESS} --validation-data nowhere.csv", ["--validation-data: nowhere.csv is not a file"]),
        (f"compress {TEACHER}", ["--task", "--data"]),
        ("finetune --model teacher --data texts.txt --output x", ["--task must be given"]),
        (
            f"{EVALUATE} --data reviews.csv --text-column review",
            ["--teacher must be given", "for labelled rows, name a task"],
        ),
        (
            f"compress {TEACHER} --data reviews.csv --label-column stars",
            ["--label-column does not apply to text without labels; for labelled rows, name a --task"],
        ),
        (ADAPT, ["--data must be given", "--no-fit"]),
        (
            f"compress {TEACHER} --task csv --data reviews.csv",
            [
                "--data: reviews.csv has no column 'text' and no column 'label'",
                "its columns are review, stars; choose from them by --text-column, --label-column",
            ],
        ),
        (
            f"{COMPRESS} --pair-column other",
            ["has no column 'other'; its columns are review, stars;", "by --pair-column"],
        ),
        (f"compress {TEACHER} --task sst2 --data . --text-column review", ["belong to task csv"]),
        (f"{COMPRESS} --validation-data reviews.csv --validation-fraction 0.2", ["not both"]),
        (f"{COMPRESS} --routing hash-random --experts 4 --expert-size 16 --shared 0", ["need 64", "32"]),
        (f"{COMPRESS} --expert-size 8 --shared 9", ["--shared must be 0 to the expert size 8, got 9"]),
        (f"{COMPRESS} --expert-size 99", ["--expert-size must be 1 to the dense width 32, got 99"]),
        (f"{COMPRESS} --experts 0", ["at least 1", "got 0"]),
        (f"{COMPRESS} --top-k 2", ["--top-k must be 1, got 2", "hash-affinity"]),
        (f"{COMPRESS} --epochs 0", ["--epochs must be more than 0"]),
        (f"{COMPRESS} --compare narrow,best", ["--compare must be from random, narrow", "'best'"]),
        (f"{COMPRESS} --seeds 0", ["--seeds must be at least 1, got 0"]),
        (f"{COMPRESS} --lr -1", ["--lr must be more than 0, got -1"]),
        (f"{COMPRESS} --lr 1e9", ["--lr must be less than 1, got 1e+09"]),
        (f"{FINETUNE} --lr 1e9", ["--lr must be less than 1"]),
        (f"{COMPRESS} --measure-length 99", ["--measure-length is 99", "at most 16"]),
        (f"{COMPRESS} --no-measure", ["--measure-length must not be given", "got 8"]),
        (f"{COMPRESS} --no-distill --lr 1e-4", ["--lr must not be given where nothing is trained"]),
        (f"{COMPRESS} --output teacher", ["--output: teacher already holds a model"]),
        (f"{COMPRESS} --output another", ["--output: another already holds a model"]),
        (f"{COMPRESS} --output reviews.csv", ["--output: reviews.csv is a file"]),
        (
            f"{COMPRESS} --output mine",
            [
                "--output: mine holds thesis.tex, which no run of this command has made",
                "an empty output folder",
            ],
        ),
        (f"{ADAPT} --no-fit --output mine", ["--output: mine holds thesis.tex: give a new or an empty"]),
        (f"{COMPRESS} --teacher untokenized", ["--teacher: untokenized holds no tokenizer"]),
        (f"{IMPORTANCE} --teacher untokenized", ["holds no tokenizer"]),
        (f"{EVALUATE} --model untokenized {TABLE}", ["--model: untokenized holds no tokenizer"]),
        (f"{EVALUATE} {TABLE} --max-length 17", ["--max-length is 17", "at most 16"]),
        (f"{IMPORTANCE} --max-length 17", ["--max-length is 17"]),
        (f"{IMPORTANCE} --output reviews.csv", ["--output: reviews.csv must be named .safetensors"]),
        (f"{IMPORTANCE} --output teacher/model.safetensors", ["does not hold importance scores"]),
        (f"{EVALUATE} {TABLE} --output teacher", ["must be a file named .json"]),
        (f"compress {TEACHER} --task csv", ["--data must be given"]),
        (f"compress {TEACHER} --task csv --data hub", ["task csv has no data set"]),
        (f"compress {TEACHER} --task sst2 --data hub:", ["'hub:' lacks a name"]),
        (f"{COMPRESS} --n-best 5", ["belong to squad and squad_v2"]),
        (f"{EVALUATE} --task squad --data . --n-best 0", ["--n-best must be at least 1, got 0"]),
        (f"{EVALUATE} --task squad --data .", ["no train-v1.1.json nor train.json"]),
        (f"{EVALUATE} --task conll --data .", ["no train file"]),
        (f"importance {TABLE} --output x", ["--teacher", "--convert"]),
        (f"importance {TEACHER}", ["--task and --data must be given"]),
        ("importance --convert reviews.csv --output x.safetensors", ["--convert: reviews.csv"]),
        (f"adapt {TEACHER}", ["--importance", "--random-split"]),
        (
            f"adapt {TEACHER} --importance nowhere --no-fit",
            ["--importance: there is no importance file nowhere"],
        ),
        (f"{ADAPT} --routing hash-balance", ["--task"]),
        (f"{ADAPT} --routing hash-affinity", ["--task"]),
        (
            f"{ADAPT} --routing hash-affinity {TABLE}",
            ["--routing must not be hash-affinity in a split at random"],
        ),
        (f"{ADAPT} --no-fit --output teacher", ["already holds a model"]),
        (f"distill --student teacher {TEACHER} {TABLE}", ["--student: ", "no experts", "moebert adapt"]),
        ("export plain --output x", ["MODEL: plain"]),
        (f"{FINETUNE} --model nowhere/at/all", ["--model: there is no folder nowhere/at/all", "the hub"]),
        (f"{FINETUNE} --output teacher", ["--output: teacher exists already"]),
    ],
)
def test_wrong_input_gets_one_sentence(call, folder, command, words):
    before = sorted(folder.rglob("*"))
    assert_user_error(call(command), *words)
    assert sorted(folder.rglob("*")) == before, "something was begun"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"compress {TEACHER} --routing hash-fancy", ["hash-fancy", "hash-balance", "gate-token"]),
        (f"compress {TEACHER} --task imdb", ["imdb", "sst2", "csv"]),
        ("compress --output x", ["--teacher"]),
        (f"compress {TEACHER} --task sst", ["--task", "'sst' is not one of"]),
        (f"compress {TEACHER} --epochs many", ["--epochs", "valid number"]),
        (f"{COMPRESS} --teacher nowhere", ["--teacher", "'nowhere' does not exist"]),
        (f"{COMPRESS} --teacher reviews.csv", ["--teacher", "'reviews.csv' is a file"]),
        (f"{EVALUATE} --model nowhere {TABLE}", ["--model", "'nowhere' does not exist"]),
        ("export nowhere --output x", ["MODEL", "'nowhere' does not exist"]),
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


def in_a_process_of_its_own(folder, *words):
    """How the command ends, and what it prints on its two outputs; a fork of this process, which has imported
    everything."""
    paths = folder / "output", folder / "errors"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.stdout, sys.stderr = (path.open("w") for path in paths)
            sys.argv = ["moebert", *words]
            cli.main()
        except SystemExit as left:
            code = left.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *(path.read_text() for path in paths)


def test_a_process_of_its_own_says_it_on_stderr(tmp_path):
    """What the tests above see through a runner, once for real: stderr, exit code, standard output empty."""
    command = "evaluate --model . --task csv --data y.csv"
    code, output, errors = in_a_process_of_its_own(tmp_path, *command.split())
    assert (code, output) == (USER_ERROR, "")
    assert "y.csv" in errors
    assert "Traceback" not in errors


def test_ctrl_c_says_how_to_go_on(call, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress", interrupt)
    result = call(COMPRESS)
    assert result.exit_code == INTERRUPTED == 130
    assert result.stderr.strip() == "interrupted; run the same command again to go on"


def test_being_terminated_is_like_ctrl_c(tmp_path, monkeypatch):
    """A scheduler or `timeout` sends SIGTERM, which ends a process without a word by default."""
    monkeypatch.setattr(demo, "run_demo", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, errors = in_a_process_of_its_own(tmp_path, "demo")
    assert (code, errors.strip()) == (INTERRUPTED, "interrupted; run the same command again to go on")


def test_a_defect_keeps_its_traceback(call, monkeypatch):
    """Only what a user can put right is said without one: a plain ValueError is ours."""

    def fail(*args, **kwargs):
        raise ValueError("shapes differ")

    monkeypatch.setattr(pipeline, "compress", fail)
    result = call(COMPRESS)
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


@pytest.fixture(scope="module")
def sentences(folder):
    """A tiny model that embeds sentences in embedder/, sentences.txt, and pairs of them with scores."""
    make_folder(folder / "embedder")
    (folder / "sentences.txt").write_text("\n".join(TEXTS))
    pairs = "\n".join(f"{a},{b},{i}" for i, (a, b) in enumerate(itertools.pairwise(TEXTS)))
    for name, columns in (("pairs.csv", "text,text_pair,label"), ("named.csv", "one,two,score")):
        (folder / name).write_text(f"{columns}\n{pairs}\n")


@pytest.mark.usefixtures("sentences")
def test_a_model_that_embeds_sentences_end_to_end(run, folder):
    told = run(
        "compress --teacher embedder --task embed --data sentences.txt --output embedded --epochs 1 "
        "--batch-size 8 --measure-length 8 --pairs named.csv --text-column one --pair-column two "
        "--label-column score --routing gate-token"
    )
    for expected in ("spearman", "distill student, epoch 1 of 1: fullest expert "):
        assert expected in told
    results = read_json(folder / "embedded" / "results.json")
    assert set(results["models"][-1]["quality"]) == {"cosine", "similarity_spearman", "spearman_pairs"}
    assert "MoEBERT on sentence embeddings" in (folder / "embedded" / "report.html").read_text()
    assert (folder / "embedded" / "student" / "modules.json").is_file()


@pytest.mark.usefixtures("sentences")
def test_a_model_that_embeds_sentences_stage_by_stage(run, folder):
    rows = "--task embed --data sentences.txt"
    for command in (
        f"importance --teacher embedder {rows} --output s.safetensors --per-token",
        f"adapt --teacher embedder {rows} --importance s.safetensors --output cut --routing hash-affinity",
        f"distill --teacher embedder --student cut {rows} --output taught --epochs 1 --batch-size 8",
        f"evaluate --model taught --teacher embedder {rows} --output against.json",
        f"evaluate --model taught {rows} --pairs pairs.csv --output pairs.json",
        "adapt --teacher embedder --random-split --no-fit --output dealt",
    ):
        run(command)
    for name in ("cut", "taught", "dealt"):
        assert (folder / name / "modules.json").is_file(), name
    assert read_json(folder / "against.json").keys() == {"cosine", "similarity_spearman"}
    assert read_json(folder / "pairs.json").keys() == {"spearman_pairs"}


@pytest.mark.usefixtures("sentences")
def test_texts_are_scored_against_a_teacher(run, folder):
    run(f"{EVALUATE} --teacher teacher --data sentences.txt --output same.json")
    found = read_json(folder / "same.json")
    assert found == pytest.approx({"agreement": 1.0, "divergence": 0.0}, abs=1e-6)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"{FINETUNE} --task embed --data sentences.txt", ["--task embed has no labels"]),
        (
            f"{EVALUATE} --data sentences.txt",
            ["--teacher must be given: rows without labels are scored against a teacher"],
        ),
        (f"{EVALUATE} --teacher teacher {TABLE}", ["--teacher must not be given where rows have labels"]),
        (
            "export teacher --output x --check --task embed --data sentences.txt",
            ["--task embed does not apply to export"],
        ),
        (f"{COMPRESS} --pairs p.csv", ["--pairs", "belongs to --task embed"]),
        (f"{EMBED} --data s.txt --kind regression", ["--kind does not apply to --task embed"]),
        (EMBED, ["--data must be given"]),
        (f"{EMBED} --data s.txt", ["--data: s.txt is not a file"]),
        (f"{EMBED} --data {__file__}", [f"--data: {__file__} must be named .csv"]),
        (
            f"{EMBED} --data sentences.txt --teacher mine",
            ["--teacher: there is no mine/modules.json"],
        ),
        (f"{EMBED} --data sentences.txt --pairs mine", ["--pairs: mine/train.tsv is not a file"]),
    ],
)
@pytest.mark.usefixtures("sentences")
def test_options_of_embedding_that_do_not_fit(call, command, words):
    assert_user_error(call(command), *words)


def test_shared_neurons_are_tied_on_demand():
    assert not cli_options.compress_settings(cli_options.ExpertOptions()).tie_shared
    assert cli_options.compress_settings(cli_options.ExpertOptions(tie_shared=True)).tie_shared
