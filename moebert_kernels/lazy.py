"""Packages whose modules are imported when a name of theirs is first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def exports(package: str, names_of: Mapping[str, Iterable[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """Return the `__all__` and the `__getattr__` of a package.

    Args:
        package: its `__name__`.
        names_of: by module in the package, the names it provides; a module's own name may be among them.
    """
    module_of = {name: module for module, names in names_of.items() for name in names}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(f"{package}.{module_of[name]}")
        return module if name == module_of[name] else getattr(module, name)

    return sorted(module_of), get


def make_callable(package: str, module: str) -> None:
    """Let a package be called as the function of its own name in one of its modules."""

    class _Package(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            function = getattr(import_module(f"{package}.{module}"), package.rpartition(".")[2])
            return function(*args, **kwargs)

    sys.modules[package].__class__ = _Package
