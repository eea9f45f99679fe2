"""Token classification: tagged files, entities as conlleval counts them, which token speaks for a word."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import BertConfig

from moebert_kernels.compress.data.tasks import Task, TaskData, load_task, match_labels, tokenize
from moebert_kernels.compress.data.tasks.entities import bio_tags, entity_scores
from moebert_kernels.errors import UserError
from tests import tiny

TRAIN = (
    "\ufeff-DOCSTART- -X- -X- O\r\n\r\n"
    "EU NNP B-NP I-ORG\r\n"  # IOB1: B- only between neighbours of one type
    "rejects VBZ B-VP O\r\n"
    "German JJ B-NP I-MISC\r\n"
    "British JJ I-NP B-MISC \r\n"
    '"\u00a0x" NN I-NP I-MISC\r\n'
    "\r\n\r\n"
    "-DOCSTART- -X- O O\n\n"
    "# NN B-NP O\n"
    "Blackburn NNP I-NP I-PER"
)
VALID = "New York\tB-PER\nis\tO\n\nhere\tO\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.txt").write_bytes(TRAIN.encode())
    (tmp_path / "valid.txt").write_text(VALID)
    return tmp_path


def test_files_are_read_as_published(folder):
    """Stops IOB1 files from teaching other labels than IOB2 files, and U+00A0 and # from being special."""
    data = load_task("conll", folder)
    assert data.task.kind == "token_classification"
    assert data.task.label_names == ("O", "B-MISC", "I-MISC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    names = [[data.task.label_names[label] for label in labels] for labels in data.train["label"]]
    assert names == [["B-ORG", "O", "B-MISC", "B-MISC", "I-MISC"], ["O", "B-PER"]]
    assert data.train["words"][0] == ["EU", "rejects", "German", "British", '"\u00a0x"']
    assert data.train["words"][1] == ["#", "Blackburn"]
    assert data.validation["words"][:] == [["New York", "is"], ["here"]]
    (folder / "train.txt").rename(folder / "eng.train")
    (folder / "valid.txt").rename(folder / "eng.testa")
    assert load_task("conll", folder).train.to_list() == data.train.to_list()


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        ("a O\nb\n", VALID, r"train\.txt, line 2: 'b' is not a word and a tag"),
        ("a PER\n", VALID, r"train\.txt, line 1: tag 'PER' is not 'O', 'B-TYPE' or 'I-TYPE'"),
        ("a B-\n", VALID, "tag 'B-' is not"),
        ("a O\n\nb O\n", VALID, "train.txt, line 1: no word from here on has a tag other than 'O'"),
        ("\n-DOCSTART- O\n", VALID, r"train\.txt has no sentences"),
        (
            TRAIN,
            "a O\n\nb O\nc I-LOC\n",
            r"valid\.txt, line 3: this sentence has the type 'LOC', .* MISC, ORG",
        ),
    ],
)
def test_wrong_files_get_a_sentence(folder, train, valid, message):
    (folder / "train.txt").write_text(train)
    (folder / "valid.txt").write_text(valid)
    with pytest.raises(UserError, match=message):
        load_task("conll", folder)


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_of_words_are_not_trained_on(folder, first):
    """Stops files whose first column counts the words from training on the words "1", "2", ..."""
    sentences = [["John", "sleeps"], ["Quito"]]
    lines = [f"{i + first}\t{word}\tO\n" for words in sentences for i, word in enumerate(words)]
    (folder / "train.txt").write_text("".join(lines[:2]) + "\n" + lines[2])
    (folder / "valid.txt").write_text("1 O\n\n2 O\n")
    with pytest.raises(UserError, match=r"train\.txt: the first column numbers the words .* take it out"):
        load_task("conll", folder)
    (folder / "train.txt").write_text("1 B-NUM\n3 I-NUM\n\n1 O\n")
    assert load_task("conll", folder).train["words"][:] == [["1", "3"], ["1"]]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no train file \(train.txt or the like\): .* is empty"):
        load_task("conll", tmp_path)
    with pytest.raises(UserError, match="absent is not a folder"):
        load_task("conll", tmp_path / "absent")


def test_entities_begin_alike_in_both_schemes():
    iob1 = ["I-A", "I-A", "B-A", "O", "I-B", "I-A", "B-A", "I-A"]
    iob2 = ["B-A", "I-A", "B-A", "O", "B-B", "B-A", "B-A", "I-A"]
    assert bio_tags(iob1) == bio_tags(iob2) == iob2
    assert bio_tags([]) == []


def test_scores_worked_by_hand():
    """Right: PER. A border off by one word, and a type confused, count as both wrong and missed."""
    gold = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["B-ORG", "O", "O"]]
    predicted = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-LOC", "O", "B-PER"]]
    expected = {"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7, "accuracy": 5 / 8}
    assert entity_scores(gold, predicted) == pytest.approx(expected)
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["ab", "c", "##d", "##e", "-", "f"]
    return tiny.tokenizer(tmp_path_factory.mktemp("words"), words, model_max_length=32)


METRICS = ("precision", "recall", "f1", "accuracy")
TASK = Task("conll", "token_classification", ("O", "B-A", "I-A"), METRICS, "f1")


def tagged(*sentences):
    rows = Dataset.from_list([{"words": words, "label": tags} for words, tags in sentences])
    return TaskData(TASK, rows, rows)


def test_the_first_token_of_a_word_carries_its_label(tokenizer):
    """ "c-f" is three tokens and one word; a word of which no token is left takes nobody's label."""
    data = tokenize(tagged((["abde", "\u200b", "c-f", "ab"], [1, 2, 0, 2]), ([], [])), tokenizer, 32)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in data.train["input_ids"]]
    assert tokens == [["[CLS]", "ab", "##d", "##e", "c", "-", "f", "ab", "[SEP]"], ["[CLS]", "[SEP]"]]
    assert data.train["labels"][:] == [[-100, 1, -100, -100, 0, -100, -100, 2, -100], [-100, -100]]
    assert set(data.train.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def outputs_of(rows, wrong=()):
    """Logits that say what the labels say; class 1 where there is none."""
    classes = [[1 if label < 0 else label for label in labels] for labels in rows["labels"]]
    for row, at in wrong:
        classes[row][at] = 0
    return [np.eye(3)[row] for row in classes]


@pytest.mark.parametrize("max_length", [3, 5, 32])
def test_long_sentences_are_scored_to_their_last_word(tokenizer, max_length):
    """Words beyond the length, or cut in two by it, count once; a word without tokens counts as O."""
    sentence = ["abde", "c-f", "\u200b", "ab", "abd", "f"]
    data = tokenize(tagged((sentence, [1, 2, 0, 0, 1, 2]), (["f"], [1])), tokenizer, max_length)
    encoded = data.validation_sets[""]
    assert all(len(ids) <= max_length for ids in encoded.rows["input_ids"])
    labels = [label for labels in encoded.rows["labels"] for label in labels if label >= 0]
    assert labels == [1, 2, 0, 1, 2, 1]
    assert encoded.score(outputs_of(encoded.rows)) == dict.fromkeys(METRICS, 1.0)
    last = len(encoded.rows) - 1
    missed = encoded.score(outputs_of(encoded.rows, wrong=[(last, 1)]))
    assert missed == pytest.approx({"precision": 1.0, "recall": 2 / 3, "f1": 4 / 5, "accuracy": 6 / 7})


def test_labels_follow_the_models_order():
    data = match_labels(tagged((["ab", "f"], [1, 0])), BertConfig(id2label={0: "i-a", 1: "b-a", 2: "o"}))
    assert data.train["label"][:] == [[1, 2]]
    assert data.task.label_names == ("I-A", "B-A", "O")
    wrong_head = BertConfig(id2label={0: "O", 1: "B-A", 2: "I-A"}, architectures=["BertForMaskedLM"])
    message = r"a BertForMaskedLM, but task conll needs a model \.\.\.ForTokenClass"
    with pytest.raises(UserError, match=message):
        match_labels(data, wrong_head)
