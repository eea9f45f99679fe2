"""Files and arguments that do not fit: a sentence that names them, nothing run, no memory taken."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from typer.testing import CliRunner

from moebert_kernels import (
    HashRouter,
    MoEFFN,
    RoutingPlan,
    SentenceGate,
    TokenGate,
    hash_random_tables,
    moe_ffn,
)
from moebert_kernels.cli import app
from moebert_kernels.compress.data.tasks import CsvOptions, load_task, match_labels
from moebert_kernels.compress.experts.adaptation import adapt, random_scores
from moebert_kernels.compress.scoring.importance import Importance, compute_importance
from moebert_kernels.compress.storage.loading import load_model
from moebert_kernels.compress.storage.sentence_encoder import load_sentence_encoder
from moebert_kernels.compress.training.finetuning import finetune
from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertConfig, replace_ffns, to_moe
from tests import tiny
from tests.smallest import WORDS, save_sentence_encoder, save_tokenizer, smallest
from tests.tiny import VOCAB, build, quarters


class Marker:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def make_model(folder: Path, model=None) -> Path:
    (model or smallest()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "model")


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def make_rows(folder: Path, text: str, name: str = "rows.csv"):
    (folder / name).write_text(text)
    return load_task("csv", folder / name)


ROWS = "text,label\n" + "w1 w2,low\nw3,high\n" * 4


def test_pickled_weights_are_never_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Marker(tmp_path / "read")))
        for load in (load_model, lambda f: finetune(f, make_rows(tmp_path, ROWS), tmp_path / "out")):
            with pytest.raises(UserError, match=rf"{name} is a pickle, which can run any code"):
                load(folder)
        (folder / name).unlink()
    assert not (tmp_path / "read").exists()


def test_the_way_from_a_pickle_to_safetensors_is_told_and_leads_there(tmp_path, monkeypatch):
    """Stops a user whose teacher is a pytorch_model.bin from being sent away to whoever made it."""
    folder = make_model(tmp_path / "a model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is a pickle.* python -c") as told:
        load_model(folder)
    python, option, script = shlex.split(str(told.value).partition("nothing: ")[2])
    assert (python, option) == ("python", "-c")
    exec(script, {})
    assert len((folder / "model.safetensors").read_bytes()) == len(weights)
    load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marker(tmp_path / "read")))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        exec(script, {})
    assert not (tmp_path / "read").exists()


def test_code_beside_a_model_is_never_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'read')!r}, 'w')")
    evil = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    change_config(folder, auto_map=evil | {"AutoTokenizer": ["evil.Tokenizer", None]})
    load_model(folder)
    change_config(folder, model_type="evil")
    with pytest.raises(UserError, match=r"config\.json is not the configuration of a model"):
        load_model(folder)
    assert not (tmp_path / "read").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected no more than"),
        ({"vocab_size": 10**30}, "vocab_size is about 2.100, expected no more than"),
        ({"num_hidden_layers": 500}, "num_hidden_layers is 500, expected no more than"),
        ({"num_labels": 26, "id2label": None}, "num_labels is 26, expected no more than 25"),
        ({"hidden_size": 12}, r"embeddings.* is \[.*8\], but .*config\.json asks for \[.*12\]"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan"),
        ({"num_attention_heads": 0}, r"config\.json does not describe a model that can be built"),
        ({"hidden_size": "8"}, r"config\.json is not the configuration of a model"),
        ({"architectures": "BertModel"}, "architectures must be a list of class names, found 'BertModel'"),
        ({"model_type": None}, "must say its model_type, found None"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation 'someone/kernel' is code to be"),
        ({"quantization_config": {"bits": 4}}, "quantization_config, found .*plain weights"),
        ({"add_cross_attention": True, "is_decoder": True}, "lack bert.*crossattention.* and .* more"),
    ],
)
def test_a_configuration_that_its_weights_contradict_is_refused(folder, values, message):
    change_config(folder, **values)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_notes_of_the_user_in_a_configuration_are_nobodys_business(folder, tmp_path):
    """Stops a time stamp, or whatever else sizes nothing, from making a model be refused as hostile."""
    notes = {"trained_at": 1764000000, "notes": {"rows": 10**12, "loss": float("inf")}, "task_id": [10**9]}
    change_config(folder, **notes)
    assert load_model(folder)[0].config.trained_at == 1764000000
    moe = to_moe(load_model(folder)[0], torch.arange(16).view(1, 4, 4), num_shared_neurons=0)
    loaded, _ = load_model(make_model(tmp_path / "moe", moe))
    assert loaded.config.notes["rows"] == 10**12


@pytest.mark.parametrize("key", ["position_buckets", "conv_kernel_size", "attention_head_size"])
def test_what_is_read_without_being_declared_is_held_against_the_weights(folder, key):
    """Stops a key that DeBERTa's code asks for, and its configuration's class lacks, from any size."""
    change_config(folder, model_type="deberta-v2", **{key: 10**9})
    with pytest.raises(UserError, match=f"{key} is 1000000000, expected no more than"):
        load_model(folder)


def test_weights_in_several_files_are_read_and_checked(folder):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}

    def write(**changes):
        changed = index | {"weight_map": index["weight_map"] | changes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(changed))

    write()
    model, _ = load_model(folder)
    assert torch.equal(model.state_dict()[names[0]], weights[names[0]])
    for file, message in (
        ("../two.safetensors", "which is not in"),
        ("three.safetensors", "which is not in"),
        ("two.safetensors", "is in two.safetensors, and it is not"),
        (5, "must have a weight_map"),
    ):
        write(**{names[0]: file})
        with pytest.raises(UserError, match=message):
            load_model(folder)


def test_the_modules_of_a_sentence_encoder_lie_in_its_folder(tmp_path):
    """What they name is copied when a student is saved."""
    folder = tmp_path / "model"
    save_sentence_encoder(folder)
    shutil.copytree(folder / "1_Pooling", tmp_path / "elsewhere")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"modules\.json names a module at '\.\./elsewhere', .* outside"):
        load_sentence_encoder(folder)


LABELLED = {"input_ids": torch.arange(1, 9).view(2, 4), "labels": torch.tensor([0, 1])}


def test_scores_of_another_model_are_refused():
    """Teachers of two tasks have the same shape: their scores used to pass for each other's."""
    teacher = build(BertForSequenceClassification)
    scores = compute_importance(teacher, [LABELLED], model_name="mine")
    scores.check(teacher)
    scores.check(build(BertForSequenceClassification).bfloat16())
    for changes, message in (
        ({"seed": 1}, "scores of 'mine' were taken of a model of this shape with other weights"),
        ({"num_hidden_layers": 2}, "'mine' are for 3 layers of 64 neurons, but the model has 2 of 64"),
        ({"intermediate_size": 48}, "'mine' are for 3 layers of 64 neurons, but the model has 3 of 48"),
    ):
        with pytest.raises(UserError, match=message):
            scores.check(build(BertForSequenceClassification, **changes))


def test_saved_scores_know_their_model(tmp_path):
    teacher = build(BertForSequenceClassification)
    path = tmp_path / "scores.safetensors"
    compute_importance(teacher, [LABELLED]).save(path)
    assert len(Importance.load(path).weights) == 64
    with pytest.raises(UserError, match="other weights"):
        adapt(build(BertForSequenceClassification, seed=1), Importance.load(path))
    Importance(random_scores(3, 64), "old", "t", 1).save(path)  # of no known weights
    adapt(teacher, Importance.load(path))


def test_a_tokenizer_of_more_ids_than_the_routing_table(tmp_path):
    model = adapt(smallest(), random_scores(1, 16), num_experts=2)
    folder = make_model(tmp_path / "model", model)
    tiny.tokenizer(folder, [*WORDS, "x", "y"]).save_pretrained(folder)
    with pytest.raises(UserError, match="has token ids from 0 to 26, but its model's vocabulary has 25"):
        load_model(folder)
    message = r"input_ids must lie in \[0, 25\), .* routing tables, found .*own"
    for ids in ([[1, 26]], [[-1, 1]]):
        with pytest.raises(ValueError, match=message):
            model(input_ids=torch.tensor(ids))


def test_a_moe_checkpoint_must_be_whole_and_its_tables_name_experts(tmp_path):
    model = adapt(smallest(), random_scores(1, 16), num_experts=2)
    folder = make_model(tmp_path / "model", model)
    weights = load_file(folder / "model.safetensors")
    table, expert = "bert.encoder.tables_LV", "bert.encoder.layer.0.ffn.w1_EFD"

    def load_with(changed, **options):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        return AutoModelForSequenceClassification.from_pretrained(folder, **options)

    for value in (2, -1):
        message = rf"tables_LV must name experts in \[0, 2\), found {value} to {value}"
        with pytest.raises(ValueError, match=message):
            load_with(weights | {table: torch.full_like(weights[table], value)})
    with pytest.raises(ValueError, match=f"has no {expert} .* it is not a whole MoEBert"):
        load_with({name: tensor for name, tensor in weights.items() if name != expert})
    _, found = load_with(weights, output_loading_info=True)
    assert not found["missing_keys"]


def test_labels_that_a_model_has_not_learned_are_named(tmp_path):
    config = smallest().config
    for rows in ("w1,low\nw2,high\nw3,middle\n", "w1,low\nw3,middle\n"):
        data = make_rows(tmp_path, "text,label\n" + rows * 3)
        with pytest.raises(UserError, match=r"labels are low, high, .* has not learned middle"):
            match_labels(data, config)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("more.csv", "text,label\nw1,low\nw2,middle\n"),
        ("more.tsv", "text\tlabel\nw1\tlow\nw2\tmiddle\n"),
        ("more.jsonl", '\n{"text": "w1", "label": "low"}\n{"text": "w2", "label": "middle"}\n'),
    ],
)
def test_a_label_unseen_in_training_is_named_with_its_place(tmp_path, name, text):
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}, line 3: label 'middle' is unknown, expected one of"):
        load_task("csv", tmp_path / "rows.csv", csv=CsvOptions(validation_file=tmp_path / name))


ADAPT = "adapt --teacher model --random-split --no-fit --output x"
TABLE = "--task csv --data rows.csv"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{ADAPT} --seed 4294967296", "--seed must be at most 4294967295"),
        (f"evaluate --model model {TABLE} --split-seed -1", "--split-seed must not be negative"),
        (f"{ADAPT} --experts 17", "--experts must be 1 to the 16 neurons"),
        (f"evaluate --model {'x' * 300} {TABLE}", "does not exist"),
        (f"finetune --model model {TABLE} --output x --seed -1", "--seed must be 0 to 4294967295"),
        ("bench ffn --device tpu --toy", "device must be cpu or cuda, got 'tpu'"),
        ("bench plot rows.csv", "rows.csv is not a result file"),
        ("bench readme nowhere.md", "there is no file 'nowhere.md'"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_the_command_line_names_the_option(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "rows.csv").write_text(ROWS)
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert not (tmp_path / "x").exists()


X = torch.randn(3, 5, 8)
IDS = torch.zeros(3, 5, dtype=torch.int64)
ROUTES = torch.zeros(10, dtype=torch.int32)
from_expert_ids, from_input_ids = RoutingPlan.from_expert_ids, RoutingPlan.from_input_ids
PLAN = from_expert_ids(torch.zeros(15, dtype=torch.int64), 2)
WEIGHTS = (torch.randn(2, 4, 8), torch.randn(2, 4), torch.randn(2, 8, 4), torch.randn(2, 8))
SCORES = random_scores(3, 64)


def hashed() -> MoEFFN:
    return MoEFFN(8, 4, 2, router=HashRouter(ROUTES, 2))


def teacher():
    return build(BertForSequenceClassification)


def run_op(x=X.view(15, 8), plan=PLAN, **options):  # noqa: B008 - read only
    return moe_ffn(x, plan, *WEIGHTS, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MoEFFN("8", 4, 2), "hidden_size must be a whole number, got str '8'"),
        (lambda: MoEFFN(8, 4.5, 2), "expert_size must be a whole number, got float 4.5"),
        (lambda: MoEFFN(8, 4, 2, dropout="x"), "dropout must be a number, got str 'x'"),
        (lambda: MoEFFN(8, 4, 2, norm_eps="x"), "norm_eps must be a number, got str 'x'"),
        (lambda: MoEFFN(8, 4, 2, norm_eps=-1.0), "norm_eps must not be negative, got -1.0"),
        (lambda: MoEFFN(8, 4, 2, router="hash-random"), "router must be a module .*, got str 'hash-random'"),
        (lambda: hashed()("x"), "x must be a tensor, got str 'x'"),
        (lambda: hashed()(torch.tensor(3.0)), "x must end in hidden_size=8"),
        (lambda: hashed()(X, input_ids=IDS.tolist()), "input_ids must be a tensor, got list"),
        (lambda: hashed()(X, input_ids=IDS, mask=[1]), r"mask must be a tensor, got list \[1\]"),
        (lambda: run_op(plan="x"), "plan must be a RoutingPlan, got str"),
        (lambda: run_op(x="x"), "x_TD must be a tensor, got str 'x'"),
        (lambda: run_op(gate_TK="x"), "gate_TK must be a tensor, got str 'x'"),
        (lambda: run_op(norm=torch.ones(2, 8)), "norm must be a pair of tensors, .*, got Tensor"),
        (lambda: run_op(norm=(torch.ones(2, 8),)), "norm must be a pair of tensors"),
        (lambda: run_op(dropout_p="x"), "dropout_p must be a number, got str 'x'"),
        (lambda: from_expert_ids(IDS[0], 2.5), "num_experts must be a whole number, got float 2.5"),
        (lambda: from_expert_ids(IDS[:, :0], 2), "must give every token a slot, got shape .3, 0."),
        (lambda: from_input_ids(IDS, ROUTES[None], 0), "num_experts must be at least 1, got 0"),
        (lambda: from_input_ids(IDS, ROUTES[None], 2, mask="x"), "mask must be a tensor, got str"),
        (lambda: HashRouter([0, 1], 2), "table_V must be a tensor, got list"),
        (lambda: HashRouter(torch.zeros(4), 2), "table_V must be integer .*, got torch.float32"),
        (lambda: TokenGate(-8, 2), "hidden_size must be at least 1, got -8"),
        (lambda: TokenGate(8, 2)(X[..., :3]), "x must end in hidden_size=8, got shape"),
        (lambda: SentenceGate(8, 2)(X, mask_BS=IDS[:2]), r"mask_BS must have shape \(3, 5\) .*, got \(2, 5"),
        (lambda: hash_random_tables(1, 3, 2, seed="x"), "seed must be a whole number, got str 'x'"),
        (lambda: hash_random_tables(1, 3, 2, seed=2**70), "seed must have at most 64 bits"),
        (lambda: replace_ffns(teacher(), None), "index_LEF must be a tensor, got NoneType"),
        (lambda: replace_ffns(teacher(), quarters(), tables_LV="x"), "tables_LV must be a tensor, got str"),
        (lambda: replace_ffns("bert", quarters()), "model must be a model of transformers, got str 'bert'"),
        (lambda: replace_ffns(teacher(), quarters(), seed="x"), "seed must be a whole number"),
        (lambda: to_moe(teacher(), quarters(), num_shared_neurons="x"), "num_shared_neurons must be a whole"),
        (lambda: adapt(teacher(), "scores.safetensors"), "importance must be an Importance, .*, got str"),
        (lambda: adapt(teacher(), SCORES, num_experts="4"), "num_experts must be a whole number"),
        (lambda: adapt(teacher(), SCORES, expert_size=1.5), "expert_size must be a whole number"),
        (
            lambda: adapt(teacher(), SCORES, routing="hash-balance", token_counts_V=[1] * VOCAB),
            "token_counts_V must be a tensor, got list",
        ),
        (lambda: Importance(None, "m", "t", 1), "scores_LF must be a tensor, got NoneType"),
        (lambda: MoEBertConfig(num_experts="4"), "num_experts must be a whole number, got str '4'"),
        (lambda: MoEBertConfig(expert_size=None), "expert_size must be a whole number, got NoneType"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
