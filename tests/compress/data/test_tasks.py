import csv
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from transformers import BertConfig

from moebert_kernels.compress.data.tasks import (
    AnswerOptions,
    CsvOptions,
    Task,
    TaskData,
    constant_score,
    describe_labels,
    load_task,
    match_labels,
    task_names,
    tokenize,
)
from moebert_kernels.errors import UserError
from tests import tiny

SST2 = "sentence\tlabel\nfine \t1\nit 's \" bad\t0\n"
COLA = "gj04\t1\t\tThe sailors rode.\nbc01\t0\t*\tRode sailors the.\n"
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t10\t11\t" He said so .\tHe said so .\r\n'
    '0\t12\t13\tShe left .\t" I stay , " he said\u2028 .\r\n'
)
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    '0\tmain\tx\t2012\t0001\tnone\tnone\tA "plane.\tAn air plane.\t5.000\n'
    "1\tmain\tx\t2012\t0004\tnone\tnone\tA man.\tA girl.\t0.250"
)
QQP = (
    "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    "1\t10\t11\tWhy?\tHow?\t0\n"
    '2\t12\t13\t"Was he\r real?\n"\tIs there evidence?\t1\n'
    "3\t14\t15\tWho\n\nis\nthere?\t\t0\n"
)
QNLI = (
    "index\tquestion\tsentence\tlabel\n"
    '0\tWhat does " mean?\tIt is a quotation mark.\tentailment\n'
    "1\tWho?\tNobody\u2028came\x0c.\tnot_entailment\n"
)
RTE = "index\tsentence1\tsentence2\tlabel\n0\tA b.\tA.\tentailment\n1\tA.\tA b.\tnot_entailment\n"
WNLI = "index\tsentence1\tsentence2\tlabel\n0\tIt is.\tHe is.\t1\n1\tIt was.\tShe was.\t0\n"
FILES = {"sst2": SST2, "cola": COLA, "mrpc": MRPC, "stsb": STSB}
FILES |= {"qqp": QQP, "qnli": QNLI, "rte": RTE, "wnli": WNLI}


def glue_folder(tmp_path, text, dev=None):
    (tmp_path / "train.tsv").write_bytes(text.encode())
    (tmp_path / "dev.tsv").write_bytes((dev or text).encode())
    return tmp_path


def rows(dataset):
    return dataset.to_list()


GLUE = {
    "sst2": [("fine ", 1), ("it 's \" bad", 0)],
    "cola": [("The sailors rode.", 1), ("Rode sailors the.", 0)],
    "mrpc": [('" He said so .', "He said so .", 1), ("She left .", '" I stay , " he said\u2028 .', 0)],
    "stsb": [('A "plane.', "An air plane.", 5.0), ("A man.", "A girl.", 0.25)],
    "qqp": [
        ("Why?", "How?", 0),
        ('"Was he\r real?\n"', "Is there evidence?", 1),
        ("Who\nis\nthere?", "", 0),
    ],
    "qnli": [
        ('What does " mean?', "It is a quotation mark.", 0),
        ("Who?", "Nobody\u2028came\x0c.", 1),
    ],
    "rte": [("A b.", "A.", 0), ("A.", "A b.", 1)],
    "wnli": [("It is.", "He is.", 1), ("It was.", "She was.", 0)],
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_files_are_read_as_published(tmp_path, name):
    """Stops quote-aware readers, byte-order marks, \\r, U+2028 and missing last newlines from eating rows."""
    data = load_task(name, glue_folder(tmp_path, FILES[name]))
    columns = ("text", "label") if name in ("sst2", "cola") else ("text", "text_pair", "label")
    expected = [dict(zip(columns, row, strict=True)) for row in GLUE[name]]
    assert rows(data.train) == rows(data.validation) == expected
    assert data.task.name == name
    assert data.task.main_metric in data.task.metric_names


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sst2", "sentence\tlabel\nfine\t1\nbad\n", r"train\.tsv, line 3: 1 fields, expected 2"),
        ("sst2", SST2.replace("\t0", "\t2"), "line 3: label '2' is unknown, expected one of '0', '1'"),
        ("sst2", "text\tlabel\nfine\t1\n", r"no column 'sentence'; its columns are text, label"),
        ("sst2", "sentence\tlabel\n", "no rows of data"),
        ("sst2", "", "no rows of data"),
        ("cola", "source\tlabel\tmark\tsentence\n", "line 1: label 'label' is unknown"),
        ("stsb", STSB.replace("0.250", "high"), "line 3: label 'high' in column 'score' is not a number"),
        ("stsb", STSB.replace("0.250", "nan"), "line 3: label 'nan' in column 'score' is not a number"),
    ],
)
def test_a_wrong_glue_file_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load_task(name, glue_folder(tmp_path, text, dev=FILES[name]))


def test_mnli_has_two_validation_sets(tmp_path):
    """Its files have more labels per row in validation than in training; only the gold one counts."""
    head, row = "index\tsentence1\tsentence2\t", "0\tA {}.\tB.\t"
    for name, votes in (("train", 1), ("dev_matched", 5), ("dev_mismatched", 5)):
        labels = "".join(f"label{i + 1}\t" for i in range(votes)) + "gold_label\n"
        fields = "neutral\t" * votes + "contradiction\n"
        (tmp_path / f"{name}.tsv").write_text(head + labels + row.format(name) + fields)
    data = load_task("mnli", tmp_path)
    assert data.task.label_names == ("entailment", "neutral", "contradiction")
    assert list(data.further_validation) == ["mismatched"]
    for name, found in zip(("", "mismatched"), ("dev_matched", "dev_mismatched"), strict=True):
        assert rows(data.validation_sets[name]) == [{"text": f"A {found}.", "text_pair": "B.", "label": 2}]
    matched = match_labels(data, BertConfig(id2label={0: "CONTRADICTION", 1: "entailment", 2: "neutral"}))
    assert matched.further_validation["mismatched"]["label"][:] == [0]


def test_broken_rows_are_joined_only_where_that_completes_them(tmp_path):
    """Stops a row that lost its end from swallowing the one after it."""
    glue_folder(tmp_path, QQP.replace("Why?\tHow?\t0", "Why?\tHow?"), dev=QQP)
    with pytest.raises(UserError, match=r"train\.tsv, line 2: 5 fields, expected 6"):
        load_task("qqp", tmp_path)
    glue_folder(tmp_path, SST2.replace("fine ", "fi\nne"), dev=SST2)
    with pytest.raises(UserError, match=r"train\.tsv, line 2: 1 fields, expected 2"):
        load_task("sst2", tmp_path)


def test_wrong_paths_and_names(tmp_path):
    with pytest.raises(UserError, match="task 'sst' is unknown; there are cola, sst2, mrpc"):
        load_task("sst", tmp_path)
    with pytest.raises(UserError, match="absent is not a folder"):
        load_task("sst2", tmp_path / "absent")
    with pytest.raises(UserError, match=r"train\.tsv is not a file; .* is empty"):
        load_task("sst2", tmp_path)
    (tmp_path / "SST-2").mkdir()
    glue_folder(tmp_path / "SST-2", SST2)
    assert rows(load_task("sst2", tmp_path).train) == rows(load_task("sst2", tmp_path / "SST-2").train)
    with pytest.raises(UserError, match="belong to task csv"):
        load_task("sst2", tmp_path / "SST-2", csv=CsvOptions())
    with pytest.raises(UserError, match="belong to squad and squad_v2, not to sst2"):
        load_task("sst2", tmp_path / "SST-2", answers=AnswerOptions())


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    glue_folder(tmp_path, SST2)
    (tmp_path / "dev.tsv").write_bytes("sentence\tlabel\nfine\t1\ncafé\t1\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"dev\.tsv, line 3: not UTF-8"):
        load_task("sst2", tmp_path)


@pytest.fixture
def load_table(tmp_path):
    """Load the task of a table with this content, and validate on another one if that is given."""

    def write(name, content):
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
        return tmp_path / name

    def load(content, name="t.csv", validation=None, **options):
        if validation is not None:
            options["validation_file"] = write(f"dev-{name}", validation)
        return load_task("csv", write(name, content), csv=CsvOptions(**options))

    return load


def test_csv_keeps_the_names_of_labels_and_the_text_inside_quotes(load_table):
    table = 'id,body,kind\n1,"a, ""b""\nc",spam\n2,d,ham\n\n3,e,spam\n'
    data = load_table(table, "mine.csv", "kind,body\nham,x\n", text="body", label="kind")
    assert data.task == Task("mine", "classification", ("ham", "spam"), ("accuracy", "macro_f1"), "accuracy")
    assert rows(data.train) == [
        {"text": 'a, "b"\nc', "label": 1},
        {"text": "d", "label": 0},
        {"text": "e", "label": 1},
    ]
    assert rows(data.validation) == [{"text": "x", "label": 0}]


def test_jsonl_is_read_as_it_is_written(load_table):
    """Stops a class 1.0 from being called 1, and lists that nobody asks for from being refused."""
    text = (
        '{"body": "a\\n\\"b\\"", "stars": 1.0, "meta": {"id": 7}}\n\n{"stars": 2, "body": null, "meta": 0}\n'
    )
    data = load_table(text * 2, "t.jsonl", text="body", label="stars")
    assert data.task.label_names == ("1.0", "2")
    found = sorted(rows(data.train) + rows(data.validation), key=lambda row: row["label"])
    assert found == [{"text": 'a\n"b"', "label": 0}] * 2 + [{"text": "", "label": 1}] * 2


@pytest.mark.parametrize(
    ("labels", "kind", "expected_kind", "names"),
    [
        (("10", "9", "-1"), None, "classification", ("-1", "9", "10")),
        (("1.0", "0.0", "1.0"), None, "classification", ("0.0", "1.0")),
        (("1", "2.5", "3"), None, "regression", ()),
        (("1", "2", "3"), "regression", "regression", ()),
        (("1.5", "2.5", "1.5"), "classification", "classification", ("1.5", "2.5")),
        (("1.5", "b", "c"), None, "classification", ("1.5", "b", "c")),
        (("0", "1", "0.0", "1.0"), None, "classification", ("0", "1")),
        (("pos", " pos", "neg ", "neg"), None, "classification", ("neg", "pos")),
        (("1", "1.0", "b"), None, "classification", ("1", "1.0", "b")),
    ],
)
def test_the_kind_of_a_csv_task_is_inferred_or_given(load_table, labels, kind, expected_kind, names):
    table = "text\tlabel\n" + "".join(f"x\t{label}\n" for label in labels * 3)
    task = load_table(table, "t.tsv", kind=kind).task
    assert (task.kind, task.label_names) == (expected_kind, names)


def test_held_out_rows_depend_on_the_seed_alone_and_leave_nothing_out(load_table):
    table = "text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40))

    def split(seed):
        data = load_table(table, validation_fraction=0.2, seed=seed)
        return data.train["text"][:], data.validation["text"][:]

    train, validation = split(0)
    assert len(validation) == 8
    assert sorted(train + validation) == sorted(f"row {i}" for i in range(40))
    assert split(0) == (train, validation)
    assert split(1) != (train, validation)


def test_held_out_rows_have_each_label_in_its_due_share(load_table):
    """Six rows held out of thirty good and thirty bad ones used to be five of one kind at times."""
    table = "text,label\n" + "".join(f"row {i},{i % 3 == 0}\n" for i in range(60))
    for seed in range(5):
        data = load_table(table, validation_fraction=0.1, seed=seed)
        assert sorted(data.validation["label"][:]) == [0, 0, 0, 0, 1, 1]


def test_a_label_of_which_no_row_is_left_to_train_on_is_refused(load_table):
    """A table of two rows was accepted: one to train on, and one of the other label to validate on."""
    with pytest.raises(UserError, match=r"too few rows: of the 1 to train on, none has the label '[ab]'"):
        load_table("text,label\nx,a\ny,b\n")


def test_empty_texts_and_few_rows_are_told(load_table, tmp_path):
    lines = [f"row {i},{i % 2}\n" for i in range(60)]
    table = "text,label\n" + "".join([*lines[:2], ",0\n", *lines, " ,1\n"])
    with pytest.warns(UserWarning, match="empty") as told:
        found = load_table(table)
    assert len(found.train) == 58
    where = f"{tmp_path / 't.csv'}, line 4"
    assert found.oddities == (
        f"{where}: the text in column 'text' is empty, and in 1 more rows; such rows are kept.",
    )
    assert [str(warning.message) for warning in told] == list(found.oddities)
    assert found.scarcity == "Scores say little: there are 6 rows to validate on, fewer than 30."
    assert replace(found, validation=found.train.select(range(30))).scarcity is None
    with pytest.warns(UserWarning, match="dev-t.csv, line 2"):
        assert len(load_table(table, validation="text,label\n,0\nx,1\n").oddities) == 2
    with pytest.raises(UserError, match=r"no text in column 'text': it is empty in every row"):
        load_table("text,label\n" + ",a\n,b\n" * 9)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "text,label\na,0.5\nb,1\nc,nan\n", "line 4: label 'nan' .* not a number, though most are"),
        ("t.csv", "text,label\n" + "".join(f"a,l{i}\n" for i in range(9)), "9 different labels in 9 rows"),
        ("t.csv", "text,label\na,1\nb\n", r"t\.csv, line 3: 1 fields, expected 2"),
        ("t.csv", 'text,label\n"a\nb",1\nc,"2\n', r"t\.csv, line 4: unexpected end of data"),
        ("t.csv", "text,text,label\na,b,1\nc,d,0\n", "more than one column 'text'"),
        ("t.csv", "text,label\na,1\nb,1\n", "one label in column 'label', '1'; two are needed"),
        ("t.csv", "text,label\na,1\nb,\n", "line 3: the label in column 'label' is empty"),
        ("t.csv", "text,label\na,1.5\n", "too few to hold any out"),
        ("t.csv.gz", "text,label\na,1\n", r"t\.csv\.gz is compressed: unpack it first \(gunzip\)"),
        ("t.csv", "\x1f\udc8bx", r"t\.csv is compressed: unpack it first"),
        ("t.tsv", "text,label\na,1\n", r"no tab in its first line, 'text,label': name it \.csv"),
        ("t.txt", "text,label\na,1\n", r"must be named \.csv .* \.tsv .* or \.jsonl"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: no 'label', which line 1 has"),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": "b", }\n', "line 2: not json"),
        ("t.jsonl", '{"text": "a", "label": 1}\n["b", 2]\n', "line 2: a list, expected an object"),
        (
            "t.jsonl",
            '{"text": [], "label": 1}\n{"text": [], "label": 2}',
            "line 1: 'text' is a list, expected text or a number",
        ),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"text": [], "label": 2}\n', "line 2: 'text' is a list"),
        ("t.jsonl", "[" * 100000, "line 1: not json"),
        ("t.jsonl", "\n", "no rows of data"),
    ],
)
def test_wrong_tables_get_a_sentence(load_table, name, content, message):
    with pytest.raises(UserError, match=message):
        load_table(content, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "regression"}, "line 3: label 'x' .* is not a number"),
        ({"text_pair": "other"}, "no column 'other'"),
        ({"kind": "ranking"}, "kind is 'ranking'"),
        ({"validation_fraction": 1.0}, "validation_fraction must be between 0 and 1, got 1.0"),
    ],
)
def test_wrong_options_of_a_table_get_a_sentence(load_table, options, message):
    with pytest.raises(UserError, match=message):
        load_table("text,label\na,1\nb,x\n", **options)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("t.csv", 'text;label\n"a; b, c";1\nd,e;0\n'),
        ("t.csv", 'text\tlabel\r\n"a; b, c"\t1\r\nd,e\t0\r\n'),
        ("t.csv", '"text"|label\n"a; b, c"|1\nd,e|0\n'),
        ("t.csv", '"text",label\n"a; b, c",1\n"d,e",0\n'),
        ("t.csv", 'text,label\r"a; b, c",1\r"d,e",0\r'),
        ("t.tsv", "text\tlabel\ra; b, c\t1\rd,e\t0\r"),
    ],
)
def test_a_table_is_read_however_it_is_separated(load_table, name, table):
    """Stops tables as spreadsheets write them from being refused without a cause."""
    data = load_table(table, name, validation=table)
    assert rows(data.train) == [{"text": "a; b, c", "label": 1}, {"text": "d,e", "label": 0}]


def test_a_text_may_be_of_any_length(load_table):
    """Stops a .csv from being refused for a field that a .tsv may have."""
    long = "a " * 100_000
    table = f"text,label\n{long},1\nb,0\n"
    assert load_table(table, validation=table).train["text"][0] == long
    assert csv.field_size_limit() == 131072


def test_labels_that_are_spelled_otherwise_are_found(load_table):
    """Stops 1.0, or a 1 with a space around it, from being another class than 1."""
    data = load_table("text,label\na,0\nb, 1\nc,1.0\n", validation="text,label\na,1.00 \nb,0e0\n")
    assert (data.train["label"][:], data.validation["label"][:]) == ([0, 1, 1], [1, 0])
    assert describe_labels(data) == "3 training rows, 2 to validate; 2 classes: 0 (1), 1 (2)"


@pytest.mark.parametrize(
    ("name", "table", "kind"),
    [
        ("t.csv", "text,label\na,red|round\nb,\nc, round |red|red\nd,round\n", "multi_label_classification"),
        ("t.csv", 'text,label\na,"red, round"\nb,\nc,"round,red"\nd,round\n', "multi_label_classification"),
        (
            "t.jsonl",
            '{"text": "a", "label": ["red", "round"]}\n{"text": "b"}\n'
            '{"text": "c", "label": ["round", "red"]}\n{"text": "d", "label": "round"}\n',
            None,
        ),
    ],
)
def test_several_labels_to_a_text(load_table, name, table, kind):
    """Stops tables of a common kind of task, and its data sets' lists, from being read as odd classes."""
    data = load_table(table, name, validation=table, kind=kind)
    metrics = ("micro_f1", "macro_f1", "accuracy")
    assert data.task == Task("t", "multi_label_classification", ("red", "round"), metrics, "micro_f1")
    assert data.train["label"][:] == [[0, 1], [], [0, 1], [1]]
    assert describe_labels(data).endswith("; 2 classes: red (2), round (3)")


def test_what_several_labels_do_not_allow(load_table):
    """Stops a model of several labels from failing after minutes, or of one label from being taken for it."""
    table = "text,label\n" + "a,red|round\nb,round\nc,red\n" * 4
    kind = "multi_label_classification"
    several, one = load_table(table, kind=kind), load_table(table)
    config = BertConfig(id2label={0: "round", 1: "red"}, architectures=["BertForSequenceClassification"])
    message = r"task t gives .* any number .* has problem_type None, expected 'multi_"
    with pytest.raises(UserError, match=message):
        match_labels(several, config)
    config.problem_type = kind
    with pytest.raises(UserError, match=r"the model gives a text any number of labels .* task t has one"):
        match_labels(one, config)
    found = match_labels(several, config)
    assert found.task.label_names == ("round", "red")
    assert {tuple(row) for row in found.train["label"]} == {(0,), (1,), (1, 0)}
    with pytest.raises(UserError, match="has no label in column 'label': it is empty"):
        load_table("text,label\na,\nb,\n", kind=kind)


@pytest.mark.parametrize(
    ("kind", "labels", "metric", "expected"),
    [
        ("classification", [0, 1, 1, 1], "accuracy", 0.75),
        ("classification", [0, 1, 1, 1], "matthews", 0.0),
        ("multi_label_classification", [[0], [0, 1], [], [0]], "micro_f1", 0.75),
        ("regression", [0.5, 2.0], "pearson", 0.0),
        ("token_classification", [[0, 0], [1]], "f1", 0.0),
    ],
)
def test_what_an_answer_scores_that_is_always_the_same(kind, labels, metric, expected):
    """Stops a teacher that has learned nothing from passing for one that has."""
    rows = Dataset.from_dict({"label": labels})
    data = TaskData(Task("t", kind, ("a", "b"), (metric,), metric), rows, rows)
    assert constant_score(data) == pytest.approx(expected)


def test_the_labels_of_every_kind_are_told():
    """Stops a column of the wrong labels from being trained on with nobody told what was found."""

    def told(kind, labels, names=()):
        rows = Dataset.from_dict({"answers" if kind == "question_answering" else "label": labels})
        return describe_labels(TaskData(Task("t", kind, names, (), ""), rows, rows)).partition("; ")[2]

    names = tuple(f"c{i}" for i in range(12))
    assert told("classification", [11, 0, 0], names).startswith("12 classes: c0 (2), c1 (0), c2 (0),")
    assert told("classification", [11, 0, 0], names).endswith("c9 (0), and 2 more")
    assert told("regression", [0.5, 5.0, -1.0]) == "labels from -1 to 5"
    assert told("token_classification", [[0, 1], [0]], ("O", "B-X")) == "2 classes: O (2), B-X (1)"
    assert told("question_answering", [["a"], []]) == "1 questions without an answer"
    assert told("question_answering", [["a"], ["b"]]) == ""
    texts = Dataset.from_dict({"text": ["one", "two"]})
    without = TaskData(Task("t", "text", (), ("agreement",), "agreement"), texts, texts.select([0]))
    assert describe_labels(without) == "2 training texts, 1 held out; no labels"
    assert constant_score(without) is None


def test_a_validation_label_that_training_lacks_is_named(load_table):
    message = r"dev-t\.csv, line 2: label 'maybe' is unknown, expected one of 'no', 'yes'"
    with pytest.raises(UserError, match=message):
        load_table("text,label\na,yes\nb,no\n", validation="text,label\na,maybe\n")


def small_data(label_names=("no", "yes"), kind="classification"):
    task = Task("csv", kind, label_names, ("accuracy", "macro_f1"), "accuracy")
    train = Dataset.from_dict({"text": ["a b", "c"], "text_pair": ["b", "a b c"], "label": [0, 1]})
    return TaskData(task, train, train.select([1]))


def test_labels_follow_the_models_order():
    """Stops a model that calls class 0 "Yes" from being scored, or distilled, on swapped labels."""
    data = match_labels(small_data(), BertConfig(id2label={0: "Yes", 1: "No"}))
    assert data.task.label_names == ("yes", "no")
    assert data.train["label"][:] == [1, 0]
    assert data.validation["label"][:] == [0]
    assert data.train["text_pair"][:] == ["b", "a b c"]


def test_models_without_label_names_keep_the_tasks_order():
    data = small_data()
    assert match_labels(data, BertConfig(num_labels=2)) is data
    assert match_labels(data, BertConfig(id2label={0: "0", 1: "1"})) is data
    regression = small_data((), "regression")
    assert match_labels(regression, BertConfig(num_labels=1)) is regression


def test_labels_that_differ_only_by_case_stay_apart():
    data = match_labels(small_data(("A", "a")), BertConfig(id2label={0: "a", 1: "A"}))
    assert data.train["label"][:] == [1, 0]


def test_a_model_of_another_task_is_refused():
    with pytest.raises(UserError, match=r"3 outputs, but task csv .* needs 2"):
        match_labels(small_data(), BertConfig(num_labels=3))
    with pytest.raises(UserError, match="labels are up, down, the task's no, yes"):
        match_labels(small_data(), BertConfig(id2label={0: "up", 1: "down"}))


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.tokenizer(tmp_path, "abc", model_max_length=16)


def test_tokenize_pairs_cuts_and_leaves_padding_out(tokenizer):
    data = tokenize(small_data(), tokenizer, max_length=5)
    assert data.train["input_ids"][:] == [[2, 5, 3, 6, 3], [2, 7, 3, 5, 3]]
    assert data.train["token_type_ids"][:] == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert data.train["labels"][:] == [0, 1]
    assert "text" not in data.train.column_names
    assert data.validation["input_ids"][:] == [[2, 7, 3, 5, 3]]


def test_tokenize_refuses_lengths_the_model_cannot_take(tokenizer):
    for length in (2, 17):
        with pytest.raises(UserError, match=f"max_length must be 3 to the model's 16, got {length}"):
            tokenize(small_data(), tokenizer, max_length=length)


@pytest.fixture
def score(tmp_path, tokenizer):
    def score(name, logits, labels):
        if name == "csv":
            task = small_data().task
        else:
            task = load_task(name, glue_folder(tmp_path, FILES[name])).task
        found = Dataset.from_dict({"text": ["a"] * len(labels), "label": labels})
        encoded = tokenize(TaskData(task, found, found), tokenizer, 8)
        return encoded.validation_sets[""].score([np.array(row, dtype=np.float32) for row in logits])

    return score


def test_official_metrics_against_numbers_worked_by_hand(score):
    """Two true and one false positive, one true and one false negative."""
    logits = [[0, 1], [0, 2], [1, 0], [3, 0], [-1, 1]]
    labels = [1, 0, 0, 1, 1]
    assert score("sst2", logits, labels) == pytest.approx({"accuracy": 0.6})
    assert score("mrpc", logits, labels) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    assert score("qqp", logits, labels) == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    assert score("cola", logits, labels) == pytest.approx({"matthews": (2 * 1 - 1 * 1) / 6})
    assert score("csv", logits, labels) == pytest.approx({"accuracy": 0.6, "macro_f1": (2 / 3 + 1 / 2) / 2})
    stsb = score("stsb", [[1.0], [2.0], [4.0]], [1.0, 2.0, 3.0])
    assert stsb == pytest.approx({"pearson": 3 / np.sqrt(2 * 14 / 3), "spearman": 1.0})


def test_a_constant_prediction_has_no_correlation(score):
    """Stops NaN from entering result files."""
    assert score("stsb", [[2.0], [2.0]], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_every_task_has_a_name():
    glue = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
    assert task_names() == (*glue, "squad", "squad_v2", "conll", "csv")
