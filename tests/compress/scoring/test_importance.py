import pickle
import weakref
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from moebert_kernels.compress.scoring.importance import Importance, compute_importance, labelled_loss
from moebert_kernels.errors import UserError
from moebert_kernels.models.surgery import find_ffns
from python_ref.importance import importance_by_sample_gradients
from tests import tiny

SEVERAL_LABELS = {"num_labels": 3, "problem_type": "multi_label_classification"}
HEADS = {
    "classification": (BertForSequenceClassification, {"num_labels": 3}),
    "regression": (BertForSequenceClassification, {"num_labels": 1}),
    "several numbers": (BertForSequenceClassification, {"num_labels": 2, "problem_type": "regression"}),
    "several labels": (BertForSequenceClassification, SEVERAL_LABELS),
    "question answering": (BertForQuestionAnswering, {}),
    "token classification": (BertForTokenClassification, {"num_labels": 4}),
    "masked LM": (BertForMaskedLM, {}),
}
VOCAB = 40


def make_model(kind, seed=0, **changes):
    head, options = HEADS[kind]
    sizes = {**tiny.SMALLER, "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 13}
    # initializer_range: activations of unit size, so that all of the activation function is used.
    sizes |= {"max_position_embeddings": 40, "initializer_range": 0.5}
    model = tiny.initialised(head, seed, **{**sizes, **options, **changes}).double().eval()
    with torch.no_grad():
        for ffn in find_ffns(model):
            ffn.w1.bias.normal_()
    return model


def make_samples(kind, lengths, seed=0) -> list[dict[str, Tensor]]:
    """One dictionary per sample, without padding and without the batch axis."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    samples = []
    for length in lengths:
        sample = {"input_ids": draw(VOCAB - 1, length) + 1, "token_type_ids": draw(2, length)}
        if kind == "classification":
            sample["labels"] = draw(3)
        elif kind in ("regression", "several numbers"):
            shape = () if kind == "regression" else (2,)
            sample["labels"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        elif kind == "several labels":
            sample["labels"] = draw(2, 3).double()
        elif kind == "question answering":
            sample["start_positions"], sample["end_positions"] = draw(length), draw(length)
        else:
            sample["labels"] = draw(4 if kind == "token classification" else VOCAB, length)
            sample["labels"][draw(length)] = -100
            sample["labels"][0] = 1  # the model's own loss needs one
        samples.append(sample)
    return samples


def collate(samples, padding=0):
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    longest = int(lengths.max()) + padding
    batch = {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}
    for name, first in samples[0].items():
        rows = [sample[name] for sample in samples]
        if first.shape == samples[0]["input_ids"].shape:
            fill = -100 if name == "labels" else 0
            rows = [torch.nn.functional.pad(row, (0, longest - len(row)), value=fill) for row in rows]
        batch[name] = torch.stack(rows)
    return batch


def by_definition(model, kind, samples) -> Tensor:
    """Eq. 4 with the loss that transformers computes, one sample at a time and unpadded."""

    def loss_of_sample(i):
        output = model(**{name: value[None] for name, value in samples[i].items()})
        if kind not in ("token classification", "masked LM"):
            return output.loss
        return output.loss * (samples[i]["labels"] != -100).sum()  # a sample's loss sums over its tokens

    weights = [(ffn.w1.weight, ffn.w2.weight) for ffn in find_ffns(model)]
    return importance_by_sample_gradients(loss_of_sample, len(samples), weights)


def split(samples, sizes, padding):
    batches = []
    while samples:
        size = sizes[len(batches) % len(sizes)]
        batches.append(collate(samples[:size], padding))
        samples = samples[size:]
    return batches


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(4, 9), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
    activation=st.sampled_from(["gelu", "relu"]),
)
def test_one_backward_per_batch_equals_the_definition(kind, lengths, sizes, padding, seed, activation):
    model = make_model(kind, seed, hidden_act=activation)
    samples = make_samples(kind, lengths, seed)
    importance = compute_importance(model, split(samples, sizes, padding))
    expected = by_definition(model, kind, samples)
    # The scores are rounded to float32 at the end, nothing before.
    torch.testing.assert_close(importance.scores_LF.double(), expected, rtol=2e-7, atol=1e-12)
    assert importance.num_samples == len(lengths)


def test_one_backward_pass_is_taken_per_batch():
    samples = make_samples("classification", [5] * 7)
    with patch.object(Tensor, "backward", autospec=True, side_effect=Tensor.backward) as backward:
        compute_importance(make_model("classification"), split(samples, [3], 0))
    assert backward.call_count == 3


def test_feed_forward_in_chunks_gives_the_same_scores():
    """Stops the absolute value from being taken per chunk of a sample instead of per sample."""
    batches = [collate(make_samples("classification", [6, 6, 6]))]
    whole = compute_importance(make_model("classification"), batches)
    chunked = compute_importance(make_model("classification", chunk_size_feed_forward=2), batches)
    torch.testing.assert_close(chunked.scores_LF, whole.scores_LF)


def test_the_model_is_scored_in_evaluation_mode_and_left_as_it_was():
    """Stops dropout from entering the scores, and scoring from changing how training goes on."""
    batches = [collate(make_samples("classification", [5, 7]))]
    model = make_model("classification")
    expected = compute_importance(model, batches)
    model.train()
    model.bert.pooler.eval()
    model.bert.embeddings.requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    with torch.no_grad():
        importance = compute_importance(model, batches)
    assert torch.equal(importance.scores_LF, expected.scores_LF)
    modes = (model.training, model.bert.encoder.training, model.bert.pooler.training)
    assert modes == (True, True, False)
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    assert all(p.requires_grad for p in model.bert.encoder.parameters())
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))
    assert all(p.grad is None for p in model.bert.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks
        for module in model.bert.encoder.modules()
        if isinstance(module, torch.nn.Linear)
    )


def test_the_model_is_left_as_it_was_when_scoring_fails():
    model = make_model("classification").train()
    with pytest.raises(ValueError, match="no labels, only input_ids"):
        compute_importance(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not find_ffns(model)[0].w1._forward_hooks


@pytest.fixture(scope="module")
def batches():
    return split(make_samples("classification", [6] * 8), [3], 1)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_narrow_models_are_scored_in_float32(batches, dtype, rtol):
    model = make_model("classification")
    expected = compute_importance(model, batches).scores_LF
    scores_LF = compute_importance(model.to(dtype), batches).scores_LF
    assert (scores_LF - expected).norm() < rtol * expected.norm()


def test_autocast_leaves_the_sums_wide(batches):
    model = make_model("classification").float()
    expected = compute_importance(model, batches).scores_LF
    with torch.autocast("cpu", torch.bfloat16):
        scores_LF = compute_importance(model, batches).scores_LF
    assert scores_LF.dtype == torch.float32
    assert not torch.equal(scores_LF, expected)
    assert (scores_LF - expected).norm() < 0.1 * expected.norm()


def test_the_same_batches_give_the_same_bits():
    batches = split(make_samples("masked LM", [6] * 8), [3], 1)
    first, second = (compute_importance(make_model("masked LM").float(), batches) for _ in range(2))
    assert torch.equal(first.scores_LF, second.scores_LF)


def test_progress_counts_samples_and_names_are_recorded():
    model = make_model("classification")
    model.config.name_or_path = "teacher"
    seen = []
    batches = split(make_samples("classification", [5] * 5), [2], 0)
    importance = compute_importance(model, iter(batches), task="sst2", progress=seen.append)
    assert seen == [2, 4, 5]
    assert (importance.model, importance.task, importance.num_samples) == ("teacher", "sst2", 5)


def test_a_loss_of_ones_own():
    model = make_model("classification")
    batches = [collate(make_samples("classification", [5, 7]))]
    expected = compute_importance(model, batches)
    doubled = compute_importance(model, batches, loss=lambda output, batch: 2 * labelled_loss(output, batch))
    torch.testing.assert_close(doubled.scores_LF, 2 * expected.scores_LF)
    with pytest.raises(ValueError, match="loss must be"):
        compute_importance(model, batches, loss="logits")


def test_positions_beyond_the_sequence_count_nothing():
    """Answers that were cut off: transformers ignores them, and so must the sum."""
    model = make_model("question answering")
    batch = collate(make_samples("question answering", [6, 6]))
    batch["start_positions"][1] = batch["end_positions"][1] = 50
    both = compute_importance(model, [batch]).scores_LF
    first = compute_importance(model, [{name: value[:1] for name, value in batch.items()}]).scores_LF
    torch.testing.assert_close(both, first)


def test_input_that_cannot_be_scored():
    model = make_model("classification")
    with pytest.raises(ValueError, match="batches is empty"):
        compute_importance(model, [])
    batch = collate(make_samples("classification", [5, 7]))
    batch["labels"] = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels \(2, 5\) torch.int64 do not fit logits of shape \(2, 3\)"):
        compute_importance(model, [batch])
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="must be finite"):
        compute_importance(model, [collate(make_samples("classification", [5, 7]))])


def example(width=13):
    return Importance(torch.rand(2, width, generator=torch.Generator().manual_seed(0)), "bert é", "sst2", 11)


def test_a_saved_file_gives_everything_back(tmp_path):
    path = tmp_path / "new" / "importance.safetensors"
    example().save(path)
    example().save(path)
    loaded = Importance.load(path)
    assert torch.equal(loaded.scores_LF, example().scores_LF)
    assert (loaded.model, loaded.task, loaded.num_samples) == ("bert é", "sst2", 11)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_refused_with_a_sentence(tmp_path):
    path = tmp_path / "importance.safetensors"
    example().save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged or not an importance file"):
            Importance.load(path)
    path.write_bytes(b"\xff" * 7 + b"\x7f" + data[8:])  # a header of 2^63 bytes
    with pytest.raises(UserError, match="damaged"):
        Importance.load(path)
    path.write_bytes(pickle.dumps({"importance": [], "idx": []}))
    with pytest.raises(UserError, match="convert_published"):
        Importance.load(path)
    with pytest.raises(UserError, match="no importance file"):
        Importance.load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({"weight": torch.ones(2)}, {"format": "pt"}, "but not of importance scores"),
        ({"scores_LF": torch.ones(2, 3)}, None, "but not of importance scores"),
        ({"scores_LF": torch.ones(2, 3), "more": torch.ones(1)}, {}, "but not of importance scores"),
        ({"scores_LF": torch.ones(3)}, {}, r"shape \[layers, neurons\], got \(3,\)"),
        ({"scores_LF": torch.ones(2, 3, dtype=torch.long)}, {}, "torch.int64"),
        ({"scores_LF": torch.ones(0, 3)}, {}, r"\(0, 3\)"),
        ({"scores_LF": torch.full((2, 3), float("nan"))}, {}, "finite and not negative"),
        ({"scores_LF": -torch.ones(2, 3)}, {}, "finite and not negative"),
        ({"scores_LF": torch.ones(2, 3)}, {"num_samples": "many"}, "many"),
        ({"scores_LF": torch.ones(2, 3)}, {"num_samples": "-1"}, "num_samples must not be negative"),
    ],
)
def test_a_foreign_file_is_refused_with_a_sentence(tmp_path, tensors, header, message):
    good = {"format": "moebert-importance 1", "model": "m", "task": "t", "num_samples": "1"}
    path = tmp_path / "importance.safetensors"
    save_file(tensors, path, None if header is None else {**good, **header})
    with pytest.raises(UserError, match=message):
        Importance.load(path)


def test_a_header_without_the_task_is_refused(tmp_path):
    path = tmp_path / "importance.safetensors"
    save_file({"scores_LF": torch.ones(2, 3)}, path, {"format": "moebert-importance 1", "model": "m"})
    with pytest.raises(UserError, match="in its header: task, num_samples"):
        Importance.load(path)


def test_scores_are_checked_against_the_model():
    model = make_model("classification")
    example().check(model)
    with pytest.raises(UserError, match=r"2 layers of 12 neurons, but the model has 2 of 13"):
        example(12).check(model)
    with pytest.raises(UserError, match=r"2 layers of 13 neurons, but the model has 3 of 13"):
        example().check(make_model("classification", num_hidden_layers=3))


def test_nothing_of_a_batch_outlives_it():
    """Hooks that held the tensors they sat on kept every batch's activations: gigabytes a minute."""
    model = make_model("classification")
    seen = []
    for ffn in find_ffns(model):
        ffn.w1.register_forward_hook(lambda module, args, h: seen.append(weakref.ref(h)))
        ffn.w2.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    compute_importance(model, split(make_samples("classification", [5, 6, 7]), [1], 0))
    assert len(seen) == 3 * 2 * 2
    assert all(tensor() is None for tensor in seen)
