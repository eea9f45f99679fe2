"""A GPU that is not there: what runs on it compiles every kernel that it would launch, and launches none.

    python -m pytest -m gpu -p bench.standin --kernels-to FILE

With `install`, or as a plugin of pytest, torch finds a CUDA device: its tensors lie on the CPU and hold
whatever their memory held. Triton finds a driver whose target is Hopper and whose launcher does nothing. From
a call of the layer down to `triton.compile` everything is what it is on a GPU, and so are the keys of
Triton's cache. Under pytest, what results are compared with is not computed, and whatever is compared is
equal: a test that stopped there would launch no more. Most fail all the same, which is of no concern to who
wants the kernels: the keys of these are appended to FILE, one a line.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

MULTIPROCESSORS = 132  # of an H100 and of an H200: the kernels that stream are compiled for their number
_SHARED_BYTES = 232448
_MAKERS = ["arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"]
_MAKERS += ["tensor", "as_tensor", "zeros", "empty_like", "zeros_like", "ones_like", "randn_like"]
_METHODS = ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
_DOES_NOTHING = ["CUDAGraph", "Event", "Stream", "device", "graph", "stream", "synchronize", "empty_cache"]
_DOES_NOTHING += ["current_stream", "set_sync_debug_mode", "_sleep", "set_rng_state", "manual_seed_all"]


class Driver:
    """Triton's, of a Hopper GPU; a launch does nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (None, 1, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": _SHARED_BYTES},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """How a compiled kernel is launched."""
        return lambda *_: None

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default one."""
        return 0


def install(compiled: Callable[[Path, bool], None]) -> None:
    """Put the stand-in in a GPU's place, in this process and for good.

    Args:
        compiled: told of each kernel where Triton's cache keeps it, and whether it had it.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    from moebert_kernels.kernels import triton as kernels
    from moebert_kernels.kernels.triton import configs
    from moebert_kernels.ops import backends

    driver.set_active(Driver())
    knobs.compilation.listener = lambda **event: compiled(folder_of(event), event["cache_hit"])

    properties = SimpleNamespace(
        name="stand-in",
        multi_processor_count=MULTIPROCESSORS,
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
        major=9,
        minor=0,
    )
    put: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "mem_get_info": lambda *_: (0, 0),  # tests that need much memory are skipped
            "get_device_capability": lambda *_: (9, 0),
            "get_device_name": lambda *_: "stand-in",
            "get_device_properties": lambda *_: properties,
            "get_rng_state": lambda *_: torch.get_rng_state(),
        }
        | {name: mock.MagicMock() for name in _DOES_NOTHING},
        torch: {name: _on_cpu(getattr(torch, name)) for name in _MAKERS} | {"autocast": _Autocast},
        torch.Tensor: {name: _on_cpu(getattr(torch.Tensor, name)) for name in _METHODS}
        | {"cuda": lambda tensor, *_, **__: tensor},
        backends: {
            "choose": lambda call: backends.on_cuda(call.x_TD),
            "_triton_backend": lambda _: kernels,
        },
        configs: {"family": lambda _: "sm_90", "multiprocessors": lambda _: MULTIPROCESSORS},
    }
    _put(put)


def _put(values: dict[Any, dict[str, Any]]) -> None:
    for owner, named in values.items():
        for name, value in named.items():
            setattr(owner, name, value)


def folder_of(event: Mapping[str, Any]) -> Path:
    """Where Triton's cache keeps the kernel that its compilation listener was told of."""
    return next(Path(path).parent for path in event["metadata_group"].values())


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*arguments: Any, **options: Any) -> Any:
        return make(*map(_device, arguments), **{name: _device(value) for name, value in options.items()})

    return made


def _device(value: Any) -> Any:
    named = isinstance(value, str) and value.partition(":")[0] == "cuda"
    is_cuda = named or (isinstance(value, torch.device) and value.type == "cuda")
    return torch.device("cpu") if is_cuda else value


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *arguments: Any, **options: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *arguments, **options)


def pytest_addoption(parser: Any) -> None:
    """An option of pytest."""
    parser.addoption("--kernels-to", help="file to which the keys of compiled kernels are appended")


def pytest_load_initial_conftests(early_config: Any) -> None:
    """Before any conftest asks for a GPU."""
    _keys_to(Path(early_config.known_args_namespace.kernels_to or os.devnull))


def pytest_collection() -> None:
    """Before any test imports what it compares results with; it is most of the time that tests take."""
    checks = {
        "reference": _no_reference,
        "plain_errors": lambda *_, **__: defaultdict(lambda: (math.inf, math.inf)),
    }
    _put(
        {
            importlib.import_module("tests.kernels.checks"): checks,
            torch: {"equal": lambda *_: True},
            torch.testing: {"assert_close": lambda *_, **__: None},
        }
    )


def _no_reference(
    case: Any, t: dict[str, torch.Tensor], ids_TK: torch.Tensor | None = None
) -> dict[str, Any]:
    return {"y": torch.zeros_like(t["x"])} | {f"d{k}": torch.zeros_like(v) for k, v in t.items() if k != "dy"}


def _keys_to(path: Path) -> None:
    file = path.open("a", encoding="utf-8")

    def compiled(folder: Path, hit: bool) -> None:
        file.write(f"{folder.name}\n")
        file.flush()

    install(compiled)
