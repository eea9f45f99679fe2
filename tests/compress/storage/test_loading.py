"""Saved encoders and what is noted beside them; what commands refuse to load is in test_cli.py."""

from dataclasses import replace

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moebert_kernels.compress.data.tasks import Task, TaskData
from moebert_kernels.compress.storage.loading import compared_with_training, load_model, save_encoder
from tests.compress.toys import make_data, make_teacher

pytestmark = pytest.mark.filterwarnings("error:.* not those .* was fine-tuned on")  # where it is not expected


@pytest.fixture
def saved(tmp_path):
    source = make_teacher(tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(source)
    save_encoder(model, AutoTokenizer.from_pretrained(source), tmp_path / "saved", trained_on=make_data())
    return tmp_path / "saved"


def test_other_training_rows_than_the_teachers_are_warned_of(saved):
    """Stops a student from being validated, without a word, on rows that its teacher was trained on."""
    load_model(saved)
    assert compared_with_training(saved, data := make_data()) is data
    with pytest.warns(UserWarning, match="not those .*saved was fine-tuned on") as told:
        data = compared_with_training(saved, replace(make_data(seed=1), oddities=("Odd.",)))
    assert data.oddities == ("Odd.", str(told[0].message))


def test_of_rows_whose_labels_are_answers_it_is_said_too(saved):
    """Stops it from being left out of question answering, as of text, for want of a column of labels."""
    rows = Dataset.from_dict({"question": ["who?"], "context": ["he"], "answers": [["he"]], "starts": [[0]]})
    task = Task("t", "question_answering", (), ("f1",), "f1")
    with pytest.warns(UserWarning, match="not those"):
        compared_with_training(saved, TaskData(task, rows, rows))
    texts = rows.select_columns(["context"]).rename_column("context", "text")
    compared_with_training(saved, TaskData(Task("t", "text", (), (), ""), texts, texts))


@pytest.mark.parametrize("notes", [None, "", "[]", "{}"])
def test_models_without_notes_are_taken_as_they_are(saved, notes):
    path = saved / "moebert_training.json"
    path.unlink() if notes is None else path.write_text(notes)
    compared_with_training(saved, make_data(seed=1))
