"""Launches without Triton's launcher: its private names, calls that are repeated.

No GPU is needed: in the place of a compiled kernel stands a function that gets what the compiled one would,
addresses and numbers, and runs the interpreter on them.
"""

import ctypes
import dataclasses
import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.cases import Case
from tests.kernels.checks import assert_equal, call, inputs, leaves, outputs, plan_of, send_to, use_config

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
pytest.importorskip("triton", reason="the kernels are written in Triton")

from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from moebert_kernels.kernels import triton as kernels  # noqa: E402
from moebert_kernels.kernels.triton import direct, grouped, norm, replay, rows, wgrad  # noqa: E402
from moebert_kernels.ops import backends  # noqa: E402
from tests.kernels.tiles import PLAIN, STREAMED  # noqa: E402

TENSOR_MAP = object()


@pytest.fixture
def no_device(monkeypatch):
    """A driver in a GPU's place; what makes its tensor maps."""
    fill = Mock(return_value=TENSOR_MAP)
    fake = SimpleNamespace(utils=SimpleNamespace(fill_tma_descriptor=fill), get_current_stream=lambda _: 99)
    monkeypatch.setattr(driver, "_active", fake)
    return fill


def compiled(described):
    """A `CompiledKernel` of three run-time arguments and two constants, and what its C function was given."""
    calls = []
    how = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "block_size": [1, 64, 32], "fp4_padded": False}
    signature = {"x": "*bf16", "w": "tensordesc<bf16[1,64,32]>" if described else "*bf16", "n": "i32"}
    signature |= {"A": "constexpr", "B": "constexpr"}
    metas = [how] if described else []
    launcher = object.__new__(nvidia.CudaLauncher)
    launcher.launch = nvidia.wrap_handle_tensordesc(lambda *a: calls.append(a), signature, metas)
    launcher.num_ctas, launcher.launch_cooperative_grid, launcher.launch_pdl = 1, False, True
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    metadata = SimpleNamespace(tensordesc_meta=metas)
    return SimpleNamespace(run=launcher, function=7, packed_metadata=(4, 1, 0), metadata=metadata), calls


@pytest.mark.parametrize("described", [False, True])
def test_the_c_function_gets_what_triton_would_give_it(described, no_device):
    """Holds the private names of Triton, too: with another Triton this fails before a kernel does."""
    kernel, calls = compiled(described)
    w = torch.zeros(4, 64, 96, dtype=torch.bfloat16)
    of_triton = TensorDescriptor.from_tensor(w, [1, 64, 32]) if described else 128
    kernel.run(5, 2, 1, 99, 7, (4, 1, 0), None, None, None, 64, of_triton, 3, None, None)
    entry = direct.entry_of(kernel)
    of_w = [128]
    if described:
        shape, strides = of_triton.shape, of_triton.strides
        of_w = [direct.tensor_map(shape, strides, entry.hows[0], w.data_ptr()), *shape, *strides]
    entry.function(5, 2, 1, direct.current_stream(0), *entry.fixed, 64, *of_w, 3, None, None)
    assert len(calls) == 2
    assert calls[0] == calls[1]
    if described:
        by_triton, by_us = no_device.call_args_list
        assert repr(by_triton) == repr(by_us)


@pytest.mark.parametrize(
    "change",
    [
        lambda kernel: setattr(kernel.run, "global_scratch_size", 16),
        lambda kernel: setattr(kernel, "run", lambda *_: None),
        lambda kernel: setattr(kernel.metadata, "tensordesc_meta", [None]),
    ],
    ids=["scratch", "another launcher", "descriptors in software"],
)
def test_what_is_not_known_is_left_to_triton(change, no_device):
    kernel, _ = compiled(True)
    change(kernel)
    assert direct.entry_of(kernel) is None


KERNELS = [
    value
    for module in (grouped, norm, rows, wgrad)
    for name, value in vars(module).items()
    if name.endswith("_kernel") and value.fn.__module__ == module.__name__
]


def at(address, shape, dtype):
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).view(shape)


class Watched(TorchFunctionMode):
    """Sends calls through the operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Compiled:
    """In the place of what Triton compiles: functions that take addresses, and what they did.

    Attributes:
        entries: kernels compiled.
        starts: kernels started by address.
        encoded: addresses of which a tensor map was made.
    """

    def __init__(self):
        self.entries, self.starts, self.encoded = [], [], []

    def tensor_map(self, shape, strides, how, address):
        self.encoded.append(address)
        return address

    def entry(self, kernel, grid, arguments):
        self.entries.append(kernel.fn.__name__)
        fixed = ("function", "flags")
        constants, dtypes, described = {}, {}, {}
        for name, value in arguments.items():
            if isinstance(value, TensorDescriptor):
                described[name] = ([*value.shape], [*value.strides], value.block_shape, value.base.dtype)
            elif isinstance(value, torch.Tensor):
                dtypes[name] = value.dtype
            else:
                constants[name] = value

        def function(*values):
            self.starts.append(kernel.fn.__name__)
            assert values[3:6] == (99, *fixed)
            left, given = iter(values[6:]), {}
            for parameter in kernel.params:
                name, value = parameter.name, next(left)
                if name in described:
                    shape, strides, block, dtype = described[name]
                    assert [next(left) for _ in (*shape, *strides)] == [*shape, *strides]
                    given[name] = TensorDescriptor(at(value, shape, dtype), shape, strides, block)
                elif name in dtypes:
                    given[name] = at(value, (1,), dtypes[name])
                elif not parameter.is_constexpr:
                    assert value == constants[name]
            assert next(left, None) is None
            kernel[values[:3]](**given, **constants)

        return direct.Entry(function, fixed, [{}] * 2)


@pytest.fixture
def as_if_compiled(interpreter, monkeypatch):
    """Kernels count as compiled: they are started with addresses, as on a GPU."""
    standing_in = Compiled()
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "params", JITFunction(kernel.fn).params, raising=False)
    monkeypatch.setattr(replay, "_INTERPRETED", False)
    monkeypatch.setattr(direct, "entry", standing_in.entry)
    monkeypatch.setattr(direct, "tensor_map", standing_in.tensor_map)
    monkeypatch.setattr(direct, "current_stream", lambda _: 99)
    send_to(kernels, monkeypatch)
    return standing_in


WITH_NORM = Case(9, D=16, F=16, E=2, norm=True, gate=True)
REPEATED = {
    "norm": (WITH_NORM, PLAIN, True),
    "norm, streamed": (dataclasses.replace(WITH_NORM, K=2, routing="dropped"), STREAMED, True),
    "gate, streamed": (Case(7, D=16, F=24, E=2, K=2, gate=True), STREAMED, True),
    "inference": (WITH_NORM, PLAIN, False),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_calls_compute_what_passes_as_written_do(name, as_if_compiled, monkeypatch):
    """Each with data and memory of its own: nothing may be left of the call that was recorded."""
    case, config, training = REPEATED[name]
    use_config(config, monkeypatch)

    def compute(seed):
        t = inputs(case, torch.float32, "cpu", seed=seed)
        plan = plan_of(case, "cpu", seed=seed)
        if training:
            t = leaves(t)
            return outputs(call(case, t, plan), t)
        with torch.no_grad():
            return {"y": call(case, t, plan)}

    results = [(seed, compute(seed)) for seed in (0, 1, 0)]
    assert len(as_if_compiled.starts) == 2 * len(as_if_compiled.entries) > 0
    monkeypatch.setattr(replay, "_INTERPRETED", True)
    expected = [compute(seed) for seed in (0, 1)]
    for seed, result in results:
        assert_equal(result, expected[seed])


def test_tensor_maps_are_made_once_for_an_address(as_if_compiled, monkeypatch):
    """Making one takes longer than starting a kernel; one of another address reads what lies there."""
    use_config(STREAMED, monkeypatch)
    monkeypatch.setattr(replay, "_MOST_PLACES", 2)
    case = Case(9, D=16, F=16, E=2)
    layers = [inputs(case, torch.float32, "cpu", seed=seed) for seed in range(3)]
    plan = plan_of(case, "cpu")
    with torch.no_grad():
        expected = [call(case, t, plan) for t in layers]
        assert torch.equal(call(case, layers[2], plan), expected[2])
        made = len(as_if_compiled.encoded)
        assert torch.equal(call(case, layers[2], plan), expected[2])
        assert layers[2]["w2"].data_ptr() in as_if_compiled.encoded[:made]
        assert layers[2]["w2"].data_ptr() not in as_if_compiled.encoded[made:]
        for t, y in zip(layers, expected, strict=True):
            assert torch.equal(call(case, t, plan), y)


@pytest.mark.parametrize("form", ["strided", "unaligned"])
def test_arguments_of_another_layout_are_copied(form, as_if_compiled, monkeypatch):
    """A kernel is compiled for aligned rows, one after the other."""
    use_config(PLAIN, monkeypatch)
    case = Case(9, norm=True, gate=True)
    t, plan = inputs(case, torch.float32, "cpu"), plan_of(case, "cpu")

    def moved(tensor):
        wider = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
        flat = torch.zeros(tensor.numel() + 1)
        other = wider[..., 1:] if form == "strided" else flat[1:].view(tensor.shape)
        return other.copy_(tensor)

    with torch.no_grad():
        expected = call(case, t, plan)
        for _ in range(2):
            assert_equal(call(case, {name: moved(tensor) for name, tensor in t.items()}, plan), expected)
    assert as_if_compiled.starts


@pytest.mark.parametrize("order", [(nullcontext, Watched), (Watched, nullcontext)], ids=["direct", "watched"])
def test_direct_calls_and_the_operator_have_plans_in_common(order, as_if_compiled, monkeypatch):
    """The operator returns a 0-element tensor for what it does not keep, a direct call nothing."""
    use_config(STREAMED, monkeypatch)
    case = Case(9, D=16, F=16, E=2)  # with norm the operator keeps what suits the CPU's backends
    t, plan = leaves(inputs(case, torch.float32, "cpu")), plan_of(case, "cpu")
    expected = outputs(call(case, t, plan), t)
    backends._forms.clear()
    for watched in order:
        for _ in range(2):
            with watched():
                found = outputs(call(case, t, plan), t)
            assert_equal(found, expected)
    assert as_if_compiled.starts


def test_a_plan_keeps_no_memory(as_if_compiled, monkeypatch):
    """Recorded on a call's own tensors, it would keep alive what that call was given."""
    use_config(STREAMED, monkeypatch)
    case = Case(9, D=16, F=16, E=2, norm=True)
    t, plan = inputs(case, torch.float32, "cpu"), plan_of(case, "cpu")
    kept = [weakref.ref(v.untyped_storage()) for v in t.values()]
    for _ in range(2):
        call(case, leaves(t), plan)
        with torch.no_grad():
            call(case, t, plan)
    plans = [plan for form in backends._forms.values() for plan in form.kept.values()]
    tensors = [tensor for plan in plans for tensor in plan.forms if tensor is not None]
    assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {0}
    del t
    gc.collect()
    assert [storage() for storage in kept] == [None] * len(kept)


def sums(tensors, options):
    """A pass of one kernel."""
    return (rows.over_experts(tensors[0], 2, torch.float32),)


def check_sums(plans):
    x = torch.randn(8, 16)
    for _ in range(3):
        (y,) = replay.repeated(sums, [x], (), plans)
        torch.testing.assert_close(y, x.view(4, 2, 16).sum(1))


def test_a_pass_that_computes_outside_of_its_kernels_is_refused(as_if_compiled):
    """A sum in PyTorch between two launches would not be repeated."""

    def with_a_sum(tensors, options):
        return sums([tensors[0] + 1], options)

    x, plans = torch.randn(8, 16), {}
    check_sums(plans)
    replay.repeated(with_a_sum, [x], (), plans)
    with pytest.raises(AssertionError, match="aten::add"):
        replay.repeated(with_a_sum, [x], (), plans)


def test_what_only_triton_can_start_is_run_as_written(as_if_compiled, monkeypatch):
    monkeypatch.setattr(direct, "entry", lambda *_: None)
    check_sums({})
    assert not as_if_compiled.starts


def test_other_values_of_options_are_other_passes(as_if_compiled, monkeypatch):
    """eps goes to the kernel as a number: noted, it would stay what it was."""
    use_config(PLAIN, monkeypatch)
    case = Case(9, norm=True)
    t, plan = inputs(case, torch.float32, "cpu"), plan_of(case, "cpu")
    with torch.no_grad():
        found = {eps: [call(case, t, plan, norm_eps=eps) for _ in range(4)] for eps in (1e-12, 10.0)}
    assert all(torch.equal(y, ys[0]) for ys in found.values() for y in ys)
    assert not torch.allclose(found[1e-12][3], found[10.0][3])


def test_arguments_that_share_memory_are_told_apart_later(as_if_compiled, monkeypatch):
    """Noted while the residual was x, a call with another residual would still add x."""
    use_config(PLAIN, monkeypatch)
    case = Case(9, norm=True)
    t, plan = inputs(case, torch.float32, "cpu"), plan_of(case, "cpu")
    with torch.no_grad():
        expected = call(case, t, plan)
        for _ in range(4):
            call(case, t | {"residual": t["x"]}, plan)
        assert torch.equal(call(case, t, plan), expected)
