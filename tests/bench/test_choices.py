"""What `bench.choices` and `bench.training` compare the package with is what they say it is."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench import choices, testbed, training
from bench.alternatives import (
    Oracle,
    errors_of_experts,
    experts_of,
    experts_see,
    greedy_neurons,
    layers_see,
    means_of_cut,
    products,
)
from moebert_kernels.models import find_ffns
from tests.compress.toys import make_data, make_teacher


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    folder = make_teacher(tmp_path_factory.mktemp("subject") / "teacher", initializer_range=0.3)
    return testbed.Testbed("toy", folder, make_data(n=80), 16)


def explained(seen, dense, chosen):
    """The weighted squared error of the best output weights of some neurons, without a ridge."""
    root = seen.weight_T.sqrt()[:, None].double()
    a_TF = F.gelu(F.linear(seen.x_TD, dense.w1.weight, dense.w1.bias)).double()
    wanted = root * (a_TF @ dense.w2.weight.T.double() + dense.w2.bias)
    features = root * torch.cat([a_TF[:, list(chosen)], torch.ones(len(a_TF), 1)], 1)
    return float((features @ torch.linalg.lstsq(features, wanted).solution - wanted).square().sum())


def test_the_first_greedy_neurons_explain_most(bed):
    """The first alone, and of pairs with it the second: by trying all."""
    dense = find_ffns(bed.teacher)[0]
    seen = layers_see(bed.teacher, bed.to_fit(80, 0)[0])[0]
    with torch.no_grad():
        (products_GG,) = products(seen, dense, torch.zeros_like(seen.ids_T), 1)
        first, second, *_ = greedy_neurons(products_GG, dense, 5, ridge=1e-9).tolist()
        width = dense.w1.out_features
        assert first == min(range(width), key=lambda f: explained(seen, dense, [f]))
        assert second == min(
            (f for f in range(width) if f != first), key=lambda f: explained(seen, dense, [first, f])
        )
        given = greedy_neurons(products_GG, dense, 5, torch.tensor([7, 9]))
    assert given[:2].tolist() == [7, 9]
    assert len(set(given.tolist())) == 5


def test_an_oracle_errs_least(bed):
    """No table errs less in the first layer, whose inputs are the same for all."""
    maker = choices.Maker(bed, 0)
    student, *_ = maker._cut(choices.BASE)
    bed.fit(student)
    to_judge, _ = bed.judging
    errors_TE = errors_of_experts(experts_of(student)[0], experts_see(student, bed.teacher, to_judge)[0])
    oracle = Oracle(student, bed.teacher)
    bed.likeness(oracle)
    seen = experts_see(student, bed.teacher, to_judge)[0]
    whole = float((seen.weight_T * seen.sum_TD.var(1, correction=0)).sum()) * seen.sum_TD.shape[1]
    assert oracle.error_L[0] == pytest.approx(float(errors_TE.min(1).values.sum()) / whole, rel=1e-4)
    assert oracle.error_L[0] < bed.layer_error(student)


def test_rows_are_made_once_and_drawn(bed, tmp_path, monkeypatch):
    records = testbed.Records(tmp_path / "choices.json")
    wanted = ["4 experts", "narrow", "means of the cut", "greedy own neurons", "tables by error", "oracle"]
    choices.compare(bed, records, 1, wanted[:2])
    monkeypatch.setattr(choices.Maker, "judged", lambda *_: pytest.fail("made again"))
    records = testbed.Records(tmp_path / "choices.json")
    choices.compare(bed, records, 1, wanted[:2])
    monkeypatch.undo()
    choices.compare(bed, records, 1, wanted)
    rows = json.loads((tmp_path / "choices.json").read_text())["rows"]
    assert [row["name"] for row in rows] == wanted
    by_name = {row["name"]: row for row in rows}
    assert by_name["means of the cut"]["layer_error"] > by_name["4 experts"]["layer_error"]
    assert by_name["oracle"]["layer_error"] < by_name["4 experts"]["layer_error"]
    drawn = choices.table(rows)
    assert "| narrow | 72 | " in drawn
    assert drawn.count("\n|") == 2 + len(wanted) - 1


def test_means_of_what_was_cut_leave_no_mean_error(bed):
    maker = choices.Maker(bed, 0)
    choice = choices.Choice(experts=0, tables="", fit="means")
    student, index_LEF, _ = maker._cut(choice)
    means_of_cut(student, index_LEF, lambda layer: maker._products(choice, layer, None), bed.teacher)
    seen = layers_see(bed.teacher, bed.to_fit(choice.rows, 0)[0])[0]
    dense, narrow = (find_ffns(model)[0] for model in (bed.teacher, student))
    with torch.no_grad():
        outputs = [ffn.w2(F.gelu(ffn.w1(seen.x_TD))) for ffn in (dense, narrow)]
    mean_D = ((outputs[1] - outputs[0]) * seen.weight_T[:, None]).sum(0) / seen.weight_T.sum()
    assert float(mean_D.abs().max()) < 1e-4 * float(outputs[0].std())


def test_trainings_begin_with_the_same_student_and_local_steps_lower_its_error(bed, tmp_path):
    fits, records = training.Fits(bed), testbed.Records(tmp_path / "training.json")
    for name, how in {
        "local steps": training.Training(learning_rate=0.0, local_steps=50),
        "no labels": training.Training(labels=False, dropout=False, rows=1 << 30),
        "narrow, no labels, dropout off, 3e-5": training.Training(labels=False, student="narrow"),
    }.items():
        records.row({"subject": "toy", "name": name}, lambda how=how: training.train(bed, fits, how))
    local, trained, narrow = records.rows
    assert local["fitted"] == trained["fitted"] != narrow["fitted"]
    before, after = local["layer_error"]
    assert after < before
    assert len(trained["epochs"]) == 2
    assert "| narrow, no labels, dropout off, 3e-5 | " in training.table(records.rows)
