"""Something done when a module has been imported, whoever imports it, and at once if it is there.

For what belongs to a package that takes long to import and that users of ours may never need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def when_imported(name: str, do: Callable[[], None]) -> None:
    """Do it now if the module is there, otherwise once when it has been executed."""
    if name in sys.modules:
        do()
    elif not any(isinstance(finder, _Awaiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting(name, do))


class _Awaiting:
    """Finds one module as all other finders do, and has something done when it has been executed."""

    def __init__(self, name: str, do: Callable[[], None]) -> None:
        self.name = name
        self._do = do

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = self._then_do(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec

    def _then_do(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_do(module: ModuleType) -> None:
            execute(module)
            self._do()

        return execute_and_do
