"""Every case of the table through the Triton kernels, interpreted and on a GPU, against float64 python_ref.

bfloat16 is left to the GPU: the interpreter holds it as integers and multiplies those.
"""

import itertools
import math

import pytest
import torch

from tests.cases import CASES, SHARING, Case, expert_ids
from tests.kernels.checks import (
    call,
    check,
    errors,
    inputs,
    leaves,
    outputs,
    plain_errors,
    plan_of,
    recorded,
    reference,
    run,
    send_to,
    use_config,
)

# numpy on the NaN of poisoned memory, and on Triton's own index conversions
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
pytest.importorskip("triton", reason="the kernels are written in Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from moebert_kernels.kernels import triton as kernels  # noqa: E402
from moebert_kernels.kernels.triton.blocks import activate_with_slope  # noqa: E402
from tests.kernels.tiles import PLAIN, STREAMED  # noqa: E402


@pytest.fixture(autouse=True)
def through_the_kernels(device, monkeypatch, poisoned_memory):
    """CPU tensors go to the interpreted kernels, and tiles are small enough for small cases to have many."""
    send_to(kernels, monkeypatch)
    use_config(PLAIN, monkeypatch)


def test_the_kernels_are_what_runs(device):
    """Stops every test below from passing because another backend computed what it checks."""
    case = Case(5)
    t = leaves(inputs(case, torch.float32, device))
    plan = plan_of(case, device)
    with recorded() as launches:
        y_TD = call(case, t, plan)
        torch.autograd.grad(y_TD, [t["x"], t["w1"]], t["dy"])
    assert [l.kernel.__name__ for l in launches][:2] == ["gather_kernel", "scatter_kernel"]
    assert len(launches) > 3


@pytest.mark.parametrize("case", [*CASES, *SHARING], ids=str)
def test_case_in_float32(case, device):
    check(case, torch.float32, device)


FLOAT16_CASES = [*(c for c in CASES if c.T in (18, 19, 23)), SHARING[2], SHARING[4]]


@pytest.mark.parametrize("case", FLOAT16_CASES, ids=str)
def test_case_in_float16(case, device):
    check(case, torch.float16, device)


# Every routing, widths that tiles overhang, slots and biases: what streaming adds does not know the rest.
STREAM_CASES = [
    *(c for c in CASES if c.T in (1, 11, 17, 18, 21, 33) and c.K in (1, 4) and not c.norm),
    *(c for c in SHARING if c.T > 11),  # whose shared tiles, which go over all rows, are cut like the others
]


@pytest.mark.parametrize("case", STREAM_CASES, ids=str)
def test_case_streamed_with_descriptors(case, device, monkeypatch):
    """Five programs share the weight gradients of up to a dozen tiles, so that most tiles are cut."""
    use_config(STREAMED, monkeypatch)
    check(case, torch.float32, device)


@pytest.mark.parametrize(
    "case", [Case(23, E=2, norm=True, gate=True), Case(19, E=2, K=2, gate=True)], ids=str
)
def test_typical_errors_are_those_of_plain_torch(case, device):
    """The bound on one input allows for bad luck; over six inputs luck evens out and a lost bit shows."""
    logs: dict[str, list[float]] = {}
    for seed in range(6):
        t = inputs(case, torch.float32, device, seed=seed)
        exact, ids_TK = reference(case, t), expert_ids(case)
        plain = plain_errors(case, t, neighbours=1)
        for (name, e), (rms, _) in errors(run(case, t), exact, ids_TK, case.E).items():
            logs.setdefault(name, []).append(math.log(rms / plain[name, e][0]))
    for name, ratios in logs.items():
        ratio = math.exp(sum(ratios) / len(ratios))
        assert ratio <= 1.5, f"{name}: errors typically {ratio:.2f} times those of plain torch"


def test_strides_of_x_and_of_the_gradient_do_not_matter(device):
    """Columns of a wider matrix, a transposed one, and the stride-0 gradient that `sum` sends back."""
    case = Case(13, F=16, E=2, gate=True)
    t = inputs(case, torch.float32, device)
    wide_TD = torch.randn(case.T, 2 * case.D, device=device)
    wide_TD[:, : case.D] = t["x"]
    expected = run(case, t | {"dy": torch.ones(case.T, case.D, device=device)})
    for x in (wide_TD[:, : case.D], t["x"].T.contiguous().T):
        u = leaves(t)
        u["x"] = x.detach().requires_grad_()
        y = call(case, u, plan_of(case, device))
        names = [k for k in u if k != "dy"]
        grads = dict(zip(names, torch.autograd.grad(y.sum(), [u[k] for k in names]), strict=True))
        for name, grad in grads.items():
            assert torch.equal(grad, expected["d" + name]), name


def test_tensors_that_begin_anywhere_in_memory(device):
    """Slices of larger ones: they are copied to where wide loads can be, for which kernels are compiled."""
    case = Case(13, F=16, E=2, gate=True)
    t = inputs(case, torch.float32, device)
    shifted = {k: torch.cat([v.flatten()[:1], v.flatten()])[1:].view(v.shape) for k, v in t.items()}
    assert all(v.data_ptr() % 16 for v in shifted.values())
    u = {k: v.requires_grad_(k != "dy") for k, v in shifted.items()}  # themselves: a copy would be aligned
    found = outputs(call(case, u, plan_of(case, device)), u)
    for name, value in run(case, t).items():
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("sizes", [{"K": 2}, {"C": 16}], ids=str)
def test_any_subset_of_inputs_may_require_grad(sizes, device):
    """Skipping a gradient skips kernels and buffers: what is left must not notice.

    Shared weights' come out of the experts' kernels. One, and all but one: of any three, each choice is among
    these.
    """
    case = Case(5, E=2, D=8, F=8, gate=True, routing="dropped", **sizes)
    t = inputs(case, torch.float32, device)
    everything = run(case, t)
    plan = plan_of(case, device)
    names = [k for k in t if k != "dy"]
    for wanted in (c for n in (1, len(names) - 1) for c in itertools.combinations(names, n)):
        part = {k: v.clone().requires_grad_(k in wanted) for k, v in t.items()}
        grads = torch.autograd.grad(call(case, part, plan), [part[n] for n in wanted], t["dy"])
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, everything["d" + name]), f"{name} with {wanted}"


def test_backward_twice_gives_the_same(device):
    """A peer wrote into its saved tensors: its second backward was wrong."""
    case = Case(9, F=16, E=2, gate=True, norm=True)
    t = leaves(inputs(case, torch.float32, device))
    y = call(case, t, plan_of(case, device), dropout_p=0.2)
    names = [k for k in t if k != "dy"]
    first, second = (
        torch.autograd.grad(y, [t[k] for k in names], t["dy"], retain_graph=True) for _ in range(2)
    )
    for name, a, b in zip(names, first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(9), ["gather_kernel", "scatter_kernel"]),
        (Case(9, K=2, norm=True, gate=True), ["gather_kernel", "scatter_kernel", "norm_kernel"]),
        (Case(9, K=2, gate=True), ["gather_kernel", "scatter_kernel", "sum_slots_kernel"]),
    ],
    ids=str,
)
def test_forward_is_two_launches(case, expected, device):
    """And a third over rows: the LayerNorm, or the sum over a token's experts in a fixed order."""
    t = leaves(inputs(case, torch.float32, device))
    plan = plan_of(case, device)
    with recorded() as launches:
        call(case, t, plan)
    assert [l.kernel.__name__ for l in launches] == expected


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


def test_many_tokens_of_shared_neurons_are_streamed_without_being_asked(device):
    """Plain, a shared tile's program would take as long as all experts' together."""
    case = Case(300, C=16, F=16, routing="skewed")
    t = inputs(case, torch.float32, device)
    with recorded() as launches:
        run(case, t)
    assert "weight_grad_stream_kernel" in [l.kernel.__name__ for l in launches]
    for group, (_, largest) in errors(run(case, t), reference(case, t), expert_ids(case), case.E).items():
        assert largest < 1e-4, group


def test_training_keeps_the_input_the_activation_and_its_slope(device):
    """Of tensors with rows per token, no other is kept."""
    case = Case(37)
    t = leaves(inputs(case, torch.float32, device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v) or v, lambda v: v):
        call(case, t, plan_of(case, device))
    rows = [v for v in kept if v.is_floating_point() and v.shape[0] >= case.T]
    assert sorted(v.shape for v in rows) == sorted([(case.T, case.D), (2 * case.T, case.F)])
    assert any(v.data_ptr() == t["x"].data_ptr() for v in rows)


@pytest.mark.parametrize("C", [0, 24])
def test_inference_equals_training_bit_for_bit(C, device):
    case = Case(21, K=2, C=C, routing="dropped")
    t = inputs(case, torch.float32, device)
    plan = plan_of(case, device)
    trained = call(case, leaves(t), plan)
    with torch.no_grad():
        assert torch.equal(call(case, t, plan), trained)


def test_streamed_gradients_do_not_depend_on_what_ran_before(device, monkeypatch):
    """Shares and workspaces are reused between routings: nothing of the last one may show."""
    use_config(STREAMED, monkeypatch)
    case, other = Case(21, routing="skewed"), Case(21, routing="first empty")
    t, u = inputs(case, torch.float32, device), inputs(other, torch.float32, device, seed=1)
    first = run(case, t)
    run(other, u)
    for name, value in run(case, t).items():
        assert torch.equal(value, first[name]), name


def test_gates_of_any_floating_dtype(device):
    case = Case(9, F=16, E=2, gate=True)
    t = inputs(case, torch.float32, device)
    t["gate"] = t["gate"].bfloat16().float()  # values that every dtype holds
    expected = run(case, t)
    for dtype in (torch.float64, torch.bfloat16):
        result = run(case, t | {"gate": t["gate"].to(dtype)})
        assert result["dgate"].dtype == dtype
        assert torch.equal(result["y"], expected["y"]), dtype
        assert torch.equal(result["dx"], expected["dx"]), dtype


def test_an_experts_infinities_stay_with_its_tokens(device, monkeypatch):
    """Masking by multiplication would spread them: 0 * inf is NaN."""
    case = Case(9, E=3)
    t = inputs(case, torch.float32, device)
    t["w1"][1] = torch.inf
    t["b2"][1] = torch.inf
    ids_TK = expert_ids(case)
    plan = plan_of(case, device)
    for config in (PLAIN, STREAMED):
        use_config(config, monkeypatch)
        with torch.no_grad():
            finite_T = call(case, t, plan).isfinite().all(1)
        assert finite_T.cpu().equal(ids_TK[:, 0] != 1)


@triton.jit
def activate_kernel(h_ptr, a_ptr, slope_ptr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, slope = activate_with_slope(tl.load(h_ptr + at), "gelu", FAST)
    tl.store(a_ptr + at, a)
    tl.store(slope_ptr + at, slope)


def test_gelu_without_erf_is_right_to_half_a_unit_of_16_bits(device):
    """Where it exceeds 1e-7, in float16 and in bfloat16; and its slope is that of the function, far out too.

    The slope was NaN beyond 7,413: a polynomial that overflowed, times 0.
    """
    far = torch.tensor([10.0**n for n in range(2, 31)])
    h = torch.cat([torch.linspace(-12, 12, 2**16 - 2 * len(far)), far, -far]).to(device)
    found, slope = torch.empty_like(h), torch.empty_like(h)
    activate_kernel[(1,)](h, found, slope, True, 2**16)
    exact = h.double().requires_grad_()
    a = torch.nn.functional.gelu(exact)
    (exact_slope,) = torch.autograd.grad(a.sum(), exact)
    a = a.detach()
    off = (found.double() - a).abs()
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        unit = info.eps * 2.0 ** a.abs().clamp(min=info.tiny).log2().floor()
        assert (off <= 0.5 * unit)[a.abs() > 1e-7].all(), dtype
    assert off[a.abs() <= 1e-7].max() < 1e-9
    assert (slope.double() - exact_slope).abs().max() < 6e-5
