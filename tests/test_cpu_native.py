"""The CPU path with native rows: every way it lays rows out, against float64 and against plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import make_inputs, ours, reference, used
from torch import library

from moebert_kernels import RoutingPlan, backends, cpu, cpu_native, cpu_rows, native, ops

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
        monkeypatch.setattr(cpu_rows, "_MAX_BATCH_FILL", -1)
    if request.param == "in pieces":
        monkeypatch.setattr(cpu_rows, "_ROWS_AT_ONCE", 5)
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


@settings(max_examples=25, deadline=None, derandomize=True)
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


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_norm_of_mixed_dtypes_equals_plain_pytorch(residual_dtype):
    """Autocast: bfloat16 rows, float32 residual and LayerNorm."""
    t, ids = make_inputs(33, 24, 8, 3, 2)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    z = torch.randn(66, 24).bfloat16()
    args = (z, t["residual"].detach().to(residual_dtype), plan.expert_ids_TK, plan.order_S, plan.offsets_E1)
    norm = (t["ln_w"].detach().float(), t["ln_b"].detach().float(), t["gate"].detach().float())
    found = cpu_native.expert_norm_forward(*args, *norm, None, 1e-12, 0.0)
    plain = cpu.expert_norm_forward(*args, *norm, None, 1e-12, 0.0)
    routed_S = plan.expert_ids_TK.flatten() >= 0
    torch.testing.assert_close(found[0], plain[0])
    for a, b in zip(found[1:], plain[1:], strict=True):
        torch.testing.assert_close(a[routed_S], b[routed_S], rtol=1e-4, atol=1e-5)
    dy = torch.randn(33, 24).to(residual_dtype)
    for a, b in zip(
        cpu_native.expert_norm_backward(dy, *args[:2], *found[1:], *args[2:], *norm, None, 0.0, True),
        cpu.expert_norm_backward(dy, *args[:2], *plain[1:], *args[2:], *norm, None, 0.0, True),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_for_every_thread_count(restored_threads, dtype):
    """Sums over rows are split by column or by token count, never by thread."""
    t, ids = make_inputs(700, 64, 96, 4, 1, dtype=dtype)
    results = []
    for num_threads in (1, 2, 3, 2):
        torch.set_num_threads(num_threads)
        plan = RoutingPlan.from_expert_ids(ids, 4)
        z = t["x"].detach()
        args = (z, t["residual"].detach(), plan.expert_ids_TK, plan.order_S, plan.offsets_E1)
        norm = (t["ln_w"].detach(), t["ln_b"].detach(), None, torch.tensor([5]))
        y, *stats = cpu_native.expert_norm_forward(*args, *norm, 1e-5, 0.1)
        grads = cpu_native.expert_norm_backward(z, *args[:2], *stats, *args[2:], *norm, 0.1, False)
        results.append([y, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_dropout_drops_its_share_without_a_pattern():
    """The mask is a hash of seed, row and column: rows, columns and seeds must not resemble each other."""
    T, D = 400, 300
    plan = RoutingPlan.from_expert_ids(torch.zeros(T, dtype=torch.long), 1)
    args = (torch.ones(T, D), torch.zeros(T, D), plan.expert_ids_TK, plan.order_S, plan.offsets_E1)

    def dropped(seed):
        y, _, _ = cpu_native.expert_norm_forward(
            *args, torch.ones(1, D), torch.zeros(1, D), None, torch.tensor([seed]), 1e-12, 0.25
        )
        return (y < 0).float()

    mask = dropped(2**61 + 3)
    assert mask.mean().item() == pytest.approx(0.25, abs=0.01)
    for other in (dropped(2**61 + 4), mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, 1), (0, 1))):
        assert (mask * other).mean().item() == pytest.approx(0.25**2, abs=0.01)


@pytest.mark.parametrize("norm", [False, True])
def test_eager_calls_equal_those_through_the_dispatcher(norm, monkeypatch):
    t, ids = make_inputs(20, 16, 24, 3, 1, dtype=torch.float32)
    direct, _ = run(t, ids, 3, norm=norm, gate=False)
    monkeypatch.setattr(backends, "_may_skip_dispatch", lambda _: False)
    dispatched, _ = run(t, ids, 3, norm=norm, gate=False)
    for name, value in direct.items():
        assert torch.equal(value, dispatched[name]), name


def test_a_dispatch_mode_sees_the_operators():
    """What counts, checkpoints or traces operators must not be passed by."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.name())
            return func(*args, **(kwargs or {}))

    t, ids = make_inputs(9, 6, 5, 3, 1, dtype=torch.float32)
    with Names() as names:
        ours(t, RoutingPlan.from_expert_ids(ids, 3), norm=True, gate=False)
    assert {"moebert_kernels::expert_ffn", "moebert_kernels::expert_norm"} <= names.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 2])
def test_opcheck_is_clean(K, dtype):
    t, ids = make_inputs(9, 6, 5, 3, K, dtype=dtype)
    plan = RoutingPlan.from_expert_ids(ids, 3)
    sort = (plan.order_S, plan.offsets_E1)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    weights = (t["w1"], t["b1"], t["w2"], t["b2"])
    library.opcheck(ops.expert_ffn, (t["x"], *sort, *weights, None, "gelu", K, True, True), test_utils=checks)
    z = torch.randn(9 * K, 6).to(dtype).requires_grad_()
    norm = (t["ln_w"], t["ln_b"], t["gate"], None, 1e-12, 0.0)
    library.opcheck(ops.expert_norm, (z, t["residual"], plan.expert_ids_TK, *sort, *norm), test_utils=checks)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 63, 64, 65, 100, 2047, 2048, 100_003])
def test_row_counts_are_bounded_and_little_more(rows):
    """Each new row count of a 16-bit GEMM makes oneDNN build code for it: 32 counts an octave are enough."""
    bounded = native.row_kernels().bounded_rows
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
