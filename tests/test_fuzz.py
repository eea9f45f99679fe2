"""Two thousand damaged and hostile files, each loaded to a model that runs or refused with a sentence.

What is drawn is the same in every run. The sentence is a UserError or ValueError that names the file or its
folder; any other exception, a stall or memory out of all proportion is a failure.
"""

from __future__ import annotations

import pickle
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from moebert_kernels.cli import app
from moebert_kernels.cli_command import USER_ERROR
from moebert_kernels.compress.experts.adaptation import adapt, random_scores
from moebert_kernels.compress.scoring.importance import Importance
from moebert_kernels.compress.scoring.published import convert_published
from moebert_kernels.compress.scoring.token_scores import TokenScores
from moebert_kernels.compress.storage.loading import load_model
from moebert_kernels.compress.storage.sentence_encoder import load_sentence_encoder
from tests.mutations import mutate_bytes, mutate_header, mutate_json, mutate_tensors
from tests.smallest import VOCAB, save_sentence_encoder, save_tokenizer, smallest

SECONDS, MEBIBYTES = 2.0, 500
Mutation = Callable[[bytes, random.Random], bytes]

HOSTILE = (
    {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"quantization_config": "x"},
    {"transformers_weights": "../../x.safetensors"},
    {"transformers_weights": "evil.bin"},
    {"attn_implementation": "someone/kernel"},
    {"attn_implementation": "nonsense"},
    {"num_labels": 10**12, "id2label": None},
    {"num_labels": 5},
    {"id2label": {"x": "y"}},
    {"id2label": {str(i): "y" for i in range(1000)}},
    {"pruned_heads": {"0": [0], "9": [1]}},
    {"return_dict": False},
    {"output_attentions": True, "output_hidden_states": True},
    {"is_decoder": True},
    {"use_cache": True, "add_cross_attention": True, "is_decoder": True},
    {"is_encoder_decoder": True},
    {"torch_dtype": "evil"},
    {"dtype": "float16"},
    {"chunk_size_feed_forward": 3},
    {"tie_word_embeddings": 5},
    {"num_hidden_layers": 10**9},
    {"hidden_size": 10**9, "intermediate_size": 10**9, "vocab_size": 10**9},
    {"vocab_size": 10**9},
    {"max_position_embeddings": 10**9},
    {"num_experts": 10**9, "expert_size": 10**9},
    {"problem_type": "nonsense"},
    {"tokenizer_class": "NoSuchTokenizer"},
    {"model_type": "moe-roberta"},
    {"architectures": ["BertModel"]},
    {"layer_types": ["x"]},
    {"text_config": {"hidden_size": -1}},
    {"hidden_act": "relu6"},
    {"num_attention_heads": 0},
    {"hidden_dropout_prob": 5.0},
    {"layer_norm_eps": -1.0},
)


def hostile_json(data: bytes, rng: random.Random) -> bytes:
    return mutate_json(data, rng, HOSTILE)


def mutate_begin(data: bytes, rng: random.Random) -> bytes:
    return mutate_bytes(data, rng, within=1000)


WEIGHTS: list[Mutation] = [mutate_bytes, mutate_header, mutate_begin, mutate_tensors]
JSON: list[Mutation] = [hostile_json, hostile_json, hostile_json, mutate_bytes]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A dense model, two MoE models, a sentence encoder and every kind of scores."""
    root = tmp_path_factory.mktemp("fuzz")
    teacher = smallest()
    scores_LF = random_scores(1, 16)
    models = {"dense": teacher}
    for name, routing in (("hash", "hash-random"), ("gate", "gate-token")):
        models[name] = adapt(teacher, scores_LF, num_experts=2, routing=routing)
    for name, model in models.items():
        model.save_pretrained(root / name)
        save_tokenizer(root / name)
    save_sentence_encoder(root / "sentences")
    Importance(scores_LF, "m", "t", 3).save(root / "plain.safetensors")
    tokens = TokenScores(torch.rand(1, 4, 16), torch.arange(VOCAB) % 4)
    Importance(scores_LF, "m", "t", 3, tokens).save(root / "tokens.safetensors")
    published = {"importance": [[3.0, 2.0, 1.0]] * 1, "idx": [[2, 0, 1]]}
    (root / "published.pkl").write_bytes(pickle.dumps(published))
    (root / "rows.csv").write_text("text,label\n" + "w1 w2,low\nw3,high\n" * 4)
    return root


def run_model(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    batch = tokenizer(["w1 w2 w3", "w4 w5"], padding=True, truncation=True, max_length=8, return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.shape[0] == 2


def run_sentences(folder: Path) -> None:
    assert load_sentence_encoder(folder).encode(["w1 w2 w3", "w4"]).shape[0] == 2


def fuzz(path: Path, use: Callable[[], object], mutations: list[Mutation], number: int) -> Counter:
    """Damage a file `number` times, using it each time; it is as it was afterwards.

    Returns:
        How often it was loaded, and how often refused.

    Raises:
        AssertionError: with every way in which it went wrong.
    """
    rng = random.Random(f"{path.name} {number}")
    whole = path.read_bytes()
    use()
    outcomes: Counter = Counter()
    failures: dict[str, int] = {}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for turn in range(number):
            path.write_bytes(mutations[turn % len(mutations)](whole, rng))
            begin = time.process_time()
            try:
                use()
                outcomes["loaded"] += 1
            except ValueError as error:
                outcomes["refused"] += 1
                # Torch's own refusal of an absurd allocation must not pass for ours.
                if path.parent.name not in str(error) or "allocat" in str(error):
                    failures.setdefault(f"no sentence: {error!r:.300}", turn)
            except Exception as error:  # each kind is reported once, at the end
                failures.setdefault(f"{error!r:.300}", turn)
            if time.process_time() - begin > SECONDS:
                failures.setdefault(f"more than {SECONDS} s", turn)
    finally:
        path.write_bytes(whole)
    use()
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory > MEBIBYTES << 10:
        failures[f"more than {MEBIBYTES} MiB"] = number
    assert not failures, "\n".join(f"mutation {turn}: {what}" for what, turn in failures.items())
    return outcomes


@pytest.mark.parametrize(
    ("file", "mutations", "number"),
    [
        ("hash/model.safetensors", WEIGHTS, 400),
        ("gate/model.safetensors", WEIGHTS, 120),
        ("dense/model.safetensors", WEIGHTS, 120),
        ("hash/config.json", JSON, 300),
        ("dense/config.json", JSON, 200),
        ("hash/tokenizer.json", JSON, 80),
        ("hash/tokenizer_config.json", JSON, 80),
    ],
)
def test_models(files, file, mutations, number):
    path = files / file
    outcomes = fuzz(path, lambda: run_model(path.parent), mutations, number)
    assert min(outcomes["loaded"], outcomes["refused"]) > number / 10


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("modules.json", 60),
        ("1_Pooling/config.json", 40),
        ("sentence_bert_config.json", 40),
        ("config.json", 20),
    ],
)
def test_sentence_encoders(files, file, number):
    outcomes = fuzz(files / "sentences" / file, lambda: run_sentences(files / "sentences"), JSON, number)
    assert outcomes["refused"] > number / 10


@pytest.mark.parametrize("file", ["plain.safetensors", "tokens.safetensors"])
def test_importance(files, file):
    path = files / file
    with safe_open(path, "pt") as opened:
        header = opened.metadata()
    mutations = [*WEIGHTS[:3], lambda data, rng: mutate_tensors(data, rng, header)]
    outcomes = fuzz(path, lambda: Importance.load(path), mutations, 220)
    assert min(outcomes.values()) > 10


def test_published_importance(files):
    path = files / "published.pkl"
    assert fuzz(path, lambda: convert_published(path), [mutate_bytes], 100)["refused"] > 50


@pytest.mark.parametrize(
    ("file", "mutations", "command"),
    [
        ("hash/model.safetensors", WEIGHTS, "evaluate --model hash --task csv --data rows.csv"),
        ("hash/config.json", JSON, "evaluate --model hash --task csv --data rows.csv"),
        ("dense/tokenizer.json", JSON, "evaluate --model dense --task csv --data rows.csv"),
        (
            "plain.safetensors",
            WEIGHTS,
            "adapt --teacher dense --no-fit --importance plain.safetensors --output made/{}",
        ),
    ],
)
def test_the_command_line_says_it_in_a_line(files, file, mutations, command, monkeypatch, tmp_path):
    """A library's message of many lines, or a traceback, was printed as it came."""
    monkeypatch.chdir(files)
    whole = (files / file).read_bytes()
    rng = random.Random(file)
    refused = 0
    try:
        for turn in range(12):
            (files / file).write_bytes(mutations[turn % len(mutations)](whole, rng))
            arguments = command.format(f"{tmp_path.name}-{turn}").split()
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code in (0, USER_ERROR), result.exception
            refused += result.exit_code == USER_ERROR
            if result.exit_code == USER_ERROR:
                assert len(result.stderr.strip().splitlines()) == 1
                assert Path(file).parent.name in result.stderr
    finally:
        (files / file).write_bytes(whole)
    assert refused > 2
