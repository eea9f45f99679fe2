import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from moebert_kernels.compress.data import docstrings
from moebert_kernels.compress.data.docstrings import (
    load_docstrings,
    split_docstring,
    standard_library_snippets,
)
from tests.compress.data.library import write_library


@pytest.fixture(scope="module")
def snippets():
    """Those of Python's own library, which take seconds to read."""
    return tuple(standard_library_snippets(Path(sysconfig.get_paths()["stdlib"])))


@pytest.fixture(scope="module")
def real(snippets):
    """The task that is made of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "standard_library_snippets", lambda _: snippets)
        return load_docstrings()


def about(subject, count):
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    return {f"f{i}": f"This {subject} function number {i} does {words[i % 8]}." for i in range(count)}


@pytest.fixture
def library(tmp_path):
    packages = {"email": about("letter", 60), "json": about("object", 40), "csv": about("x", 9)}
    return write_library(tmp_path, packages)


def all_texts(data):
    return [*data.train["text"], *data.validation["text"]]


def test_the_real_task_is_sized_and_balanced(real):
    packages = real.task.label_names
    assert len(packages) == 10
    assert packages == tuple(sorted(packages))
    assert 2000 <= len(real.train) <= 3600
    assert 700 <= len(real.validation) <= 1200
    for rows in (real.train, real.validation):
        counts = Counter(rows["label"])
        assert sorted(counts) == list(range(10))
        assert max(counts.values()) <= 2 * min(counts.values())


def test_the_same_library_gives_the_same_task(library):
    first, again = (load_docstrings(num_packages=2, library=library) for _ in range(2))
    assert first.task == again.task
    assert first.train.to_dict() == again.train.to_dict()
    assert first.validation.to_dict() == again.validation.to_dict()


def test_no_text_names_a_package_or_is_on_both_sides(real):
    names = re.compile("|".join(real.task.label_names), re.IGNORECASE)
    train, validation = set(real.train["text"]), set(real.validation["text"])
    assert not [text for text in train | validation if names.search(text)]
    assert len(train) == len(real.train)
    assert not train & validation


def test_a_function_is_on_one_side(real, snippets):
    """Overridden methods repeat each other's documentation; apart, one would give away the other."""
    owners = {}
    for snippet in snippets:
        owners.setdefault(snippet.text, (snippet.package, snippet.definition))
    train, validation = (
        {owners[text] for text in rows["text"] if text in owners} for rows in (real.train, real.validation)
    )
    assert len(train) > 1000
    assert len(validation) > 300
    assert not train & validation


def test_the_packages_with_most_text_are_chosen(library):
    data = load_docstrings(num_packages=2, library=library)
    assert data.task.label_names == ("email", "json")
    assert len(data.train) + len(data.validation) == 100


def test_names_are_masked_wherever_they_stand(tmp_path):
    texts = {"f": "Parse an Email or emails with EmailMessage and json objects, as said before."}
    library = write_library(tmp_path, {"email": texts, "json": {"g": "Nothing is said here but five words."}})
    data = load_docstrings(num_packages=2, library=library)
    assert "Parse an *** or *** with *** and *** objects, as said before." in all_texts(data)


def test_text_of_two_packages_is_dropped_and_repeated_text_kept_once(tmp_path):
    shared, twice = "Return a copy of the object itself.", "Close the thing and all it holds."
    own = "Something only this package ever says."
    packages = {"email": {"a": shared, "b": twice, "c": twice}, "json": {"a": shared, "d": own}}
    data = load_docstrings(num_packages=2, library=write_library(tmp_path, packages))
    assert sorted(all_texts(data)) == [twice, own]


def test_a_package_has_its_limit_on_both_sides(library):
    data = load_docstrings(num_packages=2, train_per_package=12, library=library)
    assert max(Counter(data.train["label"]).values()) == 12
    assert max(Counter(data.validation["label"]).values()) == 4


def test_seeds_split_differently(library):
    first, second = (load_docstrings(num_packages=2, seed=seed, library=library) for seed in (0, 1))
    assert set(first.validation["text"]) != set(second.validation["text"])


def test_a_library_without_sources_is_said_to_be_one(library):
    with pytest.raises(ValueError, match="docstrings in 3 packages, the task needs 10"):
        load_docstrings(library=library)


def test_tests_strangers_and_broken_files_are_not_read(tmp_path):
    packages = {"email": about("letter", 1), "mine": about("own", 1), "email/test": about("test", 1)}
    write_library(tmp_path, packages)
    (tmp_path / "json.py").write_text("def broken(:\n")
    found = {(s.package, s.text) for s in standard_library_snippets(tmp_path)}
    assert found == {("email", "This letter function number 0 does alpha.")}


def test_nothing_is_imported_or_run(tmp_path):
    write_library(tmp_path, {"email": about("letter", 1)})
    module = '"""A module that must not be run."""\nraise SystemExit\n'
    (tmp_path / "email" / "__init__.py").write_text(module)
    assert [s.text for s in standard_library_snippets(tmp_path)] == ["A module that must not be run."]


@pytest.mark.parametrize(
    ("docstring", "snippets"),
    [
        ("", []),
        ("Too short.", []),
        ("One line of five words.", ["One line of five words."]),
        ("Broken over\n    two lines of text.", ["Broken over two lines of text."]),
        (
            "First paragraph has five words.\n\nSecond one has five too.",
            ["First paragraph has five words.", "Second one has five too."],
        ),
        (
            "Short ones. Are joined. Until there are enough words in all.",
            ["Short ones. Are joined. Until there are enough words in all."],
        ),
        (
            "This sentence alone has exactly as many words as are needed, twelve. Another one follows it.",
            ["This sentence alone has exactly as many words as are needed, twelve."],
        ),
        (">>> this is code and so it is out\nreally", []),
        ("word " * 50, ["word " * 39 + "word"]),
    ],
)
def test_docstrings_are_cut_into_sentences(docstring, snippets):
    assert split_docstring(docstring) == snippets
