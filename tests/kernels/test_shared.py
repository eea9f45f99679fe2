"""The Triton kernels where experts share neurons, interpreted and on a GPU, against float64 python_ref."""

import itertools

import pytest
import torch

from tests.cases import SHARING, Case, expert_ids
from tests.kernels.checks import (
    call,
    check,
    errors,
    inputs,
    leaves,
    outputs,
    plan_of,
    recorded,
    reference,
    run,
    send_to,
    use_config,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels.kernels import triton as kernels  # noqa: E402
from tests.kernels.tiles import PLAIN, STREAMED  # noqa: E402


@pytest.fixture(autouse=True)
def through_the_kernels(device, monkeypatch, poisoned_memory):
    """CPU tensors go to the interpreted kernels, and tiles are small enough for small cases to have many."""
    send_to(kernels, monkeypatch)
    use_config(PLAIN, monkeypatch)


@pytest.mark.parametrize("case", SHARING, ids=str)
def test_case_in_float32(case, device):
    check(case, torch.float32, device)


@pytest.mark.parametrize("case", [SHARING[2], SHARING[4]], ids=str)
def test_case_in_float16(case, device):
    check(case, torch.float16, device)


@pytest.mark.parametrize("case", [c for c in SHARING if c.T > 11], ids=str)
def test_case_streamed_with_descriptors(case, device, monkeypatch):
    """Shared weights' tiles, which go over all rows, are cut like those of experts."""
    use_config(STREAMED, monkeypatch)
    check(case, torch.float32, device)


def test_many_tokens_are_streamed_without_being_asked(device):
    """Plain, a shared tile's program would take as long as all experts' together."""
    case = Case(300, C=16, F=16, routing="skewed")
    t = inputs(case, torch.float32, device)
    with recorded() as launches:
        run(case, t)
    assert "weight_grad_stream_kernel" in [l.kernel.__name__ for l in launches]
    for group, (_, largest) in errors(run(case, t), reference(case, t), expert_ids(case), case.E).items():
        assert largest < 1e-4, group


def test_any_subset_of_inputs_may_require_grad(device):
    """Shared weights' gradients come out of the experts' kernels: nobody's may be left out or made up."""
    case = Case(5, E=2, D=8, F=8, C=16, gate=True, routing="dropped")
    t = inputs(case, torch.float32, device)
    everything = run(case, t)
    plan = plan_of(case, device)
    names = [k for k in t if k != "dy"]
    # Of any three, each choice is among these.
    for wanted in (c for n in (1, len(names) - 1) for c in itertools.combinations(names, n)):
        part = {k: v.clone().requires_grad_(k in wanted) for k, v in t.items()}
        grads = torch.autograd.grad(call(case, part, plan), [part[n] for n in wanted], t["dy"])
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, everything["d" + name]), f"{name} with {wanted}"


def test_launches_are_those_of_experts_that_share_nothing(device):
    """Forward and backward: the shared block is a matter of addresses within them."""
    names = []
    for case in (Case(9, F=32, norm=True), Case(9, F=16, C=16, norm=True)):
        t = leaves(inputs(case, torch.float32, device))
        y = call(case, t, plan_of(case, device))
        with recorded() as launches:
            call(case, t, plan_of(case, device))
            outputs(y, t)
        names.append([l.kernel.__name__ for l in launches])
    assert names[0] == names[1]


def test_inference_equals_training_bit_for_bit(device):
    case = Case(21, K=2, C=24, routing="dropped")
    t = inputs(case, torch.float32, device)
    plan = plan_of(case, device)
    trained = call(case, leaves(t), plan)
    with torch.no_grad():
        assert torch.equal(call(case, t, plan), trained)
