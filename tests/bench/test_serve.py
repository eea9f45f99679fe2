"""`python -m bench serve`: workers that take turns, who is refused, aims, tables and the picture."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper  # noqa: E402

from bench.plot import NotDrawn  # noqa: E402
from bench.readme import update  # noqa: E402
from bench.results import Results, read, write  # noqa: E402
from bench.serve import LIMITS, ServeSettings, batches, measure, relative_error  # noqa: E402
from bench.serving.aims import AIMS, reached  # noqa: E402
from bench.serving.contenders import Contender  # noqa: E402
from bench.serving.picture import draw, fastest  # noqa: E402
from bench.serving.quality import FILE  # noqa: E402
from bench.serving.rounds import take_turns, workers  # noqa: E402
from bench.serving.tables import aim_tables, main_tables, time_tables  # noqa: E402


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads, cpus = torch.get_num_threads(), os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cpus)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Everything once at toy size."""
    folder = tmp_path_factory.mktemp("serve")
    text = folder / "here" / "text.txt"
    text.parent.mkdir()
    text.write_text("\n".join("word " * (1 + line % 5) for line in range(32)))
    settings = ServeSettings(
        ("toy",),
        str(text),
        threads=1,
        rounds=1,
        seconds=0.0,
        only=("torch", "onnxruntime"),
        models=("teacher", "ours"),
        graphs=folder,
    )
    said: list[str] = []
    return measure(settings, folder, said.append), folder, said, settings


def test_every_contender_answers_as_pytorch_does_and_is_timed(toy):
    results, folder, said, _ = toy
    assert {row.case["case"] for row in results.rows} == {"1×5", "2×6", "text"}
    assert len(results.rows) == 3 * (2 + 2 * 3)
    for row in results.rows:
        assert row.did_not_run is None, row
        assert row.errors["y"] <= LIMITS[row.case["precision"]]
        assert row.seconds.median > 0
    assert read(folder / "serve-cpu.jsonl").rows == results.rows
    assert {row.case["text"] for row in results.rows} == {None, "here/text.txt"}
    assert "no picture: " in "".join(said)


def test_what_is_there_is_not_made_again(toy):
    _, folder, _, settings = toy
    graphs = {path: path.stat().st_mtime_ns for path in folder.rglob("*.onnx")}
    said: list[str] = []
    assert measure(settings, None, said.append, prepare_only=True) is None
    assert said == []
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.onnx")} == graphs


def test_tables_of_a_run(toy):
    results, folder, _, _ = toy
    (times,) = time_tables(results)
    assert times.columns[-1].startswith("text, 32×")
    names = [line.name for line in times.lines]
    assert names[:3] == ["torch fp32: teacher", "torch fp32: ours", "onnxruntime fp32: teacher, padded"]
    assert "onnxruntime int8: ours" in names
    _, int8 = aim_tables(results)
    assert [line.name for line in int8.lines] == ["teacher / ours, text"]
    assert [table.title for table in main_tables(results)] == [times.title, int8.title]
    readme = update("<!-- bench:serve:begin -->\n<!-- bench:serve:end -->\n", folder)
    assert "| toy, onnxruntime, int8 | padded | unpadded | aim |" in readme
    assert "not measured yet" in update(
        "<!-- bench:serve-quality:begin -->\n<!-- bench:serve-quality:end -->\n", folder
    )


def renamed(row, case, seconds, **changes):
    """A toy row as one of the cases that aims are about."""
    time = replace(row.seconds, median=seconds)
    return replace(row, seconds=time, case=row.case | {"case": case, "shape": "minilm", **changes})


def test_aims_are_ratios_to_each_form_of_a_rival(toy):
    def of(entry, form):
        return next(
            row
            for row in toy[0].rows
            if (row.entry, row.case["form"], row.case["runtime"]) == (entry, form, "onnxruntime")
        )

    rows = [
        renamed(of("ours", "unpadded"), "1×128", 2.0, precision="int8"),
        renamed(of("teacher", "padded"), "1×128", 3.2, precision="int8"),
        renamed(of("teacher", "unpadded"), "1×128", 2.8, precision="int8"),
    ]
    (found,) = reached(rows, "onnxruntime", "int8")
    assert (found.rival, found.case, found.least) == ("teacher", "1×128", 1.5)
    assert found.ratios == pytest.approx({"padded": 1.6, "unpadded": 1.4})
    assert reached(rows, "onnxruntime", "fp32") == []
    (_, table) = (*aim_tables(Results(toy[0].run, tuple(rows))),) * 2
    assert table.lines[0].cells == ("**1.60**", "1.40", "≥ 1.50")
    assert fastest(rows, "1×128", "teacher", "int8") == 2.8
    assert len({(aim.rival, aim.cases) for aim in AIMS}) == len(AIMS)


def test_the_picture_needs_both_measurements(toy, tmp_path):
    results = toy[0]
    rows = tuple(renamed(row, "1×32", row.seconds.median) for row in results.rows)
    told = Results(results.run, rows)
    with pytest.raises(NotDrawn, match=FILE):
        draw(told, tmp_path, tmp_path / "picture.svg")
    scores = {precision: {"agreement": 0.9} for precision in ("fp32", "int8")}
    (tmp_path / FILE).write_text(json.dumps({"models": dict.fromkeys(("teacher", "narrow", "ours"), scores)}))
    with pytest.raises(NotDrawn, match="minilm was not timed"):
        draw(results, tmp_path, tmp_path / "picture.svg")
    assert draw(told, tmp_path, tmp_path / "picture.svg").read_text().count("<svg") == 1
    write(tmp_path, results.run, rows)


def graph_that_adds(number: float, path):
    """input_ids + number as float."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "number"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "adds",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length"])],
        [helper.make_tensor("number", TensorProto.FLOAT, [], [number])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_workers_take_turns_and_one_that_cannot_start_says_why(tmp_path):
    (batch,) = batches(True, None)[:1]
    np.savez(tmp_path / "inputs.npz", **{f"{batch.name}|input_ids": batch.feed["input_ids"]})
    contenders = [
        Contender(name, "onnxruntime", "fp32", "unpadded", graph_that_adds(number, tmp_path / f"{name}.onnx"))
        for name, number in (("teacher", 1.0), ("ours", 2.0))
    ]
    contenders.append(replace(contenders[0], model="narrow", path=tmp_path / "absent.onnx"))
    with workers(contenders, tmp_path / "inputs.npz", 1, lambda _: None) as running:
        assert list(running.started) == [contenders[0].name, contenders[1].name]
        assert "absent.onnx" in running.failed[contenders[2].name]
        for contender, number in zip(contenders[:2], (1, 2), strict=True):
            found = running.started[contender.name].answers[batch.name]
            assert np.array_equal(found, batch.feed["input_ids"] + number)
        samples, failed = take_turns(running.started, batch.name, 4, 0.0, time.monotonic() + 60)
        assert failed == {}
        assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys(running.started, 4)
        samples, _ = take_turns(running.started, batch.name, 9, 0.0, time.monotonic() - 1)
        assert {len(taken) for taken in samples.values()} == {3}
        running.started[contenders[0].name].process.kill()
        samples, failed = take_turns(running.started, batch.name, 3, 0.0, time.monotonic() + 60)
        assert list(samples) == [contenders[1].name]
        assert list(failed) == [contenders[0].name]
    assert all(worker.process.poll() is not None for worker in running.started.values())


def test_an_error_is_relative_and_shapes_must_agree():
    expected = np.array([[3.0, 4.0]])
    assert relative_error(expected * 1.1, expected) == pytest.approx(0.1)
    assert relative_error(expected[0], expected) == float("inf")
    assert not relative_error(expected * np.nan, expected) <= 1.0


def test_wrong_names_are_told():
    with pytest.raises(ValueError, match="there is no runtime onnx; there are: torch, onnxruntime, openvino"):
        measure(ServeSettings(only=("onnx",)), None, print)
