"""Text without labels: read, scored by the teacher's own predictions, compressed whatever the head is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from moebert_kernels.compress.data.tasks import CsvOptions, tokenize
from moebert_kernels.compress.data.tasks.texts import has_no_labels, load_texts
from moebert_kernels.compress.evaluation.likeness import prediction_likeness
from moebert_kernels.compress.evaluation.quality import batches
from moebert_kernels.compress.runs.pipeline import compress
from moebert_kernels.compress.runs.settings import CompressSettings
from moebert_kernels.compress.scoring.importance import compute_importance
from moebert_kernels.compress.scoring.teacher_loss import _roots, _yes_and_no_roots, prediction_shift_loss
from moebert_kernels.errors import ArgumentError, UserError
from tests.compress.toys import SETTINGS, UNMEASURED, WORDS, make_teacher

SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification"}
HEADS = {
    "classes": (BertForSequenceClassification, {"num_labels": 5}),
    "several": (BertForSequenceClassification, SEVERAL),
    "numbers": (BertForSequenceClassification, {"num_labels": 1}),
    "tokens": (BertForTokenClassification, {"num_labels": 3}),
    "spans": (BertForQuestionAnswering, {}),
}
UNTRAINED = CompressSettings(distill=False, measure=False, max_length=16, comparisons=("narrow",))


@pytest.fixture
def texts(tmp_path):
    words = [[WORDS[(7 * row + 3 * place) % 40] for place in range(3 + row % 9)] for row in range(60)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(" ".join(row) for row in words))
    return path


def test_texts_are_read_and_some_held_out(tmp_path, texts):
    data = load_texts(texts)
    assert (len(data.train), len(data.validation)) == (54, 6)
    assert data.train.column_names == ["text"]
    assert {*data.train["text"], *data.validation["text"]} == {*texts.read_text().splitlines()}
    table = tmp_path / "pairs.csv"
    table.write_text('a,b,stars\n"one, two",three,4\n" ",left out,1\nfour,,5\n')
    columns = CsvOptions(text="a", text_pair="b", validation_file=table)
    pairs = load_texts(table, columns)
    assert pairs.train.to_dict() == {"text": ["one, two", "four"], "text_pair": ["three", ""]}
    assert pairs.validation.to_dict() == pairs.train.to_dict()
    assert has_no_labels(table, CsvOptions(text="a"))
    assert not has_no_labels(table, CsvOptions(text="a", label="stars"))
    assert not has_no_labels(table, CsvOptions())  # the text's column is missing as well


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("\n \n", None, "has no text"),
        ("one\n", None, "has one text, too few"),
        ("one\ntwo\n", CsvOptions(validation_fraction=1.5), "validation_fraction must be between 0 and 1"),
    ],
)
def test_what_is_no_text_is_said(tmp_path, content, columns, message):
    path = tmp_path / "texts.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_texts(path, columns)


def test_labels_are_asked_for_by_what_needs_them(tmp_path, texts):
    tokenizer = AutoTokenizer.from_pretrained(make_teacher(tmp_path / "teacher"))
    encoded = tokenize(load_texts(texts), tokenizer, 16)
    assert "labels" not in encoded.train.column_names
    with pytest.raises(UserError, match="without labels, and cannot be scored"):
        encoded.validation_sets[""].score([])


def test_shift_is_measured_where_divergence_is_a_distance():
    """J^T J of 2 sqrt(p) is the Fisher information diag(p) - p p^T; no infinite slope where p is 0.

    Of classes that are each true or not it is diag(p (1 - p)).
    """
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(_roots, logits)
    p = logits.softmax(0)
    torch.testing.assert_close(jacobian.T @ jacobian, p.diag() - p[:, None] * p)
    jacobian = torch.autograd.functional.jacobian(_yes_and_no_roots, logits).flatten(0, 1)
    p = logits.sigmoid()
    torch.testing.assert_close(jacobian.T @ jacobian, (p * (1 - p)).diag())
    for roots in (_roots, _yes_and_no_roots):
        certain = torch.tensor([0.0, 2000.0], requires_grad=True)
        roots(certain).sum().backward()
        assert bool(certain.grad.isfinite().all())


@pytest.mark.parametrize("head", HEADS)
def test_importance_by_shift_does_not_hang_on_batches(tmp_path, texts, head):
    """Stops padding that counts, and draws that go by a row's place."""
    head_class, options = HEADS[head]
    folder = make_teacher(tmp_path / "teacher", head_class, **options)
    teacher, tokenizer = head_class.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = tokenize(load_texts(texts), tokenizer, 16).train
    found = []
    for batch_size in (1, 17):
        loss = prediction_shift_loss(teacher.config, seed=3)
        found.append(compute_importance(teacher, batches(rows, tokenizer, batch_size=batch_size), loss=loss))
    assert float(found[0].scores_LF.min()) > 0
    torch.testing.assert_close(found[1].scores_LF, found[0].scores_LF, rtol=1e-3, atol=1e-7)


def test_likeness_by_hand():
    theirs = [np.array([2.0, 0.0]), np.array([0.0, 1.0]), np.array([3.0, 0.0])]
    ours = [np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([0.0, 3.0])]
    found = prediction_likeness("classification", ours, theirs)
    assert found["agreement"] == pytest.approx(2 / 3)
    assert found["divergence"] > 0
    assert prediction_likeness("classification", theirs, theirs) == {"agreement": 1.0, "divergence": 0.0}
    several = [np.array([2.0, -1.0]), np.array([2.0, -3.0])]
    moved = [np.array([1.0, -3.0]), np.array([3.0, 1.0])]  # the likelier of the two is the same in both
    assert prediction_likeness("multi_label_classification", moved, several)["agreement"] == 0.5
    assert prediction_likeness("multi_label_classification", moved, several)["divergence"] > 0
    numbers = [np.array([1.0]), np.array([2.0]), np.array([4.0])]
    doubled = [2 * number for number in numbers]
    found = prediction_likeness("regression", doubled, numbers)
    assert found == pytest.approx({"pearson": 1.0, "divergence": 7.0})
    assert prediction_likeness("regression", [np.array([1.0])] * 3, numbers)["pearson"] == 0
    tokens = [np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])]
    other = [np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])]
    assert prediction_likeness("token_classification", tokens, other)["agreement"] == 0.75
    spans = [np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])]
    moved = [spans[0], np.array([[1.0, 1.0], [0.0, 0.0]])]
    found = prediction_likeness("question_answering", moved, spans)
    assert found["agreement"] == 0.5
    assert found["divergence"] > 0


@pytest.mark.parametrize("head", HEADS)
def test_teacher_and_text_in_student_out(tmp_path, texts, head):
    head_class, options = HEADS[head]
    folder = make_teacher(tmp_path / "teacher", head_class, **options)
    results = compress(UNTRAINED, load_texts(texts), folder, tmp_path / "out")
    quality = {model["name"]: model["quality"] for model in results["models"]}
    main = "pearson" if head == "numbers" else "agreement"
    assert results["task"]["main_metric"] == main
    assert quality["teacher"] == pytest.approx({main: 1.0, "divergence": 0.0}, abs=1e-6)
    assert set(quality["student"]) == {main, "divergence"}
    fitting = results["fitting"]["student"]
    assert fitting["divergence"]["fitted"] < fitting["divergence"]["cut"]
    assert (tmp_path / "out" / "student" / "model.safetensors").is_file()


def test_text_is_enough_to_train_on(tmp_path, texts):
    """The teacher's layers and predictions take the place of labels."""
    settings = replace(SETTINGS, epochs=1, comparisons=(), routing="gate-token", **UNMEASURED)
    folder = make_teacher(tmp_path / "teacher", BertForTokenClassification)
    results = compress(settings, load_texts(texts), folder, tmp_path / "out")
    for point in results["losses"]["student"]:
        assert set(point) == {"step", "layer", "prediction", "balance", "total"}
    with pytest.raises(ArgumentError, match="fit_rows must be at least 1"):
        CompressSettings(fit_rows=0)
