"""Launches without Triton's launcher: its private names, what tells forms apart, calls that are repeated.

No GPU is needed: in the place of a compiled kernel stands a function that gets what the compiled one would,
addresses and numbers, and runs the interpreter on them.
"""

import ctypes
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from cases import Case
from kernel_checks import call, inputs, leaves, outputs, plan_of, send_to
from torch.utils._python_dispatch import _disable_current_modes

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
pytest.importorskip("triton", reason="the kernels are written in Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from moebert_kernels import kernels  # noqa: E402
from moebert_kernels.kernels import (  # noqa: E402
    configs,
    direct,
    grouped,
    launch,
    norm,
    replay,
    rows,
    wgrad,
)
from moebert_kernels.kernels.configs import Config, Tile  # noqa: E402

TENSOR_MAP = object()


@pytest.fixture
def no_device(monkeypatch):
    """A driver that encodes descriptors as what it was given, and whose stream is 99."""
    made = []

    def fill(*arguments):
        made.append(arguments)
        return TENSOR_MAP

    fake = SimpleNamespace(
        utils=SimpleNamespace(fill_tma_descriptor=fill), get_current_stream=lambda device: 99 + device
    )
    before = driver._active
    driver.set_active(fake)
    monkeypatch.setattr(direct, "current_device", lambda: 0)
    yield made
    driver._active = before


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
    form = direct.direct_form(kernel, [False, False, False, True, True])
    form((5, 2, 1), [64, direct.Place(w.data_ptr(), w.shape) if described else 128, 3])
    of_triton = TensorDescriptor.from_tensor(w, [1, 64, 32]) if described else 128
    no_hooks = (None, None, None)
    kernel.run(5, 2, 1, 99, 7, (4, 1, 0), *no_hooks, 64, of_triton, 3, None, None)
    assert len(calls) == 2
    assert calls[0] == calls[1]
    if described:
        assert [*map(repr, no_device[0])] == [repr(v) for v in no_device[1]]


def test_descriptors_are_encoded_once_for_a_place(no_device):
    kernel, _ = compiled(True)
    form = direct.direct_form(kernel, [False, False, False, True, True])
    for address, shape in ((64, (4, 64, 96)), (64, (4, 64, 96)), (128, (4, 64, 96)), (64, (4, 64, 64))):
        form((1, 1, 1), [0, direct.Place(address, shape), 0])
    assert len(no_device) == 3


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
    assert direct.direct_form(kernel, [False, False, False, True, True]) is None


KERNELS = [
    value
    for module in (grouped, norm, rows, wgrad)
    for name, value in vars(module).items()
    if name.endswith("_kernel") and value.fn.__module__ == module.__name__
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_constants_come_last(kernel):
    """Where they do not, every launch goes through Triton's launcher."""
    constants = [p.is_constexpr for p in JITFunction(kernel.fn).params]
    assert constants == sorted(constants)


def test_what_triton_compiles_apart_is_kept_apart(no_device):
    """A form is for dtypes, alignment and divisibility: one started with others would read wrongly."""
    kernel = JITFunction(grouped.scatter_kernel.fn, do_not_specialize=["num_slots"])
    binder = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    names = [p.name for p in kernel.params]
    constants = {p.name: 1 for p in kernel.params if p.is_constexpr}
    aligned = torch.zeros(4, 32, 32, dtype=torch.bfloat16)
    tensors = [aligned, aligned.half(), aligned.flatten()[1:], aligned.flatten()[8:], None]
    described = [direct.Described(aligned, (1, 16, 16)), direct.Described(aligned, (1, 16, 32))]
    by_key = {}
    for a, w, gate, number in itertools.product(
        [*tensors[:-1], direct.Described(aligned[0], (16, 16))],
        [*tensors[:-1], *described],
        [*tensors, aligned.float()],
        [0, 1, 2, 16, 17, 2**31, 2**31 + 16],
    ):
        rest = dict.fromkeys(names, aligned) | {"a": a, "w": w, "gate_ptr": gate, "num_slots": number}
        arguments = rest | constants
        site = direct._Site(kernel, arguments)
        key, _ = direct._specialise(site.runtime(arguments), site.constants(arguments))
        _, specialization, _ = binder(**direct.for_triton(arguments))
        assert by_key.setdefault(key, specialization) == specialization
    assert len(by_key) > 100


def test_numbers_are_specialised_as_by_triton(no_device):
    kernel = JITFunction(grouped.gather_kernel.fn, do_not_specialize=["num_slots"])
    binder = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    x = torch.zeros(32)
    by_key = {}
    for stride in (0, 1, 2, 8, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**40):
        arguments = {p.name: 1 if p.is_constexpr else x for p in kernel.params}
        arguments |= {"x_stride": stride, "num_slots": 5}
        site = direct._Site(kernel, arguments)
        key, _ = direct._specialise(site.runtime(arguments), site.constants(arguments))
        assert by_key.setdefault(key, binder(**arguments)[1]) == binder(**arguments)[1]
    assert len(by_key) == 4  # 1, divisible by 16, neither, and wider than 31 bits


SQUARE = Tile(16, 16, 16, 4, 2)
PLAIN = Config(SQUARE, SQUARE, SQUARE, SQUARE, SQUARE)
STREAMED = dataclasses.replace(PLAIN, stream_k=True, tma=True)


def at(address, shape, dtype):
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=dtype).view(shape)


@pytest.fixture
def as_if_compiled(interpreter, monkeypatch, no_device):
    """Kernels count as compiled: from the second launch on a form gets addresses, as on a GPU."""
    starts = []

    def compile_and_start(kernel, grid, arguments):
        kernel[grid](**direct.for_triton(arguments))
        names = [p.name for p in kernel.params if not p.is_constexpr]
        constants = {name: value for name, value in arguments.items() if name not in names}
        kinds = {name: arguments[name] for name in names}

        def form(grid, values):
            starts.append(kernel.fn.__name__)
            given = {}
            for (name, kind), value in zip(kinds.items(), values, strict=True):
                if isinstance(kind, direct.Described):
                    tensor = at(value.address, tuple(value.shape), kind.tensor.dtype)
                    given[name] = TensorDescriptor.from_tensor(tensor, list(kind.block))
                else:
                    is_tensor = isinstance(kind, torch.Tensor) and value
                    given[name] = at(value, (1,), kind.dtype) if is_tensor else value
                    given[name] = None if kind is None else given[name]
            with _disable_current_modes():  # the interpreter computes in PyTorch; a GPU does not
                kernel[grid](**given, **constants)

        return form

    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "params", JITFunction(kernel.fn).params, raising=False)
    monkeypatch.setattr(launch, "JITFunction", object)
    monkeypatch.setattr(direct, "compile_and_start", compile_and_start)
    monkeypatch.setattr(direct, "_sites", {})
    monkeypatch.setattr(replay, "_kept", {})
    send_to(kernels, monkeypatch)
    return starts


WITH_NORM = Case(9, D=16, F=16, E=2, norm=True, gate=True)
REPEATED = {
    "norm": (WITH_NORM, PLAIN, True),
    "norm, streamed": (dataclasses.replace(WITH_NORM, K=2, routing="dropped"), STREAMED, True),
    "gate, streamed": (Case(7, D=16, F=24, E=2, K=2, gate=True), STREAMED, True),
    "inference": (WITH_NORM, PLAIN, False),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_calls_compute_what_the_first_did(name, as_if_compiled, monkeypatch):
    """Each with data and memory of its own: nothing may be left of the call that was noted."""
    case, config, training = REPEATED[name]
    monkeypatch.setattr(configs, "select", lambda *_: config)
    made = []
    again = replay._Pass.again
    monkeypatch.setattr(replay._Pass, "again", lambda *a: made.append(1) or again(*a))

    def compute(seed):
        t = inputs(case, torch.float32, "cpu", seed=seed)
        plan = plan_of(case, "cpu", seed=seed)
        if training:
            t = leaves(t)
            return outputs(call(case, t, plan), t)
        with torch.no_grad():
            return {"y": call(case, t, plan)}

    results = [compute(seed) for seed in (0, 1, 2, 0)]
    assert len(made) == (4 if training else 2)  # the first is seen, the second noted
    monkeypatch.setattr(launch, "JITFunction", JITFunction)
    monkeypatch.setattr(replay, "_kept", {})
    for seed, result in zip((0, 1, 2, 0), results, strict=True):
        for name, value in compute(seed).items():
            assert torch.equal(result[name], value), f"{name} of seed {seed}"


def test_what_else_a_pass_does_is_seen(as_if_compiled):
    """A sum in PyTorch between two launches would not be repeated."""
    x = torch.randn(8, 16)

    def with_a_sum(tensors, options, config):
        return (rows.over_experts(tensors[0] + 1, 2, torch.float32),)

    def without(tensors, options, config):
        return (rows.over_experts(tensors[0], 2, torch.float32),)

    for pass_, shift in ((with_a_sum, 1), (without, 0)):
        for _ in range(4):
            (y,) = replay.repeated(pass_, [x], (), PLAIN)
            torch.testing.assert_close(y, (x + shift).view(4, 2, 16).sum(1))
    kept = {key[0].__name__: value for key, (_, value) in replay._kept.items()}
    assert kept["with_a_sum"] is None
    assert isinstance(kept["without"], replay._Pass)


def test_other_values_of_options_are_other_passes(as_if_compiled, monkeypatch):
    """eps goes to the kernel as a number: noted, it would stay what it was."""
    monkeypatch.setattr(configs, "select", lambda *_: PLAIN)
    case = Case(9, norm=True)
    t, plan = inputs(case, torch.float32, "cpu"), plan_of(case, "cpu")
    with torch.no_grad():
        found = {eps: [call(case, t, plan, norm_eps=eps) for _ in range(4)] for eps in (1e-12, 10.0)}
    assert all(torch.equal(y, ys[0]) for ys in found.values() for y in ys)
    assert not torch.allclose(found[1e-12][3], found[10.0][3])


def test_arguments_that_share_memory_are_told_apart_later(as_if_compiled, monkeypatch):
    """Noted while the residual was x, a call with another residual would still add x."""
    monkeypatch.setattr(configs, "select", lambda *_: PLAIN)
    case = Case(9, norm=True)
    t, plan = inputs(case, torch.float32, "cpu"), plan_of(case, "cpu")
    with torch.no_grad():
        expected = call(case, t, plan)
        for _ in range(4):
            call(case, t | {"residual": t["x"]}, plan)
        assert torch.equal(call(case, t, plan), expected)
