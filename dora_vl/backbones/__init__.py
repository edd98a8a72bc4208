"""Models of every family, their prompts and inputs, and LLaVAs composed of parts.

A composed LLaVA must open with plain `transformers` after `import dora_vl`, in whichever order the two are imported.
transformers has no plug-in entry point, and importing it here would cost all who write `import dora_vl` two and a half
seconds. So one entry at the front of `sys.meta_path` answers for the two modules that hold the auto classes' tables,
and takes itself out after them. Nothing here may import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": "dora_vl.backbones.tower_config",
    "transformers.models.auto.modeling_auto": "dora_vl.backbones.towers",
}
"""transformers' tables, and the module whose import enters `GridTower` there."""


def register_with_transformers() -> None:
    """Registers `GridTower` as soon as transformers' tables exist: now, or when they are imported."""
    present = [table for table in _REGISTRATIONS if table in sys.modules]
    if waiting := _REGISTRATIONS.keys() - present:
        sys.meta_path.insert(0, _TableWatcher(waiting))
    for table in present:
        _register(table)


def _register(table: str) -> None:
    # vLLM's plugin brings this package into processes with an older transformers, whose import must not fail for it.
    version = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    if version.partition(".")[0] == "5":
        import_module(_REGISTRATIONS[table])


class _TableWatcher(MetaPathFinder):
    """Finds the tables as any importer would, and registers once each has been executed."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec with our step behind its loader; None for every other module."""
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)
        if not self.waiting:
            sys.meta_path.remove(self)
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


class _ThenRegister(Loader):
    """Runs a table's module as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; then registers."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        _register(module.__name__)
