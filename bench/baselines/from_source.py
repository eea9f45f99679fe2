"""Peers that are run from a source tree the user points at: nothing of theirs is installed or shipped.

The tree is the folder that holds the packages: `python/triton_kernels` of Triton's repository, the root of
scattermoe's, or one folder with both.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from ..registry import DidNotRun


def load(package: str, module: str, peer_path: str | None) -> ModuleType:
    """Import `package.module` from below `peer_path`, which then stays importable.

    Raises:
        DidNotRun: no path was given, the package is not below it, or it cannot be imported.
    """
    if peer_path is None:
        raise DidNotRun(f"needs a source tree: --peer-path FOLDER that holds {package}/")
    root = Path(peer_path).resolve()
    places = [root, *(root / name for name in ("python/triton_kernels", "triton_kernels", "scattermoe"))]
    place = next((place for place in places if (place / package / "__init__.py").is_file()), None)
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
