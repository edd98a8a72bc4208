"""Which vision network a run names, and how transformers comes to know `GridTower`; imports nothing that takes time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Literal

VisionLibrary = Literal["timm", "open_clip", "transformers"]
PRETRAINED, RANDOM = "pretrained", "random"


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """Which vision network to take, from where, and which part of it."""

    library: VisionLibrary
    name: str
    """timm's or open_clip's model name; for transformers a folder or hub id (a whole CLIP or its vision part)."""
    weights: str = PRETRAINED
    """`pretrained` (the library's own download, transformers' folder), `random`, an open_clip tag, or a `.pth` /
    `.safetensors` file."""
    weights_in_order: bool = False
    """Matches a weights file to the network by position instead of by name; every shape must fit."""
    layer: int | None = None
    """Hidden state from the end; None is -2 for transformers (as LLaVA-1.5 does) and -1 for the others."""
    grid_pool: int | None = None
    """Side of the grid after average pooling; None keeps the network's own."""
    image_size: int | None = None
    """Pixels along a side; None takes the published value."""
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None


# A composed LLaVA must open with plain `transformers` after `import dora_vl`, in whichever order the two are imported.
# transformers has no plug-in entry point. Importing it here would cost all who write `import dora_vl` two and a half
# seconds and torch, and `dora_vl.core` would need it; so one entry at the front of `sys.meta_path` answers for the two
# modules that hold the auto classes' tables, and takes itself out after them. Our own code calls `register_towers()`.

CONFIG_TABLE = "transformers.models.auto.configuration_auto"
MODEL_TABLE = "transformers.models.auto.modeling_auto"


def register_with_transformers() -> None:
    """Registers `GridTower` as soon as transformers' tables exist: now, or when they are imported."""
    steps = {CONFIG_TABLE: _register_config, MODEL_TABLE: _register_model}
    waiting = {table: step for table, step in steps.items() if table not in sys.modules}
    if waiting:
        sys.meta_path.insert(0, _TableWatcher(waiting))
    for table in steps.keys() - waiting.keys():
        steps[table]()


def _register_config() -> None:
    if _is_known():
        import_module("dora_vl.backbones.tower_config").register_config()


def _register_model() -> None:
    if _is_known():
        import_module("dora_vl.backbones.towers").register_towers()


def _is_known() -> bool:
    """Whether transformers is of a major version that the towers are written for.

    vLLM's plugin brings this package into processes with an older one, whose import must not fail for it.
    """
    version = str(getattr(sys.modules.get("transformers"), "__version__", ""))
    return version.partition(".")[0] == "5"


class _TableWatcher(MetaPathFinder):
    """Finds the tables as any importer would, and registers once each has been executed."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec with our step behind its loader; None for every other module."""
        if fullname not in self.waiting:
            return None
        register = self.waiting.pop(fullname)
        if not self.waiting:
            sys.meta_path.remove(self)
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRegister(spec.loader, register)
                return spec
        return None


class _ThenRegister(Loader):
    """Runs a module as its own loader does, then one more function."""

    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self.loader = loader
        self.register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader; then registers."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.register()
