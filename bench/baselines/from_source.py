"""Peers that are run from a source tree the user points at: nothing of theirs is installed or shipped.

The tree is the folder that holds the packages: `python/triton_kernels` of Triton's repository, the root of
scattermoe's, or one folder with both, packages or clones.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from ..registry import DidNotRun

_ROOTS = ("", "python/triton_kernels", "triton/python/triton_kernels", "triton_kernels", "scattermoe")


def load(
    package: str, module: str, peer_path: str | None, device: torch.device, *, interpreted: bool = True
) -> ModuleType:
    """Import `package.module` from below `peer_path`, which then stays importable.

    Args:
        package: its name.
        module: to return, with its package's name.
        peer_path: folder of sources.
        device: that its kernels are to run on.
        interpreted: whether Triton's interpreter runs them on a CPU, where it is switched on.

    Raises:
        DidNotRun: no path was given, the package is not below it, it cannot be imported, or its kernels
            cannot run on the device: last, so that what is wrong with a tree is seen on any machine.
    """
    if peer_path is None:
        tree = f"needs a source tree: --peer-path FOLDER that holds {package}/"
        raise DidNotRun(tree if device.type == "cuda" else "needs a CUDA device")
    found = _import(package, module, peer_path)
    if not _runs(device, interpreted):
        raise DidNotRun("needs a CUDA device")
    return found


def _runs(device: torch.device, interpreted: bool) -> bool:
    return device.type == "cuda" or (interpreted and os.environ.get("TRITON_INTERPRET") == "1")


def _import(package: str, module: str, peer_path: str) -> ModuleType:
    root = Path(peer_path).resolve()
    place = next((root / name for name in _ROOTS if (root / name / package / "__init__.py").is_file()), None)
    if place is None:
        raise DidNotRun(f"there is no package {package} below {peer_path}")
    if str(place) not in sys.path:
        sys.path.append(str(place))
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise DidNotRun(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    if Path(found.__file__ or "").resolve().is_relative_to(place):
        return found
    raise DidNotRun(f"{module} was imported from {found.__file__}, not from {place}")
