"""What a stage takes for done, and what it makes anew."""

from __future__ import annotations

import shutil

import pytest

from moebert_kernels.compress.runs.stages import Stage, Stages


@pytest.fixture
def made(tmp_path):
    """A stage with a folder and a file, and how often it was done."""
    model, scores, times = tmp_path / "model", tmp_path / "scores", []

    def work(report):
        times.append(report)
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        (model / "weights").write_bytes(b"12345678")
        scores.write_bytes(b"1234")

    def run(made_from: str = "a") -> int:
        Stages(tmp_path, None).run("cut", made_from, work, model, scores)
        return len(times)

    assert run() == 1
    return run


@pytest.mark.parametrize(("name", "kept"), [("model/weights", 7), ("scores", 3), ("model/weights", None)])
def test_what_is_damaged_is_made_anew_and_said(made, tmp_path, name, kept):
    """Stops a run from handing out half a model as done, and from stumbling over it ever after."""
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    with pytest.warns(UserWarning, match=f"{path} is not as it was left, and is made anew"):
        assert made() == 2
    assert path.read_bytes() == content
    assert made() == 2


@pytest.mark.filterwarnings("error")
def test_what_others_put_there_or_delete_is_no_damage_nor_is_a_record_of_half_a_line(made, tmp_path):
    (tmp_path / "model" / "notes.txt").write_text("mine")
    assert made() == 1
    (tmp_path / "scores").unlink()
    assert made() == 2
    record = tmp_path / "work" / "stages" / "cut.json"
    record.write_text("{")
    assert not Stage(record, "a").is_outdated  # stops it from being said to be of other settings
    assert made() == 3


def test_other_settings_are_said(made):
    with pytest.warns(UserWarning, match="holds a run with other settings or data"):
        assert made("b") == 2
