"""python_ref, the executable specification: beside `bench` in a checkout, inside the package if installed."""

from __future__ import annotations

import importlib
from types import ModuleType


def specification(name: str) -> ModuleType:
    """Return `python_ref.<name>`."""
    package = "python_ref" if __package__ == "bench" else "moebert_kernels.python_ref"
    return importlib.import_module(f"{package}.{name}")
