"""dora_vl: adapts vision-language models with DoRA, weight-decomposed low-rank adaptation.

The public surface, by hand. Names are imported at first use, so that `import dora_vl` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_vl.adapters.folder import load_adapter as load_adapter
    from dora_vl.adapters.folder import save_adapter as save_adapter
    from dora_vl.adapters.peft_model import accelerate_peft as accelerate_peft
    from dora_vl.adapters.peft_model import restore_peft as restore_peft
    from dora_vl.core import DoRAConfig as DoRAConfig
    from dora_vl.core import apply_dora as apply_dora
    from dora_vl.core import merge_dora as merge_dora
    from dora_vl.core import strip_adapters as strip_adapters
    from dora_vl.core import trained_parts as trained_parts
    from dora_vl.core import unmerge_dora as unmerge_dora
    from dora_vl.errors import UserError as UserError

__version__ = "0.1.0"

_CORE = ("DoRAConfig", "apply_dora", "merge_dora", "strip_adapters", "trained_parts", "unmerge_dora")
_HOMES = {
    **dict.fromkeys(_CORE, "dora_vl.core"),
    **dict.fromkeys(("load_adapter", "save_adapter"), "dora_vl.adapters.folder"),
    **dict.fromkeys(("accelerate_peft", "restore_peft"), "dora_vl.adapters.peft_model"),
    "UserError": "dora_vl.errors",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dora_vl' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name]), name)
