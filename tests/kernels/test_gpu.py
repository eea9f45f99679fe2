"""What only a device can show: `pytest -m gpu`. Skipped, with the reason, where there is none."""

import dataclasses
import gc
import itertools
import weakref

import pytest
import torch
from torch import library

from moebert_kernels import MoEFFN, RoutingPlan, moe_ffn
from moebert_kernels.ops import backends, operator
from tests.cases import CASES, Case, bert_base, expert_ids
from tests.kernels.checks import (
    FEW_NEIGHBOURS,
    FORMS,
    arguments,
    assert_equal,
    call,
    check,
    experts_of,
    inputs,
    leaves,
    outputs,
    plan_of,
    run,
    slack_of_long_sums,
    use_config,
)

pytestmark = pytest.mark.gpu
pytest.importorskip("triton", reason="the kernels are written in Triton")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# TF32 keeps 10 bits of each factor. The hardware may cut the others off, which makes every factor too small
# by 2^-11 in the mean and every product by 2^-10, where plain torch may round. The largest element is 8 rms.
TF32_SLACK = (2.0**-10, 8 * 2.0**-10)
PLAN_FIELDS = [field.name for field in dataclasses.fields(RoutingPlan)]


@pytest.fixture(autouse=True)
def kernels_and_ieee():
    """A fallback to PyTorch would pass most of these tests: it may not happen. Nor may stray TF32, which
    pytest's monkeypatch cannot switch off again: the switch is no attribute that the module's object has."""
    from moebert_kernels.kernels import triton as kernels

    assert backends.on_cuda(torch.empty(0, device="cuda")) is kernels
    assert not torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def table_entries():
    """Every config the table has for this device, by its key; none to choose from without one."""
    if not torch.cuda.is_available():
        return [pytest.param("", "", marks=pytest.mark.gpu, id="no device")]
    from moebert_kernels.kernels.triton import configs

    mine = configs.family(torch.device("cuda", torch.cuda.current_device()))
    return [(arithmetic, size) for family, arithmetic, size in configs.TABLE if family == mine] or [("", "")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, dtype, poisoned_memory):
    check(case, DTYPES[dtype], "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ["dropped", "skewed", "middle empty"])
@pytest.mark.parametrize("norm", [False, True])
def test_bert_base_sizes(dtype, routing, norm, poisoned_memory):
    case, dtype = bert_base(1025, routing, gate=True, norm=norm), DTYPES[dtype]
    check(case, dtype, "cuda", neighbours=FEW_NEIGHBOURS, slack=slack_of_long_sums(case, dtype))


@pytest.mark.parametrize(("arithmetic", "size"), table_entries())
def test_committed_config(arithmetic, size, poisoned_memory, monkeypatch):
    """Each config of this device's family, at sizes that are no multiple of any tile, and skewed."""
    from moebert_kernels.kernels.triton import configs

    family = configs.family(torch.device("cuda", torch.cuda.current_device()))
    use_config(configs.TABLE.get((family, arithmetic, size), configs.SAFE), monkeypatch)
    torch.backends.cuda.matmul.allow_tf32 = arithmetic == "tf32"
    wide = Case(517, D=200, F=328, K=2, routing="dropped", gate=True)
    skewed = Case(700, D=264, F=136, routing="skewed")
    dtypes = (torch.float16, torch.bfloat16) if arithmetic == "half" else (torch.float32,)
    for dtype, case in itertools.product(dtypes, (wide, skewed)):
        slack = TF32_SLACK if arithmetic == "tf32" else slack_of_long_sums(case, dtype)
        check(case, dtype, "cuda", neighbours=FEW_NEIGHBOURS, slack=slack)


def test_float64_takes_the_pytorch_path():
    case = Case(9, gate=True)
    t = {k: v.double() for k, v in inputs(case, torch.float32, "cuda").items()}
    assert run(case, t)["y"].dtype == torch.float64


@pytest.mark.parametrize("T", [512, 4096, 16384])
def test_twenty_runs_are_bitwise_equal(T):
    """With other routings in between, so that no leftover of a workspace can go unnoticed."""
    case = bert_base(T, "skewed", gate=True)
    others = [bert_base(T, r, gate=True) for r in ("first empty", "one", "dropped")]
    t = inputs(case, torch.bfloat16, "cuda")
    first = run(case, t)
    for i in range(20):
        run(others[i % 3], t)
        assert_equal(run(case, t), first)


@pytest.mark.parametrize(
    "case", [bert_base(16, norm=True), bert_base(700, "dropped", gate=True, K=2)], ids=str
)
def test_nothing_waits_for_the_device(case):
    """No host synchronisation in plan, forward and backward."""
    t = inputs(case, torch.bfloat16, "cuda")
    ids_TK = expert_ids(case).cuda()

    def step():
        u = leaves(t)
        y = call(case, u, RoutingPlan.from_expert_ids(ids_TK, case.E), dropout_p=0.1 if case.norm else 0.0)
        outputs(y, u)
        with torch.no_grad():
            call(case, u, RoutingPlan.from_expert_ids(ids_TK, case.E))

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("T", [16, 700, 16384])
@pytest.mark.parametrize("norm", [False, True])
def test_graph_replays_with_other_routing_in_the_same_buffers(T, norm):
    """Grids and workspaces may depend on shapes alone: a captured graph never sees the counts."""
    case = bert_base(T, gate=True, norm=norm)
    t = leaves(inputs(case, torch.bfloat16, "cuda"))
    plan = plan_of(case, "cuda")

    def step():
        with torch.no_grad():
            inference = call(case, t, plan)
        return outputs(call(case, t, plan), t) | {"inference": inference}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for routing in ("skewed", "one", "nobody", "last empty", "dropped"):
        other = plan_of(dataclasses.replace(case, routing=routing), "cuda")
        for field in PLAN_FIELDS:
            getattr(plan, field).copy_(getattr(other, field))
        graph.replay()
        replayed = {name: value.clone() for name, value in captured.items()}
        assert_equal(replayed, step())


def test_a_graph_draws_a_new_dropout_mask_on_every_replay():
    case = bert_base(64, norm=True)
    t, plan = inputs(case, torch.bfloat16, "cuda"), plan_of(case, "cuda")
    with torch.no_grad():
        call(case, t, plan, dropout_p=0.3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(case, t, plan, dropout_p=0.3)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_compiles_whole_and_once_for_all_token_counts():
    case = Case(8, D=64, F=96, norm=True)
    t = leaves(inputs(case, torch.bfloat16, "cuda"))
    weights = [*experts_of(t), t["ln_w"], t["ln_b"]]
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def layer(x, ids):
        plan = RoutingPlan.from_expert_ids(ids, case.E)
        return moe_ffn(x, plan, *weights[:4], norm=(t["ln_w"], t["ln_b"]))

    torch._dynamo.reset()
    counted = torch.compile(layer, fullgraph=True, backend=count)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T in (5, 9, 33, 64, 1000):
        x = torch.randn(T, case.D, device="cuda", dtype=torch.bfloat16)
        ids = torch.randint(-1, case.E, (T,), device="cuda")
        expected, y = layer(x, ids), compiled(x, ids)
        torch.testing.assert_close([counted(x, ids), y], [expected, expected])
        grads = [torch.autograd.grad(of.float().sum(), weights) for of in (y, expected)]
        torch.testing.assert_close(*grads)
    assert len(graphs) <= 2


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_is_clean(form):
    case = Case(9, K=2, gate=True, norm=True)
    t = leaves(inputs(case, torch.float32, "cuda"))
    library.opcheck(operator.ffn, (*arguments(t, plan_of(case, "cuda"), **form), True))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("T", [16, 700])
def test_repeated_calls_compute_what_passes_as_written_do(T, norm, poisoned_memory, monkeypatch):
    """Launches are repeated with other addresses alone."""
    from moebert_kernels.kernels.triton import replay

    case = bert_base(T, gate=True, norm=norm)
    draws = [inputs(case, torch.bfloat16, "cuda", seed=seed) for seed in range(3)]
    with monkeypatch.context() as as_written:
        as_written.setattr(replay, "_MOST_TOKENS", 0)
        first = [run(case, t) for t in draws]
    for _ in range(2):
        for t, expected in zip(draws, first, strict=True):
            assert_equal(run(case, {k: v.clone() for k, v in t.items()}), expected)
    with torch.no_grad():
        first, *others = (call(case, draws[0], plan_of(case, "cuda")) for _ in range(4))
    assert_equal(others, [first] * 3)


def test_kernels_are_started_directly():
    """Stops the tests above from passing because Triton's own launcher did it all."""
    backends._forms.clear()
    case = bert_base(512, gate=True, norm=True)
    for _ in range(2):
        run(case, inputs(case, torch.bfloat16, "cuda"))
    plans = [plan for form in backends._forms.values() for plan in form.kept.values()]
    assert len(plans) == 2
    assert all(plan.whole for plan in plans)


def test_autocast_equals_explicit_casts():
    torch.manual_seed(0)
    layer = MoEFFN(64, 96, 4, norm_eps=1e-12, device="cuda")
    x = torch.randn(50, 64, device="cuda")
    plan = RoutingPlan.from_expert_ids(torch.arange(50, device="cuda") % 4, 4)
    weights = (layer.w1_EFD, layer.bias1_EF, layer.w2_EDF, layer.bias2_ED)
    norm = (layer.layernorm_weight_ED, layer.layernorm_bias_ED)
    half = [weight.detach().bfloat16() for weight in weights]
    expected = moe_ffn(x.bfloat16(), plan, *half, norm=norm, residual_TD=x)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x, routing=plan)
        assert y.dtype == torch.float32
        assert torch.equal(y, expected)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_a_timed_graph_keeps_what_it_reads():
    """Benchmarks' graphs read plans that were freed once they were captured: an illegal access, or luck."""
    from bench.timing import make_timer

    class Call:
        def __init__(self):
            self.x = torch.ones(8, device="cuda")

        def __call__(self):
            return {"y": self.x + 1}

    one = Call()
    kept = weakref.ref(one)
    timer = make_timer(torch.device("cuda"), "graph", [one])
    del one
    gc.collect()
    assert kept() is not None
    assert timer() > 0


def test_any_stream_will_do():
    case = bert_base(2048, gate=True)
    t = inputs(case, torch.bfloat16, "cuda")
    expected = run(case, t)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # the default stream would be done before this one starts
        late = {k: v + 0 for k, v in t.items()}
        result = run(case, late)
    side.synchronize()
    assert_equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_a_device_that_is_not_the_current_one():
    case = Case(33, gate=True, norm=True)
    on_each = (run(case, inputs(case, torch.float32, device)) for device in ("cuda:0", "cuda:1"))
    assert_equal(*({name: value.cpu() for name, value in of_one.items()} for of_one in on_each))


@pytest.mark.slow
def test_elements_past_two_to_the_31():
    """2.9 million tokens of 768: the last rows lie beyond 32-bit offsets, in forward and in backward."""
    T, D, tail = 2_900_000, 768, 257
    assert (T - tail) * D > 2**31
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    case = Case(T, D=D, F=D, E=2)
    small = inputs(dataclasses.replace(case, T=tail), torch.bfloat16, "cuda")
    weights = {k: v.requires_grad_() for k, v in small.items() if k[0] in "wb"}
    x_TD = torch.zeros(T, D, device="cuda", dtype=torch.bfloat16)
    x_TD[-tail:] = small["x"]
    dy_TD = torch.zeros_like(x_TD)
    dy_TD[-tail:] = small["dy"]
    ids_T = torch.arange(T, device="cuda") % 2
    parts = {}
    for name, x, dy, ids in (("whole", x_TD, dy_TD, ids_T), ("tail", small["x"], small["dy"], ids_T[-tail:])):
        t = weights | {"x": x.requires_grad_(), "dy": dy}
        parts[name] = outputs(call(case, t, RoutingPlan.from_expert_ids(ids, 2)), t)
    for name, value in parts["tail"].items():
        whole = parts["whole"][name]
        got = whole[-tail:] if name in ("y", "dx") else whole
        scale = value.float().square().mean().sqrt()
        worst = (got.float() - value.float()).abs().max() / scale
        # Sums in another order may round to the other side: bfloat16's spacing at 4 times the rms.
        assert worst <= 4 * 2.0**-7, f"{name}: {worst:.3g}"
