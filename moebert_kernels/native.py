"""The door to csrc/: loads the extension, or says why there is none. Without it slower, never broken.

`routing.native_plans` and `kernels.cpu` go through it.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

_ABI_VERSION = 3  # kAbiVersion in csrc/bindings.cpp
_RECORD = "_native_missing.txt"  # RECORD in setup.py
_INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2", "baseline": "the compiler's default instructions"}


@dataclass(frozen=True)
class NativeStatus:
    """Which native parts this installation has.

    Attributes:
        cpu: plans on the host are built in C++, rows on the CPU handled by kernels in C++.
        cpu_detail: the compiler it was built with, or why it is absent.
        cuda: plans on CUDA devices are built by a CUDA kernel.
        cuda_detail: the toolkit and architectures it was built for, or why it is absent.
        rows_detail: the instruction set that the CPU's row kernels use here, or why they are absent.
    """

    cpu: bool
    cpu_detail: str
    cuda: bool
    cuda_detail: str
    rows_detail: str


def status() -> NativeStatus:
    """Say which native parts are present and why others are not; loads the extension, warns of nothing."""
    found, problem = _load()
    if found is None:
        return NativeStatus(False, problem, False, problem, problem)
    rows = _INSTRUCTION_SETS.get(found.ROW_KERNELS, found.ROW_KERNELS)
    built_for = f"CUDA {found.CUDA_VERSION}: {found.CUDA_ARCHS}" if found.HAS_CUDA else found.NO_CUDA_REASON
    return NativeStatus(True, found.COMPILER, found.HAS_CUDA, built_for, rows)


def extension(*, cuda: bool = False) -> Any | None:
    """The extension, with `cuda` only if it has its CUDA part; None after one warning that says why."""
    found, problem = _load()
    if cuda and found is not None and not found.HAS_CUDA:
        problem, found = found.NO_CUDA_REASON, None
    if found is None:
        _warn_once(problem)
    return found


@cache
def _load() -> tuple[Any | None, str]:
    """The extension module, or None and the reason it cannot be used."""
    try:
        module: ModuleType = importlib.import_module("moebert_kernels._native")
    except ModuleNotFoundError:
        return None, f"moebert_kernels._native {_why_not_built()}"
    except Exception as error:  # a file of another platform, Python or C++ runtime
        return None, f"moebert_kernels._native does not load ({type(error).__name__}: {error})"
    found = getattr(module, "ABI_VERSION", None)
    if found != _ABI_VERSION:
        return None, (
            f"moebert_kernels._native has interface {found}, this package needs {_ABI_VERSION}: "
            "install it again"
        )
    return module, ""


def _why_not_built() -> str:
    try:
        reason = Path(__file__).with_name(_RECORD).read_text(encoding="utf-8").strip()
    except OSError:
        return "was never built: `pip install .` in a source tree does, where there is a C++ compiler"
    return f"was not built at install: {reason}"


@cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"{problem}. What it would do is done in PyTorch, which is slower.", RuntimeWarning, stacklevel=5
    )
