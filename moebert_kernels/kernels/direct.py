"""Starting a kernel that Triton has compiled, without Triton's own launcher.

That binds, specialises and hashes the arguments anew at every launch, in Python, and encodes every
descriptor: it takes longer than a small kernel runs. Here Triton starts a kernel once for each form it
compiles; after that the C function it made for the form is called, whenever dtypes, alignments and constants
are the same.

Private names of Triton 3.6, of which `test_kernels_direct.py` says whether they are as they were, and without
which Triton starts every kernel: `_BASE_ARGS_FORMAT`, `make_tensordesc_arg` and, in the closure of
`wrap_handle_tensordesc`, `launcher` of `backends.nvidia.driver`; `launch`, the two flags and the two scratch
sizes of its `CudaLauncher`; `run`, `function`, `packed_metadata` and `metadata` of `CompiledKernel`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from operator import itemgetter, mul
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

# Starts one compiled form of a kernel: a grid of three axes, run-time arguments with addresses for tensors.
Form = Callable[[tuple[int, ...], Sequence[Any]], None]

current_device = torch.cuda.current_device


class Described(NamedTuple):
    """A contiguous tensor that a kernel reads through a TMA descriptor, in tiles of `block`."""

    tensor: Tensor
    block: tuple[int, ...]


class Place(NamedTuple):
    """All that a descriptor of such a tensor holds, for a compiled kernel: the tensor itself is not kept."""

    address: int
    shape: tuple[int, ...]

    def argument(self, how: dict[str, Any]) -> list[Any]:
        """As the C function takes it."""
        strides = tuple(accumulate(reversed(self.shape[1:]), mul, initial=1))[::-1]
        base = SimpleNamespace(data_ptr=lambda: self.address)
        made = SimpleNamespace(base=base, shape=self.shape, strides=strides, padding="zero")
        return nvidia.make_tensordesc_arg(made, how)


Started = tuple[Form | None, tuple[int, ...], tuple[Any, ...]]  # form, grid and run-time arguments


class _Tape(threading.local):
    """What this thread starts, where somebody wants to know."""

    started: list[Started] | None = None


_tape = _Tape()


@contextmanager
def taped() -> Iterator[list[Started]]:
    """The list of what this thread starts meanwhile."""
    started: list[Started] = []
    _tape.started = started
    try:
        yield started
    finally:
        _tape.started = None


def for_triton(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as Triton's own launcher takes them."""
    return {
        name: TensorDescriptor.from_tensor(a.tensor, list(a.block)) if isinstance(a, Described) else a
        for name, a in arguments.items()
    }


def hooked() -> bool:
    """Whether somebody, such as a profiler, wants Triton to tell of every launch."""
    hook: Any = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def start(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Start a kernel on the current device and stream. Its hooks, and changed globals, are not looked at."""
    site = id(kernel), len(arguments)
    if site not in _sites:
        _sites[site] = _Site(kernel, arguments)
    known = _sites[site]
    runtime = known.runtime(arguments)
    key, values = _specialise(runtime, known.constants(arguments))
    form = known.forms.get(key)
    if _tape.started is not None:
        _tape.started.append((form, grid, runtime))
    if form is None and key not in known.forms:
        known.forms[key] = compile_and_start(kernel, grid, arguments)
    elif form is None or hooked():
        kernel[grid](**for_triton(arguments))
    else:
        form((*grid, 1, 1)[:3], values)


class _Site:
    """A kernel called with the same names each time; None for a form that only Triton can start."""

    def __init__(self, kernel: JITFunction, arguments: dict[str, Any]):
        runtime = [p.name for p in kernel.params if not p.is_constexpr]
        self.kernel = kernel  # kept, and so is its id
        self.runtime = itemgetter(*runtime)
        self.constants = itemgetter(*(name for name in arguments if name not in runtime))
        self.forms: dict[tuple[Any, ...], Form | None] = {}


_sites: dict[tuple[int, int], _Site] = {}


def _specialise(runtime: tuple[Any, ...], constants: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Any]]:
    """What a form is compiled for, at least as finely as Triton has it, and the values to start it with."""
    key: list[Any] = [current_device(), constants]
    values: list[Any] = []
    for value in runtime:
        if isinstance(value, Tensor):
            address = value.data_ptr()
            key.append(value.dtype if address % 16 == 0 else (value.dtype, "unaligned"))
            values.append(address)
        elif isinstance(value, Described):
            key.append((value.tensor.dtype, value.block))
            values.append(Place(value.tensor.data_ptr(), value.tensor.shape))
        else:
            is_int = isinstance(value, int)
            key.append((value == 1, value % 16 == 0, value.bit_length() > 31) if is_int else type(value))
            values.append(value)
    return tuple(key), values


def compile_and_start(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any]) -> Form | None:
    """Let Triton do both; how to start the kernel from then on, or None."""
    return direct_form(kernel[grid](**for_triton(arguments)), [p.is_constexpr for p in kernel.params])


def direct_form(compiled: Any, constexpr: list[bool]) -> Form | None:
    """Start a compiled kernel by its C function; None if it is not one that is known here."""
    launcher = compiled.run
    descriptors = getattr(compiled.metadata, "tensordesc_meta", None) or []
    if (
        type(launcher) is not nvidia.CudaLauncher
        # grid, stream, function, two flags, six objects; then the kernel's own
        or getattr(nvidia, "_BASE_ARGS_FORMAT", "") != "iiiKKppOOOOOO"
        or launcher.global_scratch_size
        or launcher.profile_scratch_size
        or constexpr != sorted(constexpr)
        or None in descriptors
    ):
        return None
    function = launcher.launch
    if descriptors:  # it encodes them before it calls the C function
        function = inspect.getclosurevars(function).nonlocals["launcher"]
    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    fixed = (compiled.function, *flags, None, None, compiled.packed_metadata, None, None, None)
    placeholders = (None,) * sum(constexpr)
    device, stream = current_device(), driver.active.get_current_stream
    maps: dict[tuple[int, Place], list[Any]] = {}

    def encoded(values: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        of_kernel = iter(descriptors)
        for value in values:
            if not isinstance(value, Place):
                found.append(value)
                continue
            how = next(of_kernel)
            if (id(how), value) not in maps:
                if len(maps) > 256:  # of activations, which come and go
                    maps.clear()
                maps[id(how), value] = value.argument(how)
            found += maps[id(how), value]
        return found

    def form(grid: tuple[int, ...], values: Sequence[Any]) -> None:
        values = encoded(values) if descriptors else values
        function(*grid, stream(device), *fixed, *values, *placeholders)

    return form
