"""Which class adapts which layer: a table by class path, so that nothing of other packages is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dora_vl.core.config import DoRAConfig, LayerKind
from dora_vl.core.conv import DoRAConv1d, DoRAConv2d
from dora_vl.core.embedding import SCALED_EMBEDDINGS, DoRAEmbedding
from dora_vl.core.experts import expert_projections
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import DoRALinear, TransposedLinear
from dora_vl.core.opaque import OPAQUE_KINDS, TENSOR_SUBCLASS, UNKNOWN_LINEAR, OpaqueKind, OpaqueLinear, class_path


@dataclass(frozen=True)
class Adaptable:
    """One row: what the layer counts as in `config.kinds`, and what builds its adapted form."""

    kind: LayerKind
    build: Callable[[Any, DoRAConfig], AdaptedLayer]
    weight_is_readable: bool = True
    """Whether the layer's weight can be read, and written for `init="pissa"`; not so where it is only called."""


ADAPTABLE: Mapping[str, Adaptable] = {
    "torch.nn.modules.linear.Linear": Adaptable("linear", DoRALinear),
    "transformers.pytorch_utils.Conv1D": Adaptable("linear", TransposedLinear),
    "torch.nn.modules.conv.Conv1d": Adaptable("conv", DoRAConv1d),
    "torch.nn.modules.conv.Conv2d": Adaptable("conv", DoRAConv2d),
    "torch.nn.modules.sparse.Embedding": Adaptable("embedding", DoRAEmbedding),
    **{path: Adaptable("embedding", DoRAEmbedding) for path in SCALED_EMBEDDINGS},
}


def adaptable_names(model: nn.Module, config: DoRAConfig) -> list[str]:
    """Full names of all that can be adapted, in the model's order: layers, and experts' weights that are one tensor."""
    names: list[str] = []
    for name, module in model.named_modules():
        if adaptable(module, config) is not None:
            names.append(name)
        if "experts" in config.kinds:
            names += [f"{name}.{leaf}".lstrip(".") for leaf in expert_projections(module)]
    return names


def adaptable(module: nn.Module, config: DoRAConfig) -> Adaptable | None:
    """How a module is adapted; None if it is not, or not of `config.kinds`.

    By exact class: a subclass may use its weight without calling itself (torch's attention does), and an adapter
    there would be passed over in silence.
    """
    row = _row(module, config)
    return row if row is not None and row.kind in config.kinds else None


def _row(module: nn.Module, config: DoRAConfig) -> Adaptable | None:
    path = class_path(module)
    if path in OPAQUE_KINDS:
        return _opaque(OPAQUE_KINDS[path])
    if path in config.opaque_layers:
        return _opaque(UNKNOWN_LINEAR)
    row = ADAPTABLE.get(path)
    if isinstance(module, nn.Linear) and row is not None and is_traceable_wrapper_subclass(module.weight.data):
        return _opaque(TENSOR_SUBCLASS)
    return row


def _opaque(kind: OpaqueKind) -> Adaptable:
    return Adaptable("linear", lambda module, config: OpaqueLinear(module, config, kind), weight_is_readable=False)
