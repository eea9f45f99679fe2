"""The native plan builder against a plain stable sort; what happens where it is absent."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebert_kernels import native
from moebert_kernels.addresses import address
from moebert_kernels.routing import native_plans
from tests.native.plan_checks import (
    assert_same_plans,
    check_slots,
    check_tokens,
    random_slots,
    random_tokens,
    sorted_plans,
)

needs_extension = pytest.mark.skipif(not native.status().cpu, reason=native.status().cpu_detail)


@st.composite
def sizes(draw):
    """(L, S, E): small ones, primes, and those round the vector width and the lookup block."""
    num_slots = draw(
        st.sampled_from([0, 1, 7, 15, 16, 17, 997, 1023, 1024, 1025, 4099]) | st.integers(0, 300)
    )
    num_experts = draw(st.sampled_from([1, 2, 4, 16, 17, 255, 256]) | st.integers(1, 256))
    return draw(st.integers(1, 4)), num_slots, num_experts


cases = {
    "size": sizes(),
    "dtype": st.sampled_from([torch.int32, torch.int64]),
    "manner": st.sampled_from(["even", "skewed", "one"]),
    "outside": st.booleans(),
    "seed": st.integers(0, 2**31),
}


@needs_extension
@given(**cases)
def test_plans_from_expert_ids_equal_a_stable_sort(size, **how):
    ids_LS = random_slots(size, **how)
    check_slots(native_plans.from_expert_ids(ids_LS, size[2]), ids_LS, size[2])


@needs_extension
@given(**cases, vocab_size=st.sampled_from([1, 2, 50, 1000]), masked=st.booleans())
def test_plans_from_input_ids_equal_lookup_and_stable_sort(size, **how):
    case = random_tokens(size, **how)
    check_tokens(native_plans.from_input_ids(*case, size[2]), case, size[2])


@pytest.fixture
def restored_threads():
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@needs_extension
@pytest.mark.parametrize("size", [(1, 200_003, 4), (3, 70_001, 4), (2, 131_072, 200)])
def test_thread_count_does_not_change_a_plan(restored_threads, size):
    """From 65536 slots on the work is shared; one layer is then cut into chunks whose sums must join."""
    ids_LS = random_slots(size, torch.int64, seed=3)
    expected = sorted_plans(ids_LS, size[2])
    for num_threads in (1, 2, 3, 5):
        torch.set_num_threads(num_threads)
        assert_same_plans(native_plans.from_expert_ids(ids_LS, size[2]), expected)


@needs_extension
def test_strided_inputs_are_read_as_they_look():
    ids_LS = torch.arange(24, dtype=torch.int64).remainder(5).reshape(8, 3).t()
    check_slots(native_plans.from_expert_ids(ids_LS, 4), ids_LS, 4)

    ids_T = torch.tensor([3, 9, 1, 9, 0, 9, 2, 9])[::2]
    tables_LV = torch.tensor([[0, 1], [1, 0], [2, 2], [0, 3]], dtype=torch.int32).t()
    mask_T = torch.tensor([True, False, True, False, False, False, True, False])[::2]
    case = ids_T, tables_LV, mask_T
    check_tokens(native_plans.from_input_ids(*case, 4), case, 4)


@needs_extension
def test_ids_of_masked_tokens_are_not_looked_at():
    """Collators pad with -100 and the like: that is not an error, and not a reason to read out of bounds."""
    ids_T = torch.tensor([0, 1, -100, 2**40])
    tables_LV = torch.tensor([[1, 0]], dtype=torch.int32)
    mask_T = torch.tensor([True, True, False, False])
    plans = native_plans.from_input_ids(ids_T, tables_LV, mask_T, 2)
    assert plans.expert_ids_LS.tolist() == [[1, 0, -1, -1]]
    assert plans.num_invalid == 0


@needs_extension
def test_the_interpreter_runs_on_while_a_plan_is_built(restored_threads):
    """Releasing the GIL lets a training loop go on while a collating thread builds the next batch's plan."""
    torch.set_num_threads(1)
    ids_LS = torch.randint(4, (4, 1 << 21))

    def build():
        start = time.perf_counter()
        native_plans.from_expert_ids(ids_LS, 4)
        return start, time.perf_counter()

    for _attempt in range(5):
        with ThreadPoolExecutor() as pool:
            building, ticks = pool.submit(build), []
            while not building.done():
                ticks.append(time.perf_counter())
                time.sleep(0)
        start, end = building.result()
        fifth = (end - start) / 5
        if any(start + fifth < tick < end - fifth for tick in ticks):
            return
    pytest.fail("no Python ran during five native calls")


@needs_extension
def test_what_the_native_part_does_not_serve_is_left_to_pytorch():
    assert native_plans.from_expert_ids(torch.zeros(1, 4, dtype=torch.int16), 2) is None
    no_tables_LV = torch.zeros(0, 4, dtype=torch.int32)
    assert native_plans.from_input_ids(torch.zeros(3, dtype=torch.int64), no_tables_LV, None, 2) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids_T": torch.zeros(2, 2).long()}, ValueError, r"input_ids_T must have shape \[T\]"),
        ({"tables_LV": torch.zeros(4, dtype=torch.int32)}, ValueError, r"tables_LV must have shape \[L, V\]"),
        ({"tables_LV": torch.zeros(1, 4)}, TypeError, "tables_LV must be int32"),
        ({"mask_T": torch.ones(3)}, TypeError, "mask_T must be bool"),
        ({"mask_T": torch.ones(4, dtype=torch.bool)}, ValueError, "mask_T must have shape"),
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {
        "input_ids_T": torch.zeros(3, dtype=torch.int64),
        "tables_LV": torch.zeros(1, 4, dtype=torch.int32),
        "mask_T": None,
        "num_experts": 2,
    }
    with pytest.raises(error, match=message):
        native_plans.from_input_ids(**(arguments | change))


def test_expert_ids_must_have_a_row_per_layer():
    with pytest.raises(ValueError, match=r"expert_ids_LS must have shape \[L, S\]"):
        native_plans.from_expert_ids(torch.zeros(4, dtype=torch.int64), 2)


def test_every_address_is_checked():
    """Stops native code from reading through the pointer of a tensor that lies elsewhere."""
    whole = torch.zeros(4, 6)
    assert address(None) == 0
    assert address(whole) == whole.data_ptr()
    assert address(whole[2:]) == whole.data_ptr() + 12 * 4
    with pytest.raises(ValueError, match="a tensor on meta goes to native code that works on cpu"):
        address(torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=r"contiguous tensors: shape \(6, 4\), strides \(1, 6\)"):
        address(whole.t())
    whole.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"shape \(4, 6\) has no memory"):
        address(whole)
    assert address(torch.empty(0, 6)) == 0


@needs_extension
def test_a_failed_allocation_is_an_error():
    """Stops a buffer that cannot be had from aborting the process."""
    script = (
        "import array, moebert_kernels._native as kernels\n"
        "numbers = array.array('i', [0, 1, 0, 0])\n"
        "place = numbers.buffer_info()[0]\n"
        "rows = kernels.SortedRows(place, 1, place, False, 0)\n"
        "try:\n"
        "    kernels.gather_rows(rows, 0, 0, place, place, 2**45, 1, 1)\n"
        "except MemoryError:\n"
        "    print('told')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


@pytest.fixture
def extension_import(monkeypatch):
    """Lets a test decide how importing the extension ends."""

    def set_outcome(outcome):
        monkeypatch.setattr(importlib, "import_module", Mock(side_effect=repeat(outcome)))
        forget()

    def forget():
        native._load.cache_clear()
        native._warn_once.cache_clear()

    yield set_outcome
    forget()


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (ModuleNotFoundError("No module named 'moebert_kernels._native'"), "was never built"),
        (ImportError("undefined symbol: _ZN"), "does not load .ImportError: undefined symbol"),
        (SimpleNamespace(ABI_VERSION=-1), "has interface -1"),
    ],
)
def test_an_unusable_extension_is_one_warning_and_a_reason(extension_import, outcome, reason):
    """An install without a compiler, or with a stale build, must work: slower, and saying so once."""
    extension_import(outcome)
    ids_LS = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match=reason):
        assert native_plans.from_expert_ids(ids_LS, 2) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native_plans.from_expert_ids(ids_LS, 2) is None
        status = native.status()
    assert (status.cpu, status.cuda) == (False, False)
    assert status.cpu_detail == status.cuda_detail == status.rows_detail
    assert "_native" in status.cpu_detail


def test_an_install_says_why_its_extension_is_missing(extension_import, monkeypatch, tmp_path):
    """A failed build read like one that was never tried."""
    (tmp_path / native._RECORD).write_text("its build with g++ failed\n")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    extension_import(ModuleNotFoundError("No module named 'moebert_kernels._native'"))
    assert native.status().cpu_detail.endswith("was not built at install: its build with g++ failed")


@needs_extension
def test_the_instruction_set_of_the_row_kernels_is_told():
    assert native.status().rows_detail in native._INSTRUCTION_SETS.values()
