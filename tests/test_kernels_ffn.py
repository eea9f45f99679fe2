"""Every case of the table through the Triton kernels, in Triton's interpreter, against float64 python_ref.

bfloat16 is left to the GPU: the interpreter holds it as integers and multiplies those.
"""

import dataclasses

import pytest
import torch
from cases import CASES, Case, expert_ids
from conftest import INTERPRETING
from kernel_checks import assert_as_good_as, call, inputs, leaves, outputs, reference, run

from moebert_kernels import RoutingPlan, ops

pytestmark = [
    pytest.mark.skipif(not INTERPRETING, reason="with a GPU these cases run on it: pytest -m gpu"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on the NaN of poisoned memory
]
triton = pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels import kernels  # noqa: E402
from moebert_kernels.kernels import configs  # noqa: E402
from moebert_kernels.kernels.configs import Config, Tile  # noqa: E402

SQUARE = Tile(16, 16, 16, 4, 2)
WIDE = Tile(16, 32, 16, 4, 2, parts=4)
PLAIN = Config(SQUARE, SQUARE, SQUARE, SQUARE, SQUARE)
STREAMED = Config(WIDE, WIDE, WIDE, WIDE, Tile(16, 32, 16, 4, 2), stream_k=True, tma=True)


@pytest.fixture(autouse=True)
def through_the_kernels(monkeypatch, poisoned_memory):
    monkeypatch.setattr(ops, "cpu", kernels)
    monkeypatch.setattr(configs, "select", lambda *_: PLAIN)


def check(case, dtype):
    t = inputs(case, dtype, "cpu")
    ours = run(case, t)
    with pytest.MonkeyPatch.context() as plain_path:
        from moebert_kernels import cpu

        plain_path.setattr(ops, "cpu", cpu)
        plain = run(case, t)
    assert_as_good_as(plain, ours, reference(case, t), expert_ids(case), case.E)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_in_float32(case):
    check(case, torch.float32)


STREAM_CASES = [c for c in CASES if c.T > 1 and c.E <= 4 and not c.norm]


@pytest.mark.parametrize("case", STREAM_CASES, ids=str)
def test_case_streamed_with_descriptors(case, monkeypatch):
    """Five programs share the weight gradients of up to a dozen tiles, so that most tiles are cut."""
    monkeypatch.setattr(configs, "select", lambda *_: STREAMED)
    check(case, torch.float32)
