"""The CUDA plan builder on a device; its kernels' logic is tested without one in tests/native."""

from __future__ import annotations

import pytest
import torch

from moebert_kernels import native
from moebert_kernels.routing import native_plans
from tests.native.plan_checks import check_slots, check_tokens, random_slots, random_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native.status().cuda, reason=native.status().cuda_detail),
]

SIZES = [
    # (L, S, E): one launch
    (1, 0, 4),
    (1, 1, 1),
    (12, 7, 4),
    (2, 1023, 256),
    (12, 8192, 4),
    # two launches
    (1, 8193, 4),
    (12, 20_011, 255),
    (12, 65_536, 4),
    (3, 1_000_003, 16),
]


@pytest.fixture(autouse=True)
def no_host_sync():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def to_host(plans):
    torch.cuda.set_sync_debug_mode("default")
    return native_plans.PlanTensors(*(None if t is None else t.cpu() for t in plans))


def on_device(*tensors):
    return [t if t is None else t.pin_memory().to("cuda", non_blocking=True) for t in tensors]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("manner", ["even", "one"])
def test_plans_from_expert_ids_equal_a_stable_sort(size, dtype, manner):
    ids_LS = random_slots(size, dtype, seed=1, manner=manner)
    plans = native_plans.from_expert_ids(*on_device(ids_LS), size[2])
    check_slots(to_host(plans), ids_LS, size[2])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("masked", [False, True])
def test_plans_from_input_ids_equal_lookup_and_stable_sort(size, dtype, masked):
    case = random_tokens(size, dtype, seed=2, masked=masked)
    plans = native_plans.from_input_ids(*on_device(*case), size[2])
    check_tokens(to_host(plans), case, size[2])


@pytest.mark.parametrize("num_tokens", [500, 20_000])
def test_a_captured_plan_follows_its_inputs(num_tokens):
    """Replay must route anew: no count may be baked into the graph, whichever number of launches it holds."""
    size = (12, num_tokens, 4)
    buffers = on_device(*random_tokens(size, torch.int64, seed=3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plans = native_plans.from_input_ids(*buffers, 4)
    for seed in (4, 5):
        case = random_tokens(size, torch.int64, seed=seed)
        for buffer, value in zip(buffers, on_device(*case), strict=True):
            buffer.copy_(value)
        for tensor in plans:
            tensor.fill_(-7)
        graph.replay()
        check_tokens(to_host(plans), case, 4)


@pytest.mark.parametrize("num_tokens", [8192, 65_536])
def test_twenty_runs_on_another_stream_agree_bit_for_bit(num_tokens):
    case = on_device(*random_tokens((12, num_tokens, 4), torch.int64, seed=6))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = [native_plans.from_input_ids(*case, 4) for _ in range(20)]
    torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


@pytest.mark.slow
def test_indices_past_two_to_the_31_elements():
    """Three layers of 2^30 slots: an element's index no longer fits an int32, though a slot's does."""
    num_layers, num_slots = 3, 2**30
    torch.cuda.set_sync_debug_mode("default")
    if torch.cuda.mem_get_info()[0] < 70 * 2**30:
        pytest.skip("needs 70 GiB of free device memory")
    ids_LS = torch.arange(num_slots, device="cuda", dtype=torch.int32).remainder_(3).expand(num_layers, -1)
    plans = native_plans.from_expert_ids(ids_LS.contiguous(), 4)
    counts = [num_slots // 3 + (e < num_slots % 3) for e in range(3)]
    assert plans.counts_LE.tolist() == [[*counts, 0]] * num_layers
    last_S = plans.order_LS[-1]
    for expert, start in enumerate((0, counts[0], counts[0] + counts[1])):
        wanted = torch.arange(expert, num_slots, 3, device="cuda", dtype=torch.int32)
        assert torch.equal(last_S[start : start + counts[expert]], wanted)
