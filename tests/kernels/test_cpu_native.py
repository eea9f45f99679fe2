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
from tests.kernels.checks import FORMS, SHARED, arguments
from tests.ops.calls import make_inputs, ours, reference, used

pytestmark = pytest.mark.skipif(not native.status().cpu, reason=native.status().cpu_detail)


@pytest.fixture
def restored_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def run(t, ids, E, **options):
    """Output and gradients by name."""
    norm, gate = options["norm"], options["gate"]
    leaves = {n: v.detach().requires_grad_() for n, v in t.items()}
    y = ours(leaves, RoutingPlan.from_expert_ids(ids, E), **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    names = used(norm, gate)
    grads = torch.autograd.grad(y, [leaves[n] for n in names], dy, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}, dy


def expected(t, ids, dy, **options):
    leaves = {n: v.detach().double().requires_grad_() for n, v in t.items()}
    y = reference(leaves, ids, **options)
    names = used(options["norm"], options["gate"])
    grads = torch.autograd.grad(y, [leaves[n] for n in names], dy.double(), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def assert_near(found, wanted, limit):
    """Largest error relative to the reference's own size, per output."""
    for name, value in wanted.items():
        error = (found[name].double() - value).abs().max() / value.square().mean().sqrt().clamp(min=1e-3)
        assert error < limit, f"{name}: {error:.2e}"


LAYOUTS = ("one batch", "one after another", "in pieces")


@pytest.fixture
def layout(request, monkeypatch):
    """Forces a layout that only large inputs would reach."""
    if request.param != "one batch":
        monkeypatch.setattr(rows, "_MAX_BATCH_FILL", -1)
    if request.param == "in pieces":
        monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 5)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("norm", [False, True])
def test_values_and_gradients_in_every_layout(layout, dtype, limit, norm):
    """90 rows for one expert and few for the others: filled up, and with an expert that has none."""
    t, ids = make_inputs(130, 19, 37, 5, 1, dtype=dtype)
    ids[:90], ids[ids == 3] = 1, -1
    options = {"norm": norm, "gate": False}
    found, dy = run(t, ids, 5, **options)
    wanted = expected(t, ids, dy, **options)
    assert_near(found, wanted, limit)
    with torch.no_grad():  # nothing is kept for backward: this is where pieces are cut
        y = ours(t, RoutingPlan.from_expert_ids(ids, 5), **options)
    assert_near({"y": y}, {"y": wanted["y"]}, limit)


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
    t, ids = make_inputs(T, *sizes, E, min(K, E), seed=seed, dtype=torch.float32)
    # A row of nearly equal numbers has no LayerNorm to speak of in float32: sizes from 5 on have none here.
    options = {"norm": True, "gate": gate, "activation": activation}
    found, dy = run(t, ids, E, **options)
    assert_near(found, expected(t, ids, dy, **options), 2e-4)


def both_ways(backend, call, dy_TD):
    y_TD, saved = backend.forward(call, True, {})
    return y_TD, backend.backward(call, saved, dy_TD, Gradients(*[True] * len(Gradients._fields)), {})


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_equal_plain_pytorch(residual_dtype):
    """Autocast: bfloat16 rows, float32 residual and LayerNorm."""
    torch.manual_seed(0)
    t, ids = make_inputs(33, 24, 8, 3, 2)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    t |= {
        "shared_w1": torch.randn(6, 24) * 24**-0.5,
        "shared_b1": torch.randn(6),
        "shared_w2": torch.randn(24, 6) * 6**-0.5,
    }
    dtypes = dict.fromkeys(("x", "w1", "b1", "w2", "b2", *SHARED), torch.bfloat16) | {
        "residual": residual_dtype
    }
    t = {name: v.detach().to(dtypes.get(name, torch.float32)) for name, v in t.items()}
    call = arguments(t, plan, norm=True, gate=True)
    exact_call = arguments({name: v.double() for name, v in t.items()}, plan, norm=True, gate=True)
    dy = torch.randn(33, 24).to(residual_dtype)
    found, plain = ((y, *grads) for y, grads in (both_ways(b, call, dy) for b in (cpu, plain_torch)))
    exact_y, exact_grads = both_ways(plain_torch, exact_call, dy.double())
    for name, a, b, exact in zip(
        ("y", *Gradients._fields), found, plain, (exact_y, *exact_grads), strict=True
    ):
        assert a.dtype == b.dtype or name == "gate_TK"
        ours, theirs = ((value.double() - exact).square().mean().sqrt() for value in (a, b))
        assert ours <= 1.5 * theirs + 1e-6 * exact.square().mean().sqrt(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_for_every_thread_count(restored_threads, dtype):
    """Sums over rows are split by column or by token count, never by thread."""
    t, ids = make_inputs(700, 64, 96, 4, 1, dtype=dtype)
    t = {name: v.detach() for name, v in t.items()}
    # torch's GEMMs are not ours: where weights are 0, only the row kernels compute.
    t |= {name: torch.zeros_like(t[name]) for name in ("w1", "w2")}
    results = []
    for num_threads in (1, 2, 3, 2):
        torch.set_num_threads(num_threads)
        call = arguments(t, RoutingPlan.from_expert_ids(ids, 4), norm=True, gate=False, dropout_p=0.1)
        y, grads = both_ways(cpu, call, t["residual"])
        results.append([y, grads.b2_ED, grads.ln_w_ED, grads.ln_b_ED, grads.residual_TD])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


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


@pytest.mark.parametrize("norm", [False, True])
def test_eager_calls_equal_those_through_the_dispatcher(norm, monkeypatch):
    t, ids = make_inputs(20, 16, 24, 3, 1, dtype=torch.float32)
    direct, _ = run(t, ids, 3, norm=norm, gate=False)
    monkeypatch.setattr(operator, "unwatched", lambda _: False)
    dispatched, _ = run(t, ids, 3, norm=norm, gate=False)
    for name, value in direct.items():
        assert torch.equal(value, dispatched[name]), name


def test_such_calls_go_this_way():
    """Stops the tests of this file from passing because another backend computed what they check."""
    served = {}
    for dtype, form in itertools.product((torch.float32, torch.float64), FORMS):
        t, ids = make_inputs(5, 8, 8, 2, 1, dtype=dtype)
        call = arguments(t, RoutingPlan.from_expert_ids(ids, 2), **form)
        served[dtype, form["norm"], form["gate"]] = backends.choose(call) is cpu
    gate_without_norm = {key for key in served if key[2] and not key[1]}
    assert all(served[key] == (key[0] == torch.float32 and key not in gate_without_norm) for key in served)


def test_tensors_of_another_device_do_not():
    """Stops row kernels from following addresses of memory that is not the host's, as of an Apple GPU."""
    t, ids = make_inputs(5, 8, 8, 2, 1, dtype=torch.float32)
    call = arguments(t, RoutingPlan.from_expert_ids(ids, 2), norm=True, gate=False)
    elsewhere = call._replace(
        **{name: getattr(call, name).to("meta") for name in ("x_TD", "w1_EFD", "w2_EDF")}
    )
    assert (backends.choose(call), backends.choose(elsewhere)) == (cpu, plain_torch)


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
    t, ids = make_inputs(9, 6, 5, 3, 1, dtype=torch.float32)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    plan.offsets_E1[-1] += 100
    with pytest.raises(ValueError, match=r"offsets_E1 end at .* but order_S has 9 slots"):
        ours(t, plan, norm=False, gate=False)
