"""The CPU path with native rows: every way it lays rows out, against float64 and against plain PyTorch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_kernels import RoutingPlan, native
from moebert_kernels.kernels import cpu
from moebert_kernels.kernels import torch as plain_torch
from moebert_kernels.kernels.call import Gradients
from moebert_kernels.kernels.cpu import rows
from moebert_kernels.ops import backends, operator
from tests.cases import Case, any_experts, expert_ids, tensors
from tests.kernels.checks import FORMS, arguments, assert_equal, call, errors, inputs, plan_of, reference, run

pytestmark = pytest.mark.skipif(not native.status().cpu, reason=native.status().cpu_detail)


@pytest.fixture
def restored_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def assert_near(found, wanted, limit):
    """Largest error relative to the reference's own size, per output."""
    for name, value in wanted.items():
        error = (found[name].double() - value).abs().max() / value.square().mean().sqrt().clamp(min=1e-3)
        assert error < limit, f"{name}: {error:.2e}"


@pytest.fixture(params=("together", "one after another", "in pieces"))
def layout(request, monkeypatch):
    """Forces a layout of rows that only large inputs would reach."""
    if request.param != "together":
        monkeypatch.setattr(rows, "_MAX_BATCH_FILL", -1)
    if request.param == "in pieces":
        monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 40)
    monkeypatch.setattr(backends, "_forms", {})


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("C", [0, 21])
def test_values_and_gradients_in_every_layout(layout, dtype, limit, norm, C, poisoned_memory):
    """90 rows for one expert and few for the others: filled up, and with an expert that has none.

    With shared neurons, row counts of no expert are those of a GEMM over all rows: rows beyond must not show.
    """
    case = Case(230, D=19, F=37, E=5, C=C, norm=norm, routing="dropped")
    t, ids_TK = inputs(case, dtype, "cpu"), expert_ids(case)
    ids_TK[:90], ids_TK[ids_TK == 3] = 1, -1
    exact, found = reference(case, t, ids_TK), run(case, t, ids_TK)
    with torch.no_grad():  # nothing is kept for backward: this is where pieces are cut
        inferred = call(case, t, RoutingPlan.from_expert_ids(ids_TK, case.E))
    for result in (found, found | {"y": inferred}):
        for group, (_, largest) in errors(result, exact, ids_TK, case.E).items():
            assert largest < limit, group


@given(
    st.sampled_from([1, 2, 7, 17, 66]),
    st.sampled_from([(6, 5), (16, 32), (65, 130)]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["gelu", "gelu_tanh", "relu", "silu"]),
    st.integers(0, 1000),
)
def test_values_and_gradients_equal_the_reference(T, sizes, E, K, gate, activation, seed):
    # A row of nearly equal numbers has no LayerNorm to speak of in float32: sizes from 5 on have none here.
    case = Case(T, *sizes, E, min(K, E), activation=activation, gate=gate, norm=True)
    t, ids_TK = inputs(case, torch.float32, "cpu", seed=seed), any_experts(case, seed=seed)
    assert_near(run(case, t, ids_TK), reference(case, t, ids_TK), 2e-4)


def both_ways(backend, call, dy_TD):
    y_TD, saved = backend.forward(call, True, {})
    gradients = backend.backward(call, saved, dy_TD, Gradients(*[True] * len(Gradients._fields)), {})
    return {"y": y_TD} | gradients._asdict()


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_equal_plain_pytorch(residual_dtype):
    """Autocast: bfloat16 rows, float32 residual and LayerNorm."""
    case = Case(33, D=24, F=8, E=3, K=2, C=6, routing="dropped", gate=True, norm=True)
    dtypes = dict.fromkeys(("gate", "ln_w", "ln_b"), torch.float32)
    dtypes |= dict.fromkeys(("residual", "dy"), residual_dtype)
    t = {name: v.to(dtypes.get(name, torch.bfloat16)) for name, v in tensors(case).items()}
    in_float64 = {name: v.double() for name, v in t.items()}
    call, exact_call = (arguments(v, plan_of(case, "cpu"), norm=True, gate=True) for v in (t, in_float64))
    found, plain = (both_ways(backend, call, t["dy"]) for backend in (cpu, plain_torch))
    for name, exact in both_ways(plain_torch, exact_call, in_float64["dy"]).items():
        assert found[name].dtype == plain[name].dtype or name == "gate_TK"
        ours, theirs = ((of[name].double() - exact).square().mean().sqrt() for of in (found, plain))
        assert ours <= 1.5 * theirs + 1e-6 * exact.square().mean().sqrt(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_for_every_thread_count(restored_threads, dtype):
    """Sums over rows are split by column or by token count, never by thread."""
    case = Case(700, D=64, F=96, norm=True, routing="dropped")
    t = inputs(case, dtype, "cpu")
    # torch's GEMMs are not ours: where weights are 0, only the row kernels compute.
    t |= {name: torch.zeros_like(t[name]) for name in ("w1", "w2")}
    results = []
    for num_threads in (1, 2, 3, 2):
        torch.set_num_threads(num_threads)
        call = arguments(t, plan_of(case, "cpu"), norm=True, gate=False, dropout_p=0.1)
        found = both_ways(cpu, call, t["dy"])
        results.append([found[name] for name in ("y", "b2_ED", "ln_w_ED", "ln_b_ED", "residual_TD")])
    for other in results[1:]:
        assert_equal(other, results[0])


def test_dropout_drops_its_share_without_a_pattern():
    """The mask is a hash of seed, row and column: rows, columns and seeds must not resemble each other."""
    T, D = 400, 300
    plan = RoutingPlan.from_expert_ids(torch.zeros(T, dtype=torch.long), 1)
    zeros, ones = torch.zeros(T, D), torch.ones(1, D)
    t = {"x": zeros, "w1": zeros[None, :1], "w2": zeros[None, 0, :, None], "b1": None, "b2": ones}
    t |= {"ln_w": ones, "ln_b": zeros[:1]}
    call = arguments(t, plan, norm=True, gate=False, dropout_p=0.25, residual=False)

    def dropped(seed):
        y, _ = cpu.forward(call._replace(seed=torch.tensor([seed])), False, {})
        return (y < 0).float()

    mask = dropped(2**61 + 3)
    assert mask.mean().item() == pytest.approx(0.25, abs=0.01)
    for other in (dropped(2**61 + 4), mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, 1), (0, 1))):
        assert (mask * other).mean().item() == pytest.approx(0.25**2, abs=0.01)


@pytest.mark.parametrize("sizes", [{"T": 20}, {"T": 300, "C": 16}], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_eager_calls_equal_those_through_the_dispatcher(norm, sizes, monkeypatch):
    case = Case(**sizes, E=3, norm=norm, routing="dropped")
    t = inputs(case, torch.float32, "cpu")
    direct = run(case, t)
    monkeypatch.setattr(operator, "unwatched", lambda _: False)
    assert_equal(run(case, t), direct)


def a_call(dtype, C=0, **form):
    """Of the operator, with the parts that a form names."""
    case = Case(5, D=8, F=8, E=2, C=C, gate=True, norm=True)
    return arguments(inputs(case, dtype, "cpu"), plan_of(case, "cpu"), **form)


@pytest.mark.parametrize("C", [0, 4])
def test_such_calls_go_this_way(C):
    """Stops the tests of this file from passing because another backend computed what they check."""
    for dtype, form in itertools.product((torch.float32, torch.float64), FORMS):
        served = dtype == torch.float32 and (form["norm"] or not form["gate"])
        assert (backends.choose(a_call(dtype, C, **form)) is cpu) == served, form


def test_tensors_of_another_device_do_not():
    """Stops row kernels from following addresses of memory that is not the host's, as of an Apple GPU."""
    call = a_call(torch.float32, norm=True, gate=False)
    moved = {name: getattr(call, name).to("meta") for name in ("x_TD", "w1_EFD", "w2_EDF")}
    assert (backends.choose(call), backends.choose(call._replace(**moved))) == (cpu, plain_torch)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 100, 2047, 2048, 100_003])
def test_row_counts_are_bounded_and_little_more(rows):
    """Each new row count of a 16-bit GEMM makes oneDNN build code for it: 32 counts an octave are enough."""
    bounded = native.extension().bounded_rows
    filled = bounded(rows)
    assert rows <= filled <= rows + rows // 32
    low = 1 << (rows.bit_length() - 1)
    octave = {bounded(n) for n in range(low, 2 * low, max(1, low // 512))}
    assert len(octave) <= 33


def test_offsets_beyond_the_slots_are_refused():
    """Stops a plan put together by hand from having memory behind its tables read."""
    case = Case(9, D=6, F=5, E=3)
    plan = plan_of(case, "cpu")
    plan.offsets_E1[-1] += 100
    with pytest.raises(ValueError, match=r"offsets_E1 end at .* but order_S has 9 slots"):
        call(case, inputs(case, torch.float32, "cpu"), plan)
