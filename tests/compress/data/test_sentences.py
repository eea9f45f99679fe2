"""Sentences and scored pairs, as files hold them."""

import pytest

from moebert_kernels.compress.data.files import read_table, read_text
from moebert_kernels.compress.data.sentences import load_sentences
from moebert_kernels.compress.data.tasks.tables import CsvOptions
from moebert_kernels.errors import UserError


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_a_text_file_has_a_sentence_per_line(tmp_path):
    """A byte-order mark, carriage returns and empty lines are no text; other breaks are not line ends."""
    lines = [f"sentence {i}" for i in range(9)] + ["with\u2028a break", '"quoted"']
    path = write(tmp_path / "s.txt", "\ufeff" + "\r\n".join([*lines[:5], "", "  ", *lines[5:], ""]))
    data = load_sentences(path, columns=CsvOptions(validation_fraction=0.2))
    assert (len(data.train), len(data.validation)) == (9, 2)
    assert sorted([*data.train["text"], *data.validation["text"]]) == sorted(lines)
    assert data.train["text"] == [line for line in lines if line in set(data.train["text"])]
    assert data.further_validation == {}
    assert (data.task.kind, data.task.main_metric) == ("embedding", "cosine")


def test_what_is_held_out_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "s.txt", "\n".join(map(str, range(100))))

    def held_out(seed):
        return load_sentences(path, columns=CsvOptions(seed=seed)).validation["text"]

    assert held_out(0) == held_out(0)
    assert len(held_out(0)) == 10
    assert held_out(0) != held_out(1)


def test_tables_of_sentences_and_of_scored_pairs(tmp_path):
    table = write(tmp_path / "s.csv", "id,body\n" + "\n".join(f'{i},"a, {i}"' for i in range(8)))
    pairs = write(tmp_path / "p.tsv", "body\tother\tscore\na\tb\t1.5\nc\td\t4\n")
    columns = CsvOptions(text="body", text_pair="other", label="score")
    data = load_sentences(table, pairs=pairs, columns=columns)
    assert len(data.train) + len(data.validation) == 8
    assert "a, 3" in {*data.train["text"], *data.validation["text"]}
    expected = {"text": ["a", "c"], "text_pair": ["b", "d"], "label": [1.5, 4.0]}
    assert data.further_validation["pairs"].to_dict() == expected
    assert data.task.main_metric == "spearman_pairs"


def test_scored_pairs_of_the_original_files(tmp_path):
    sentences = write(tmp_path / "s.txt", "a\nb\nc\nd\n")
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    folder = tmp_path / "STS-B"
    folder.mkdir()
    for name in ("train", "dev"):
        rows = [f'{i}\tg\tf\ty\t{i}\tn\tn\t"{name} a{i}\tb{i}\t{i}.000' for i in range(3)]
        write(folder / f"{name}.tsv", header + "\n".join(rows) + "\n")
    pairs = load_sentences(sentences, pairs=folder).further_validation["pairs"]
    assert pairs["text"] == ['"dev a0', '"dev a1', '"dev a2']
    assert pairs["label"] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "text", "pairs", "options", "message"),
    [
        ("s.txt", "a\nb\n\nc\n", None, {}, "s.txt has 3 sentences, expected at least 4"),
        ("s.txt", "a\nb\nc\nd", None, {"validation_fraction": 1.0}, "is 1.0, expected between 0 and 1"),
        ("s.csv", "x\na\nb\nc\nd\n", None, {}, "no column 'text'; its columns are x; .* by text$"),
        ("s.pdf", "a\nb\nc\nd", None, {}, "must be named .csv"),
        ("s.txt", "a\nb\nc\nd", "text,label\na,1\nb,2\n", {}, "no column 'text_pair'"),
        ("s.txt", "a\nb\nc\nd", "text,x\na,1\nb,2\n", {}, "^pairs: .*'text_pair' and no column 'label'; .*"),
        ("s.txt", "a\nb\nc\nd", "text,text_pair,label\na,b,high\nc,d,1\n", {}, "'high' .* is not a number"),
        ("s.txt", "a\nb\nc\nd", "text,text_pair,label\na,b,1\n", {}, "has one pair, expected at least 2"),
    ],
)
def test_files_that_do_not_fit_are_refused(name, text, pairs, options, message, tmp_path):
    path = write(tmp_path / name, text)
    pairs_path = pairs and write(tmp_path / "p.csv", pairs)
    with pytest.raises(UserError, match=message):
        load_sentences(path, pairs=pairs_path, columns=CsvOptions(**options))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt is not a file"):
        load_sentences(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("load", "name", "listed"),
    [
        (read_table, "nowhere.csv", "c.JSONL, z.tsv, a.md, b.txt"),
        (read_text, "nowhere.txt", "b.txt, a.md, c.JSONL, z.tsv"),
        (load_sentences, "nowhere.csv", "b.txt, c.JSONL, z.tsv, a.md"),
    ],
)
def test_files_that_may_be_meant_come_first_and_hidden_ones_not_at_all(load, name, listed, tmp_path):
    """Hidden files filled the list."""
    (tmp_path / ".csv").mkdir()
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match=r"is not a file; .* holds hidden files alone$"):
        load(tmp_path / name)
    for other in ("a.md", "b.txt", "c.JSONL", "z.tsv", ".hidden.csv"):
        write(tmp_path / other, "")
    with pytest.raises(UserError, match=f"is not a file; .* holds {listed}$"):
        load(tmp_path / name)
