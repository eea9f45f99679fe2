"""Question answering: SQuAD files, windows and what is found in them, scores as the official scripts do."""

import copy
import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig

from moebert_kernels.compress.data.tasks import (
    AnswerOptions,
    Task,
    TaskData,
    load_task,
    match_labels,
    tokenize,
)
from moebert_kernels.compress.data.tasks.squad_score import (
    answer_scores,
    best_over_thresholds,
    normalize_answer,
)
from moebert_kernels.errors import UserError
from tests import tiny

CONTEXT = "The \u201cNFL\u201d in 2016s.  A game\u2028of caf\u00e9s."
ANSWERS = [{"text": "2016", "answer_start": 13}, {"text": "in 2016", "answer_start": 10}]
ANSWERED = {"id": "q1", "question": "  When? ", "answers": ANSWERS, "is_impossible": False}
UNANSWERED = {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True}
UNANSWERED["plausible_answers"] = [{"text": "NFL", "answer_start": 5}]


def squad(*questions):
    """What a file holds that asks them about one paragraph."""
    paragraph = {"context": CONTEXT, "qas": [*copy.deepcopy(questions)]}
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [paragraph]}]}


SQUAD = squad(ANSWERED, UNANSWERED)


def write(folder, train, dev, version="v2.0"):
    for name, content in (("train", train), ("dev", dev)):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}-{version}.json").write_text("\ufeff" + text, encoding="utf-8")
    return folder


def test_files_are_read_as_published(tmp_path):
    data = load_task("squad_v2", write(tmp_path, SQUAD, SQUAD))
    first, second = data.train.to_list()
    assert first["question"] == "  When? "
    assert first["context"] == second["context"] == CONTEXT
    assert first["answers"] == ["2016", "in 2016"]
    assert [CONTEXT[start:][:4] for start in first["starts"]] == ["2016", "in 2"]
    assert second["answers"] == second["starts"] == []
    assert data.task.metric_names == ("exact_match", "f1", "best_exact_match", "best_f1")
    (tmp_path / "v1").mkdir()
    write(tmp_path / "v1", squad(ANSWERED), squad(ANSWERED), "v1.1")
    options = AnswerOptions(n_best=3)
    data = load_task("squad", tmp_path / "v1", answers=options)
    assert data.train.to_list() == [first]
    assert data.task.metric_names == ("exact_match", "f1")
    assert data.task.answers == options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-1], r"train-v1\.1\.json is not json"),
        (lambda text: "[" * 100000, "is not json"),
        (lambda text: "[]", "not in SQuAD's format"),
        (lambda text: '{"data": []}', "has no questions"),
        (
            lambda text: text.replace("answer_start", "start"),
            "not in SQuAD's format.*KeyError 'answer_start'",
        ),
        (lambda text: text.replace("13}", '"13"}'), "'13' where a number of characters is expected"),
        (lambda text: text, "question q2: no answer, which task squad needs; task squad_v2 is for such"),
    ],
)
def test_wrong_files_get_a_sentence(tmp_path, change, message):
    write(tmp_path, change(json.dumps(SQUAD)), squad(ANSWERED), "v1.1")
    with pytest.raises(UserError, match=message):
        load_task("squad", tmp_path)


def located(folder, context, answers):
    """The (answers, starts) of the training and the validation rows of one question, and the oddities."""
    both = squad(ANSWERED)
    both["data"] += squad(ANSWERED)["data"]
    (paragraph,), (other,) = (document["paragraphs"] for document in both["data"])
    paragraph["context"] = context
    paragraph["qas"][0]["answers"] = [{"text": text, "answer_start": start} for text, start in answers]
    other["qas"][0]["id"] = "q9"
    data = load_task("squad", write(folder, both, both, "v1.1"))
    rows = [
        [(row["answers"], row["starts"]) for row in part.to_list()[:-1]]
        for part in (data.train, data.validation)
    ]
    return *rows, [oddity.partition(": ")[2] for oddity in data.oddities]


CAPITALS = "Anna lives in Quito.  Ecuador's capital  city is Quito." + " " * 100 + "Quito lies high."


@pytest.mark.parametrize(
    ("answer", "start", "found"),
    [
        ("Quito", 14, ("Quito", 14)),
        ("Quito", 0, ("Quito", 14)),
        ("Quito", 45, ("Quito", 49)),
        ("quito", 12, ("Quito", 14)),
        (" capital city ", 30, ("capital  city", 32)),
        ("Anna", 500, ("Anna", 0)),
        ("Anna", -1, ("Anna", 0)),
    ],
)
def test_an_answer_is_found_where_it_stands(tmp_path, answer, start, found):
    """Stops a wrong span, as of "Anna" for "Quito", from being trained on in silence."""
    train, validation, told = located(tmp_path, CAPITALS, [(answer, start)])
    assert train == validation == [([found[0]], [found[1]])]
    moved = "answers of 1 questions do not stand at their answer_start, and were found near by: question q1."
    assert told == ([] if found == (answer, start) else [moved, moved])


@pytest.mark.parametrize(("answer", "start"), [("Lima", 14), ("Quito", 900), ("", 3), (" ", 3)])
def test_a_question_whose_answer_is_nowhere_is_not_trained_on(tmp_path, answer, start):
    """Stops such rows from teaching a wrong span; the score counts their answers, as the official one."""
    train, validation, told = located(tmp_path, CAPITALS, [(answer, start)])
    assert (train, validation) == ([], [([answer], [start])])
    assert [text.partition(", and ")[2] for text in told] == [
        "are not trained on: question q1.",
        "count all the same, though no model can find them: question q1.",
    ]
    train, validation, told = located(tmp_path, CAPITALS, [(answer, start), ("Anna", 0)])
    assert train == [(["Anna"], [0])]
    assert validation == [([answer, "Anna"], [start, 0])]
    assert len(told) == 2


def test_a_file_without_a_single_answer_in_place_is_refused(tmp_path):
    text = json.dumps(squad(ANSWERED)).replace('"text": "', '"text": "un')
    with pytest.raises(UserError, match=r"train-v1\.1\.json has no question whose answer is a part of its"):
        load_task("squad", write(tmp_path, text, text, "v1.1"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has no train-v1\.1\.json nor train\.json; .* is empty"):
        load_task("squad", tmp_path)
    with pytest.raises(UserError, match="absent is not a folder"):
        load_task("squad_v2", tmp_path / "absent")


@pytest.mark.parametrize("name", ["n_best", "max_answer_length"])
def test_senseless_options_are_refused(name):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        AnswerOptions(**{name: 0})
    with pytest.raises(UserError, match="doc_stride must not be negative"):
        AnswerOptions(doc_stride=-1)


def test_normalisation():
    assert normalize_answer(" The U.S.  team's\tAn\u00a0A-b the_end") == "us teams ab theend"
    assert normalize_answer("a an the. theory") == "theory"


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("the Cat!", ["cat"], 1, 1),
        ("black cat", ["cat", "a big black cat"], 0, 2 * 2 / 5),
        ("cat cat", ["cat dog cat bird"], 0, 2 * 2 / 6),
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
    ],
)
@pytest.mark.parametrize("may_be_absent", [True, False])
def test_scores_worked_by_hand(prediction, golds, exact, f1, may_be_absent):
    assert answer_scores(prediction, golds, may_be_absent=may_be_absent) == pytest.approx((exact, f1))


def test_absent_answers():
    assert answer_scores("", [], may_be_absent=True) == (1, 1)
    assert answer_scores("cat", [], may_be_absent=True) == (0, 0)
    assert answer_scores("", ["the"], may_be_absent=True) == (1, 1)
    assert answer_scores("a", ["the"], may_be_absent=False) == (1, 0)  # as the script for 1.1 has it


def test_the_best_threshold_worked_by_hand():
    """Answers to the first two of four questions, 1 + 0.5 points, leave one of two silences right."""
    scores, margins = [1.0, 0.5, 0.0, 0.0], [-3.0, 1.0, 0.5, 2.0]
    best = best_over_thresholds(scores, [True, True, False, False], [True] * 4, margins)
    assert best == pytest.approx(3 / 4)  # only the first answered: 1 + 2 silences
    assert best_over_thresholds([0.0], [False], [False], [-1.0]) == 1
    assert best_over_thresholds([0.7], [True], [True], [9.0]) == pytest.approx(0.7)


WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = [*WORDS, "##s", "2016", "q", "?", "."]
    return tiny.tokenizer(tmp_path_factory.mktemp("words"), words, model_max_length=512)


def questions(*rows, **options):
    """Each row: question, context, answer texts; each answer begins where it first appears."""
    found = [
        {
            "question": question,
            "context": context,
            "answers": answers,
            "starts": [*map(context.index, answers)],
        }
        for question, context, answers in rows
    ]
    metrics = ("exact_match", "f1")
    if options.get("may_be_absent"):
        metrics += ("best_exact_match", "best_f1")
    task = Task("squad", "question_answering", (), metrics, "f1", AnswerOptions(**options))
    dataset = Dataset.from_list(found)
    return TaskData(task, dataset, dataset)


def encode(tokenizer, rows, max_length=30, **options):
    """The rows to validate on."""
    return tokenize(questions(*rows, **options), tokenizer, max_length).validation_sets[""]


def gold_outputs(rows):
    """Logits that are sure of each window's own labels."""
    found = [np.zeros((len(ids), 2)) for ids in rows["input_ids"]]
    for output_S2, row in zip(found, rows, strict=True):
        output_S2[row["start_positions"], 0] = output_S2[row["end_positions"], 1] = 9
    return found


def test_windows_overlap_and_know_their_answers(tokenizer):
    context = " ".join(WORDS[:8])
    data = tokenize(questions(("q ?", context, ["w4 w5"]), doc_stride=1), tokenizer, 9)
    windows = [tokenizer.decode(ids) for ids in data.train["input_ids"]]
    assert windows == [
        "[CLS] q? [SEP] w0 w1 w2 w3 [SEP]",
        "[CLS] q? [SEP] w3 w4 w5 w6 [SEP]",
        "[CLS] q? [SEP] w6 w7 [SEP]",
    ]
    assert data.train["start_positions"][:] == [0, 5, 0]
    assert data.train["end_positions"][:] == [0, 6, 0]
    inputs = {"input_ids", "token_type_ids", "attention_mask"}
    assert set(data.train.column_names) == inputs | {"start_positions", "end_positions"}


def test_an_answer_inside_a_word_is_trained_as_the_tokens_that_hold_it(tokenizer):
    data = tokenize(questions(("q", "w1 2016s w2 .", ["2016", "w1"]), ("q", "w3", [])), tokenizer, 30)
    assert data.train["start_positions"][:] == [4, 0]
    assert data.train["end_positions"][:] == [4, 0]


def test_long_questions_leave_room_for_the_context(tokenizer):
    """Stops a question longer than a window from leaving no context, or from ending in an error."""
    data = tokenize(questions((" ".join(WORDS) * 3, "w1 w2 w3", ["w2"])), tokenizer, 15)
    assert [len(ids) for ids in data.train["input_ids"]] == [11]
    assert tokenizer.decode(data.train["input_ids"][0]) == "[CLS] w0 w1 w2 w3 w4 [SEP] w1 w2 w3 [SEP]"
    assert data.train["start_positions"][:] == [8]


@pytest.mark.parametrize(("max_length", "doc_stride"), [(4, None), (12, 5), (12, 200)])
def test_windows_without_room_are_refused(tokenizer, max_length, doc_stride):
    with pytest.raises(UserError, match=f"max_length {max_length} leaves .* raise max_length or lower doc_"):
        tokenize(questions(("q", "w1", ["w1"]), doc_stride=doc_stride), tokenizer, max_length)


@st.composite
def questions_with_answers(draw):
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 30))
        context = [draw(st.sampled_from(["w1", "w2s", "w3.", "w4 \u2028", "w5  "])) for _ in range(length)]
        context = [f"w{i % 20} {word}" if i % 3 else word for i, word in enumerate(context)]
        at = draw(st.integers(0, length - 1))
        rows.append((" ".join(context), context[at].strip()))
    return rows


@given(questions_with_answers(), st.integers(8, 40), st.data())
def test_gold_spans_are_extracted_whole_at_any_stride(tokenizer, rows, room, data):
    """An answer of up to doc_stride + 1 tokens is whole in some window, wherever the windows are cut."""
    doc_stride = data.draw(st.integers(4, room - 1))
    max_length = 3 + room + (3 + room) // 2  # the question may take a third of it
    asked = [("q", context, [answer]) for context, answer in rows]
    encoded = encode(tokenizer, asked, max_length, doc_stride=doc_stride, n_best=1)
    scores = encoded.score(gold_outputs(encoded.rows))
    assert scores == {"exact_match": 1.0, "f1": 1.0}


def test_only_valid_spans_are_answers(tokenizer):
    """Not the question's tokens, none that end before they begin, none too long; the best of all windows."""
    asked = [("q", "w1 w2 w3 w4", ["w2 w3"])]
    output_S2 = np.zeros((8, 2))  # [CLS] q [SEP] w1 w2 w3 w4 [SEP]
    output_S2[1] = 9  # in the question
    output_S2[3, 0], output_S2[6, 1] = 5, 5  # four words
    output_S2[4, 0], output_S2[5, 1] = 4, 4  # the answer
    output_S2[6, 0], output_S2[3, 1] = 2, 2  # backwards
    scores = {
        n_best: encode(tokenizer, asked, max_answer_length=2, n_best=n_best).score([output_S2])
        for n_best in (1, 3)
    }
    assert scores[3]["exact_match"] == 1
    assert scores[1] == {"exact_match": 0, "f1": 0}  # its one span is too long


def test_no_answer_is_given_beyond_the_threshold(tokenizer):
    """The null score is the lowest of a question's windows; the best threshold is found as well."""
    asked = [("q", "w1 w2", ["w1"]), ("q", "w3 w4", [])]
    outputs = [np.zeros((6, 2)), np.zeros((6, 2))]  # [CLS] q [SEP] w1 w2 [SEP]
    outputs[0][3] = 1.0  # span 2, none 1: margin -1
    outputs[0][0] = 0.5
    outputs[1][0] = 2.0  # none 4, span 1: margin 3
    outputs[1][3, 0] = 1.0
    best = {"best_exact_match": 1.0, "best_f1": 1.0}
    for threshold, right in ((0.0, 1.0), (-2.0, 0.5), (5.0, 0.5)):
        encoded = encode(tokenizer, asked, may_be_absent=True, null_threshold=threshold)
        assert encoded.score(outputs) == {"exact_match": right, "f1": right, **best}


def test_the_null_score_is_the_lowest_of_all_windows(tokenizer):
    asked = [("q", "w1 w2 w3 w4 w5", ["w5"])]
    encoded = encode(tokenizer, asked, 8, may_be_absent=True, doc_stride=0)
    first, second = gold_outputs(encoded.rows)
    assert first[0].tolist() == [9, 9]  # this window is sure that it holds no answer
    assert encoded.score([first, second])["exact_match"] == 1


def test_the_model_must_have_the_right_head():
    data = questions(("q", "w1", ["w1"]))
    assert match_labels(data, BertConfig(architectures=["BertForQuestionAnswering"])) is data
    with pytest.raises(UserError, match=r"needs a model \.\.\.ForQuestionAnswering"):
        match_labels(data, BertConfig(architectures=["BertForSequenceClassification"]))
