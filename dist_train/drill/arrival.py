"""Does something to a module of ours when it is first imported: the victim's script decides when torch is loaded.

Invariant: importing this, or asking for a module, imports nothing: what a script sets before its imports (environment
variables of CUDA, OpenMP, Hugging Face) takes effect as it does without us. [stdlib only]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

Arrived = Callable[[ModuleType], object]


def when_imported(name: str, arrived: Arrived) -> None:
    """Calls `arrived(module)` right after the module was executed; at once if it is there already."""
    if name in sys.modules:
        arrived(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watcher(name, arrived))


class _Watcher(MetaPathFinder):
    """Finds one module, once, as everybody else would."""

    def __init__(self, name: str, arrived: Arrived) -> None:
        self._name = name
        self._arrived = arrived

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, self._arrived)
        return spec


class _Telling(Loader):
    """Another loader, and a word afterwards."""

    def __init__(self, loader: Loader, arrived: Arrived) -> None:
        self._loader = loader
        self._arrived = arrived

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._arrived(module)
