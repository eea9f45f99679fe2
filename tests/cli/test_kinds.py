"""Every kind of task from files to a distilled student, by the command, on a BERT of two tiny layers."""

import json

import pytest
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification, BertModel

from moebert_kernels.compress.data.files import read_json
from moebert_kernels.models import MoEBertForQuestionAnswering, MoEBertForTokenClassification
from tests import tiny

WORDS = [f"w{i}" for i in range(30)]


@pytest.fixture
def folder(tmp_path):
    """A pre-trained BERT of random weights in pretrained/."""
    sizes = {**tiny.SMALLER, "vocab_size": 35, "max_position_embeddings": 32}
    tiny.initialised(BertModel, **sizes).save_pretrained(tmp_path / "pretrained")
    tiny.tokenizer(tmp_path, WORDS, model_max_length=32).save_pretrained(tmp_path / "pretrained")
    return tmp_path


@pytest.fixture
def compress(run, folder):
    """Fine-tune, compress, and evaluate the student that was saved; returns the results by model."""

    def compress(data):
        run(f"finetune --model pretrained {data} --epochs 6 --lr 1e-2 --batch-size 8 --output teacher")
        run(f"compress --teacher teacher {data} --epochs 1 --no-measure --batch-size 8 --output out")
        results = read_json(folder / "out" / "results.json")
        found = {model["name"]: model["quality"] for model in results["models"]}
        run(f"evaluate --model out/student {data} --output found.json")
        assert read_json(folder / "found.json") == found["student"]
        curve = results["losses"]["student"]
        assert all(point["prediction"] > 0 and point["layer"] > 0 for point in curve)
        return results, found

    return compress


def context_of(i):
    """The answer is the word after w0; the rest is never w0."""
    words = [WORDS[1 + (7 * i + 3 * j) % 29] for j in range(14)]
    at = i % 12
    words[at] = "w0"
    return " ".join(words), words[at + 1], len(" ".join(words[: at + 1])) + 1


@pytest.mark.parametrize("task", ["squad", "squad_v2"])
def test_question_answering(compress, folder, task):
    """Contexts longer than a window, so that rows outnumber questions at every stage."""
    paragraphs = []
    for i in range(24):
        context, answer, start = context_of(i)
        answers = [{"text": answer, "answer_start": start}] if task == "squad" or i % 3 else []
        question = {"id": str(i), "question": "w1 w2", "answers": answers}
        paragraphs.append({"context": context, "qas": [question]})
    for name in ("train", "dev"):
        (folder / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    data = f"--task {task} --data . --max-length 16 --doc-stride 4 --max-answer-length 3"
    results, found = compress(data)
    assert results["task"]["kind"] == "question_answering"
    assert results["task"]["train_rows"] == 24
    assert {"exact_match", "f1"} <= set(found["student"])
    assert ("best_f1" in found["student"]) == (task == "squad_v2")
    student = AutoModelForQuestionAnswering.from_pretrained("out/student")
    assert isinstance(student, MoEBertForQuestionAnswering)


def test_token_classification(compress, folder):
    lines = []
    for i in range(24):
        words = [WORDS[(5 * i + 3 * j) % 30] for j in range(4 + i % 20)]
        lines += [f"{word} {'I-X' if int(word[1:]) % 3 == 0 else 'O'}" for word in words] + [""]
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text("\n".join(lines))
    results, found = compress("--task conll --data . --max-length 12")
    assert results["task"]["kind"] == "token_classification"
    assert found["teacher"]["accuracy"] > 0.9
    student = AutoModelForTokenClassification.from_pretrained("out/student")
    assert isinstance(student, MoEBertForTokenClassification)
    assert student.config.id2label == {0: "O", 1: "B-X", 2: "I-X"}


def test_both_validation_sets_of_mnli(compress, folder):
    labels = ("entailment", "neutral", "contradiction")
    for name in ("train", "dev_matched", "dev_mismatched"):
        shift = name == "dev_mismatched"  # what is right in one set is wrong in the other
        rows = [f"{WORDS[i]}\t{WORDS[i % 3]}\t{labels[(i + shift) % 3]}" for i in range(24)]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tgold_label", *rows, ""]))
    results, found = compress("--task mnli --data .")
    assert results["task"]["validation_rows"] == 24
    for quality in found.values():
        assert quality.keys() == {"accuracy", "accuracy_mismatched"}
    assert found["teacher"]["accuracy"] > 0.5
    assert found["teacher"]["accuracy_mismatched"] <= 1 - found["teacher"]["accuracy"]


def test_a_teacher_of_another_kind_is_refused(call, run, folder):
    for name in ("train", "valid"):
        (folder / f"{name}.txt").write_text("w1 B-X\n")
    run("finetune --model pretrained --task conll --data . --epochs 1 --output teacher")
    (folder / "t.csv").write_text("text,label\n" + "w1,a\nw2,b\n" * 4)
    result = call("evaluate --model teacher --task csv --data t.csv")
    assert result.exit_code == 2
    sentence = "a BertForTokenClassification, but task t needs a model ...ForSequenceClassification"
    assert sentence in result.stderr


def test_several_labels_from_a_table_to_a_student(compress, folder):
    """Stops a multi-label teacher from failing after minutes; its student tells the labels apart again."""
    labels_of = ["red", "red|round", "round|small", ""]
    lines = ["text,label", *(f"{f'w{i % 4} ' * 4},{labels_of[i % 4]}" for i in range(160))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    kind = "multi_label_classification"
    results, found = compress(f"--task csv --data rows.csv --kind {kind} --max-length 8")
    assert set(found["student"]) == {"micro_f1", "macro_f1", "accuracy"}
    assert found["teacher"]["micro_f1"] > 0.7  # the same answer for all texts has 0.62
    assert found["student"]["micro_f1"] > 0.7
    assert results["task"]["kind"] == kind
    saved = read_json(folder / "out" / "student" / "config.json")
    assert saved["problem_type"] == kind
    assert saved["id2label"] == {"0": "red", "1": "round", "2": "small"}
