"""How to start a kernel that Triton has compiled without Triton's launcher.

That binds, specialises and hashes the arguments anew at every launch, in Python, and encodes every
descriptor: it takes longer than a small kernel runs. The C function that it calls in the end is Triton's own.

Private names of Triton 3.6, of which `tests/kernels/test_direct.py` says whether they are as they were, and
without which Triton starts every kernel: `_BASE_ARGS_FORMAT`, `make_tensordesc_arg` and, in the closure of
`wrap_handle_tensordesc`, `launcher` of `backends.nvidia.driver`; `launch`, the two flags and the two scratch
sizes of its `CudaLauncher`; `run`, `function`, `packed_metadata` and `metadata` of `CompiledKernel`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import JITFunction, driver


class Entry(NamedTuple):
    """A compiled kernel's C function.

    It takes the three sides of the grid, the stream, `fixed`, and an argument for each parameter: for a
    tensor its address, for a descriptor its `tensor_map`, shape and strides, for a constant anything.

    Attributes:
        hows: how the tensor map of each descriptor is made.
    """

    function: Callable[..., None]
    fixed: tuple[Any, ...]
    hows: list[dict[str, Any]]


def entry(kernel: JITFunction, grid: tuple[int, ...], arguments: dict[str, Any]) -> Entry | None:
    """Compile a kernel for these arguments and the current device; None where only Triton can start it."""
    return entry_of(kernel.warmup(grid=grid, **arguments))


def entry_of(compiled: Any) -> Entry | None:
    """The C function of a compiled kernel; None if it is not one that is known here."""
    launcher = compiled.run
    hows = getattr(compiled.metadata, "tensordesc_meta", None) or []
    if (
        type(launcher) is not nvidia.CudaLauncher
        # grid, stream, function, two flags, six objects; then the kernel's own
        or getattr(nvidia, "_BASE_ARGS_FORMAT", "") != "iiiKKppOOOOOO"
        or launcher.global_scratch_size
        or launcher.profile_scratch_size
        or None in hows
    ):
        return None
    function = launcher.launch
    if hows:  # it makes tensor maps before it calls the C function
        function = inspect.getclosurevars(function).nonlocals["launcher"]
    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    fixed = (compiled.function, *flags, None, None, compiled.packed_metadata, None, None, None)
    return Entry(function, fixed, hows)


def tensor_map(shape: Sequence[int], strides: Sequence[int], how: dict[str, Any], address: int) -> Any:
    """What the C function takes for a descriptor of memory at an address; shape and strides come next."""
    base = SimpleNamespace(data_ptr=lambda: address)
    descriptor = SimpleNamespace(base=base, shape=shape, strides=strides, padding="zero")
    return nvidia.make_tensordesc_arg(descriptor, how)[0]


def current_stream(device: int) -> int:
    """That of PyTorch on a device."""
    return driver.active.get_current_stream(device)


def hooked() -> bool:
    """Whether somebody, such as a profiler, wants Triton to tell of every launch."""
    hook: Any = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
