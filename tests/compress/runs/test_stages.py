"""What a stage takes for done."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from moebert_kernels.compress.runs.stages import Stage, Stages
from moebert_kernels.errors import OutputError


@pytest.fixture
def made(tmp_path):
    """A stage with a folder and a file, and how often it was done."""
    model, scores, times = tmp_path / "model", tmp_path / "scores", []

    def work(report):
        times.append(report)
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        save_file({"w": torch.ones(3)}, model / "model.safetensors")
        (model / "config.json").write_text('{"a": 1}')
        scores.write_text("1234")

    def run(made_from: str = "a") -> int:
        Stages(tmp_path, None).run("cut", made_from, work, model, scores)
        return len(times)

    assert run() == 1
    return run


@pytest.mark.parametrize(
    ("name", "kept"), [("model.safetensors", -1), ("config.json", -1), ("config.json", None)]
)
def test_what_is_damaged_is_no_result_and_the_way_out_is_said(made, tmp_path, name, kept):
    """Stops a run from handing out half a model as done, and from replacing what may be somebody's work."""
    path = tmp_path / "model" / name
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    with pytest.raises(OutputError, match=f"{path} is damaged or gone: move {path.parent}"):
        made()
    shutil.rmtree(path.parent)
    assert made() == 2
    assert path.read_bytes() == content


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("content", ["{", "null", "[1]", '{"fingerprint": "a"}'])
def test_what_others_change_is_no_damage_and_an_odd_record_none_at_all(made, tmp_path, content):
    """Stops labels that a user has named, or weights saved in another dtype, from being made anew."""
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "config.json").write_text('{"a": 2222}')
    save_file({"w": torch.ones(3).bfloat16()}, tmp_path / "model" / "model.safetensors")
    assert made() == 1
    (tmp_path / "scores").unlink()
    assert made() == 2
    record = tmp_path / "work" / "stages" / "cut.json"
    record.write_text(content)
    assert not Stage(record, "a").is_outdated  # stops it from being said to be of other settings
    assert made() == 3


def test_other_settings_are_said(made):
    with pytest.warns(UserWarning, match="holds a run with other settings or data"):
        assert made("b") == 2
