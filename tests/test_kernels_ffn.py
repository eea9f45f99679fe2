"""Every case of the table through the Triton kernels, in Triton's interpreter, against float64 python_ref.

bfloat16 is left to the GPU: the interpreter holds it as integers and multiplies those.
"""

import dataclasses

import pytest
import torch
from cases import CASES, Case, expert_ids
from conftest import INTERPRETING
from kernel_checks import assert_as_good_as, call, inputs, leaves, reference, run

from moebert_kernels import RoutingPlan, ops

pytestmark = [
    pytest.mark.skipif(not INTERPRETING, reason="with a GPU these cases run on it: pytest -m gpu"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy on the NaN of poisoned memory
]
triton = pytest.importorskip("triton", reason="the kernels are written in Triton")

from moebert_kernels import kernels  # noqa: E402
from moebert_kernels.kernels import configs, launch  # noqa: E402
from moebert_kernels.kernels.configs import Config, Tile  # noqa: E402

SQUARE = Tile(16, 16, 16, 4, 2)
WIDE = Tile(16, 32, 16, 4, 2, parts=4)
PLAIN = Config(SQUARE, SQUARE, SQUARE, SQUARE, SQUARE)
STREAMED = Config(WIDE, WIDE, WIDE, WIDE, Tile(16, 32, 16, 4, 2), stream_k=True, tma=True)


DENSE = dataclasses.replace(PLAIN, dense_slots=64, dense=SQUARE)


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


FLOAT16_CASES = [c for c in CASES if c.T in (18, 19, 23)]


@pytest.mark.parametrize("case", FLOAT16_CASES, ids=str)
def test_case_in_float16(case):
    check(case, torch.float16)


STREAM_CASES = [c for c in CASES if c.T > 0 and c.E <= 4 and not c.norm and c.activation == "gelu"]


@pytest.mark.parametrize("case", STREAM_CASES, ids=str)
def test_case_streamed_with_descriptors(case, monkeypatch):
    """Five programs share the weight gradients of up to a dozen tiles, so that most tiles are cut."""
    monkeypatch.setattr(configs, "select", lambda *_: STREAMED)
    check(case, torch.float32)


def test_strides_of_x_and_of_the_gradient_do_not_matter():
    """Columns of a wider matrix, a transposed one, and the stride-0 gradient that `sum` sends back."""
    case = Case(13, gate=True)
    t = inputs(case, torch.float32, "cpu")
    wide_TD = torch.randn(case.T, 2 * case.D)
    wide_TD[:, : case.D] = t["x"]
    expected = run(case, t | {"dy": torch.ones(case.T, case.D)})
    for x in (wide_TD[:, : case.D], t["x"].T.contiguous().T):
        u = leaves(t)
        u["x"] = x.detach().requires_grad_()
        y = call(case, u, RoutingPlan.from_expert_ids(expert_ids(case), case.E))
        names = [k for k in u if k != "dy"]
        grads = dict(zip(names, torch.autograd.grad(y.sum(), [u[k] for k in names]), strict=True))
        for name, grad in grads.items():
            assert torch.equal(grad, expected["d" + name]), name


def test_any_subset_of_inputs_may_require_grad():
    """Skipping a gradient skips kernels and buffers: what is left must not notice."""
    case = Case(9, K=2, gate=True, routing="dropped")
    t = inputs(case, torch.float32, "cpu")
    everything = run(case, t)
    plan = RoutingPlan.from_expert_ids(expert_ids(case), case.E)
    names = [k for k in t if k != "dy"]
    for wanted in ([n] for n in names):
        part = {k: v.clone().requires_grad_(k in wanted) for k, v in t.items()}
        grads = torch.autograd.grad(call(case, part, plan), [part[n] for n in wanted], t["dy"])
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, everything["d" + name]), f"{name} alone"


def test_backward_twice_gives_the_same():
    """A peer wrote into its saved tensors: its second backward was wrong."""
    case = Case(9, gate=True, norm=True)
    t = leaves(inputs(case, torch.float32, "cpu"))
    y = call(case, t, RoutingPlan.from_expert_ids(expert_ids(case), case.E), dropout_p=0.2)
    names = [k for k in t if k != "dy"]
    first, second = (
        torch.autograd.grad(y, [t[k] for k in names], t["dy"], retain_graph=True) for _ in range(2)
    )
    for name, a, b in zip(names, first, second, strict=True):
        assert torch.equal(a, b), name


def test_inference_equals_training_bit_for_bit():
    case = Case(21, K=2, routing="dropped")
    t = inputs(case, torch.float32, "cpu")
    plan = RoutingPlan.from_expert_ids(expert_ids(case), case.E)
    trained = call(case, leaves(t), plan)
    with torch.no_grad():
        assert torch.equal(call(case, t, plan), trained)


def test_streamed_gradients_do_not_depend_on_what_ran_before(monkeypatch):
    """Shares and workspaces are reused between routings: nothing of the last one may show."""
    monkeypatch.setattr(configs, "select", lambda *_: STREAMED)
    case, other = Case(33, routing="skewed"), Case(33, routing="first empty")
    t, u = inputs(case, torch.float32, "cpu"), inputs(other, torch.float32, "cpu", seed=1)
    first = run(case, t)
    run(other, u)
    for name, value in run(case, t).items():
        assert torch.equal(value, first[name]), name


def test_gates_of_any_floating_dtype():
    case = Case(9, gate=True)
    t = inputs(case, torch.float32, "cpu")
    t["gate"] = t["gate"].bfloat16().float()  # values that every dtype holds
    expected = run(case, t)
    for dtype in (torch.float64, torch.bfloat16):
        result = run(case, t | {"gate": t["gate"].to(dtype)})
        assert result["dgate"].dtype == dtype
        assert torch.equal(result["y"], expected["y"]), dtype
        assert torch.equal(result["dx"], expected["dx"]), dtype


DENSE_CASES = [c for c in CASES if c.T < 30 and c.E <= 4 and not c.norm]


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_case_masked_for_few_tokens(case, tma, monkeypatch):
    """Inference on few tokens runs all experts on all of them: the same values within the same bounds."""
    t = inputs(case, torch.float32, "cpu")
    plan = RoutingPlan.from_expert_ids(expert_ids(case), case.E)
    with torch.no_grad():
        grouped = {"y": call(case, t, plan)}
        monkeypatch.setattr(configs, "select", lambda *_: dataclasses.replace(DENSE, tma=tma))
        with launch.recorded() as launches:
            call(case, t, plan)
        masked = {"y": call(case, t, plan)}
    assert case.T == 0 or [l.kernel.__name__ for l in launches] == ["dense_up_kernel", "dense_down_kernel"]
    exact = {"y": reference(case, t)["y"]}
    assert_as_good_as(grouped, masked, exact, expert_ids(case), case.E)


def test_an_experts_infinities_stay_with_its_tokens(monkeypatch):
    """Masking by multiplication would spread them: 0 * inf is NaN."""
    case = Case(9, E=3)
    t = inputs(case, torch.float32, "cpu")
    t["w1"][1] = torch.inf
    t["b2"][1] = torch.inf
    ids_TK = expert_ids(case)
    plan = RoutingPlan.from_expert_ids(ids_TK, case.E)
    for config in (PLAIN, STREAMED, DENSE):
        monkeypatch.setattr(configs, "select", lambda *_, config=config: config)
        with torch.no_grad():
            finite_T = call(case, t, plan).isfinite().all(1)
        assert finite_T.equal(ids_TK[:, 0] != 1)
