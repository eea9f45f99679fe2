"""Data sets of the hub: real ones of tiny size in local folders, and those that cannot be loaded."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

from moebert_kernels.compress.data.tasks import CsvOptions, load_task
from moebert_kernels.errors import UserError


def save(folder, splits, config="default"):
    """Write parquet files as the hub keeps them, with the description that names their configuration."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for name, rows in splits.items():
        path = folder / config / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(path)
        lines += [f"  - split: {name}", f"    path: {config}/{name}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pairs(*labels, names=("not_duplicate", "duplicate")):
    features = {"question1": Value("string"), "question2": Value("string"), "label": ClassLabel(names=names)}
    rows = [{"question1": f"Is it {i}?", "question2": None, "label": label} for i, label in enumerate(labels)]
    return Dataset.from_list(rows, features=Features(features))


def test_glue_by_name(tmp_path):
    """The class names of the data set count, not its ids; a missing text is an empty one."""
    names = ("duplicate", "not_duplicate")
    splits = {"train": pairs(1, 0, 1, names=names), "validation": pairs(1, names=names)}
    data = load_task("qqp", f"hub:{save(tmp_path / 'glue', splits, 'qqp')}:qqp")
    assert data.train["label"][:] == [0, 1, 0]
    assert data.validation["label"][:] == [0]
    assert data.train[0] == {"text": "Is it 0?", "text_pair": "", "label": 0}


def test_the_tasks_own_data_sets_are_asked_for(monkeypatch):
    asked = []

    def load(name, config):
        asked.append((name, config))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("mnli", "squad", "squad_v2", "conll"):
        with pytest.raises(UserError, match=r"the data set .* cannot be loaded: no network"):
            load_task(name, "hub")
    assert asked == [
        ("nyu-mll/glue", "mnli"),
        ("rajpurkar/squad", None),
        ("rajpurkar/squad_v2", None),
        ("lhoestq/conll2003", None),
    ]
    with pytest.raises(UserError, match="task csv has no data set of its own"):
        load_task("csv", "hub")
    for wrong in ("hub:", "hub::x", "hub:x:"):
        with pytest.raises(UserError, match="lacks a name"):
            load_task("mnli", wrong)


def test_mnli_and_a_regression(tmp_path, monkeypatch):
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(3)})
    row = {"premise": "A.", "hypothesis": "B.", "label": 2}
    one = Dataset.from_list([row], features=features)
    found = DatasetDict({"train": one, "validation_matched": one, "validation_mismatched": one})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: found)
    data = load_task("mnli", "hub")
    expected = [{"text": "A.", "text_pair": "B.", "label": 2}]
    assert [rows.to_list() for rows in data.validation_sets.values()] == [expected, expected]

    scored = Dataset.from_list([{"sentence1": "A.", "sentence2": "B.", "label": 3.8}])
    scored = scored.cast_column("label", Value("float32"))
    found = DatasetDict({"train": scored, "validation": scored})
    assert load_task("stsb", "hub").train["label"][:] == pytest.approx([3.8])
    found = DatasetDict({"train": scored, "test": scored})
    with pytest.raises(UserError, match=r"nyu-mll/glue:stsb has no split 'validation'; it has train, test"):
        load_task("stsb", "hub")


def test_hidden_labels_are_refused(tmp_path):
    folder = save(tmp_path / "glue", {"train": pairs(1, -1), "validation": pairs(1)})
    with pytest.raises(UserError, match=r"\(train\), row 2: label '-1' is unknown"):
        load_task("qqp", f"hub:{folder}")


@pytest.mark.parametrize("has_validation", [True, False])
def test_ones_own_table(tmp_path, has_validation):
    rows = Dataset.from_dict({"review": [f"row {i}" for i in range(10)], "stars": [i % 2 for i in range(10)]})
    splits = {"train": rows} | ({"validation": rows.select([1])} if has_validation else {})
    folder = save(tmp_path / "mine", splits)
    data = load_task("csv", f"hub:{folder}", csv=CsvOptions(text="review", label="stars"))
    assert data.task.label_names == ("0", "1")
    assert len(data.train) == (10 if has_validation else 9)
    assert len(data.validation) == 1


def test_tagged_words(tmp_path):
    features = {"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=["O", "I-X"]))}
    rows = [{"tokens": ["a", "b"], "ner_tags": [1, 0]}, {"tokens": [], "ner_tags": []}]
    named = Dataset.from_list(rows, features=Features(features))
    data = load_task("conll", f"hub:{save(tmp_path / 'ner', {'train': named, 'validation': named})}")
    assert data.task.label_names == ("O", "B-X", "I-X")
    assert data.train.to_list() == [{"words": ["a", "b"], "label": [1, 0]}]
    plain = Dataset.from_dict({"tokens": [["c", "d"]], "ner_tags": [["B-X", "I-X"]]})
    data = load_task("conll", f"hub:{save(tmp_path / 'plain', {'train': plain, 'validation': plain})}")
    assert data.validation.to_list() == [{"words": ["c", "d"], "label": [1, 2]}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": [["a"]], "tags": [["O"]]}, "has no column 'ner_tags'; its columns are tokens, tags"),
        ({"tokens": [["a"]], "ner_tags": [["O", "O"]]}, "row 1: 1 words, but 2 tags"),
        ({"tokens": [["a"]], "ner_tags": [[7]]}, "tag 7 is not 'O', 'B-TYPE' or 'I-TYPE'"),
        ({"tokens": ["a"], "ner_tags": ["O"]}, "does not hold a list of tags per sentence"),
    ],
)
def test_tags_of_another_form_get_a_sentence(tmp_path, columns, message):
    rows = Dataset.from_dict(columns)
    with pytest.raises(UserError, match=message):
        load_task("conll", f"hub:{save(tmp_path / 'ner', {'train': rows, 'validation': rows})}")


def test_questions(tmp_path):
    answers = {"text": ["b"], "answer_start": [2]}
    row = {"id": "1", "title": "t", "question": "q", "context": "a b", "answers": answers}
    unanswered = row | {"answers": {"text": [], "answer_start": []}}
    rows = Dataset.from_list([row, unanswered])
    folder = save(tmp_path / "squad", {"train": rows, "validation": rows})
    data = load_task("squad_v2", f"hub:{folder}")
    assert data.train.to_list() == [
        {"question": "q", "context": "a b", "answers": ["b"], "starts": [2]},
        {"question": "q", "context": "a b", "answers": [], "starts": []},
    ]
    with pytest.raises(UserError, match=r"\(train\), row 2: no answer"):
        load_task("squad", f"hub:{folder}")
    listed = Dataset.from_list([row | {"answers": [{"text": "b", "answer_start": 2}]}])
    folder = save(tmp_path / "listed", {"train": listed, "validation": listed})
    assert load_task("squad", f"hub:{folder}").train.to_list() == data.train.to_list()[:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "b"}, "row 1 is not a question with its answers"),
        ({"answers": {"text": ["b"]}}, "KeyError 'answer_start'"),
        ({"question": None}, "None where text is expected"),
        ({"answers": {"text": ["b"], "answer_start": [1, 2]}}, "row 1: 1 answers, but 2 places"),
        ({"answers": {"text": ["z"], "answer_start": [9]}}, "has no question whose answer is a part of its"),
    ],
)
def test_questions_of_another_form_get_a_sentence(monkeypatch, change, message):
    row = {"question": "q", "context": "a b", "answers": {"text": ["b"], "answer_start": [2]}}
    rows = Dataset.from_list([row | change])
    found = DatasetDict({"train": rows, "validation": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: found)
    with pytest.raises(UserError, match=message):
        load_task("squad", "hub:mine")


def test_what_is_not_there_gets_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_task("qqp", f"hub:{tmp_path / 'absent'}")
    folder = save(tmp_path / "glue", {"train": pairs(1), "validation": pairs(1)}, "qqp")
    with pytest.raises(UserError, match=r"cannot be loaded.*mnli"):
        load_task("mnli", f"hub:{folder}:mnli")
