"""The bound that judges the kernels catches defects that outputs hardly show.

Plain torch plays the kernels here; that sound kernels pass is for `test_ffn.py` to show.
"""

import dataclasses

import pytest
import torch

from tests.cases import Case, expert_ids
from tests.kernels.checks import assert_as_good_as, errors, inputs, plain_errors, reference, run

CASE = Case(33, D=40, F=24, gate=True)


def judge(case, t, ours):
    assert_as_good_as(plain_errors(case, t), errors(ours, reference(case, t), expert_ids(case), case.E))


def keep_bits(v, bits):
    """The leading bits of float32, as a matrix unit that reads fewer cuts the rest off."""
    return (v.view(torch.int32) & -(1 << (24 - bits))).view(torch.float32)


def factors(t, change):
    return t | {k: change(v) for k, v in t.items() if k in ("x", "w1", "w2")}


def without_last_columns(x):
    return torch.cat([x[:, :32], torch.zeros_like(x[:, 32:])], 1)


# What a defective kernel computes instead.
DEFECTS = {
    "factors cut to TF32": lambda t: run(CASE, factors(t, lambda v: keep_bits(v, 11))),
    "factors cut to 20 bits": lambda t: run(CASE, factors(t, lambda v: keep_bits(v, 20))),
    "factors rounded to float16": lambda t: run(CASE, factors(t, lambda v: v.half().float())),
    "tanh GELU for erf": lambda t: run(dataclasses.replace(CASE, activation="gelu_tanh"), t),
    "last block of the sum over D dropped": lambda t: run(CASE, t | {"x": without_last_columns(t["x"])}),
    "pre-activations off by 1e-6": lambda t: run(CASE, t | {"b1": t["b1"] + 1e-6}),
}
# Wrong in one output only.
WRONG_GRADIENTS = {
    "dgate": lambda t: run(CASE, t | {"b2": torch.zeros_like(t["b2"])}),  # <dy, b2> forgotten
    "db2": lambda t: run(CASE, t | {"gate": t["gate"].bfloat16().float()}),  # the gate in half precision
    "dw1": lambda t: run(
        CASE, t | {"x": torch.cat([t["x"][:-1], torch.zeros_like(t["x"][-1:])])}
    ),  # a row lost
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught(defect):
    t = inputs(CASE, torch.float32, "cpu")
    with pytest.raises(AssertionError, match="of rms, limit"):
        judge(CASE, t, DEFECTS[defect](t))


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_a_defect_in_one_gradient_is_caught(name):
    t = inputs(CASE, torch.float32, "cpu")
    with pytest.raises(AssertionError, match=f"{name}, expert"):
        judge(CASE, t, run(CASE, t) | {name: WRONG_GRADIENTS[name](t)[name]})


def test_sums_in_half_precision_are_caught():
    """float16 products must be added up in float32."""
    case = dataclasses.replace(CASE, E=1, gate=False)
    t = inputs(case, torch.float16, "cpu")
    h_TF = t["b1"].expand(case.T, case.F).clone()
    for d in range(case.D):
        h_TF += t["x"][:, d, None] * t["w1"][0, :, d]
    y_TD = t["b2"].expand(case.T, case.D).clone()
    for a_T, w_D in zip(torch.nn.functional.gelu(h_TF).T, t["w2"][0].T, strict=True):
        y_TD += a_T[:, None] * w_D
    with pytest.raises(AssertionError, match="y, expert"):
        judge(case, t, run(case, t) | {"y": y_TD})


def test_a_value_where_exact_zeros_belong_is_caught():
    case = Case(33, routing="dropped")
    t = inputs(case, torch.float32, "cpu")
    ours = run(case, t)
    ours["dx"][0, 0] = 1e-30  # the first tokens have no expert
    with pytest.raises(AssertionError, match="dx, expert -1"):
        judge(case, t, ours)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_caught(poison):
    t = inputs(CASE, torch.float32, "cpu")
    ours = run(CASE, t)
    ours["dw2"][1, 0, 0] = poison
    with pytest.raises(AssertionError, match="dw2, expert 1"):
        judge(CASE, t, ours)
