"""Original files of VL-T5, VL-Adapter and NVlabs' VL-BART: which layout one has, and its weights under our names.

Our names are the originals', so what is left is what their adapters do to a linear's weight, and the layer norms of
the visual embedding, whose flags changed over time: the keys say it, no flag is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dora_vl.adapters.tensor_files import read_tensors
from dora_vl.adapters.vlbart_tensors import ALIASES, EMBEDDING
from dora_vl.backbones.vlbart_config import VisualNorm
from dora_vl.backbones.vlbart_model import VlBartForConditionalGeneration
from dora_vl.errors import UserError

RAW_WEIGHT = ".weight_v"  # NVlabs' DoRA keeps the frozen weight under this name
ADAPTER_LEAVES = (".weight_m", ".lora_A", ".lora_B")
TASK_ADAPTER_PARTS = (".lora_As.", ".lora_Bs.")


@dataclass(frozen=True)
class OriginalState:
    """A file's weights of the base, and how its visual embedding is normed."""

    tensors: dict[str, Tensor]
    visual_norm: VisualNorm
    source: str

    @property
    def feature_width(self) -> int:
        """Numbers of a picture token."""
        return self.tensors[f"{EMBEDDING}.feat_embedding.0.weight"].shape[1]


def original_state(path: Path) -> OriginalState:
    """Reads a `.pth` (with `weights_only=True`) or safetensors file.

    Raises:
        UserError: it cannot be read or is no VL-BART.
    """
    return as_original(read_tensors(path), source=str(path))


def as_original(tensors: Mapping[str, Tensor], *, source: str) -> OriginalState:
    """The base's weights of a dictionary; adapters in it are left to `dora-vl convert`."""
    own = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("module.")
        if name.endswith(ADAPTER_LEAVES) or any(part in name for part in TASK_ADAPTER_PARTS):
            continue
        own[f"{name.removesuffix(RAW_WEIGHT)}.weight" if name.endswith(RAW_WEIGHT) else name] = tensor
    if f"{EMBEDDING}.feat_embedding.0.weight" not in own:
        raise UserError(
            f"{source} holds no {EMBEDDING}.feat_embedding.0.weight; it is no VL-BART of VL-T5 or VL-Adapter"
        )
    return OriginalState(own, visual_norm_of(own), source)


def visual_norm_of(tensors: Mapping[str, Tensor]) -> VisualNorm:
    """Which layer norms the visual embedding has, from the keys."""
    if f"{EMBEDDING}.feat_embedding.1.weight" in tensors:
        return "each"
    return "sum" if f"{EMBEDDING}.layer_norm.weight" in tensors else "none"


def load_original(model: VlBartForConditionalGeneration, state: OriginalState) -> None:
    """Loads strictly; a name for the shared tensor that the file leaves out is filled from another.

    Raises:
        UserError: names or shapes do not fit; both are listed.
    """
    found = dict(state.tensors)
    tokens = next((found[name] for name in ALIASES if name in found), None)
    if tokens is not None:
        found = {**dict.fromkeys(ALIASES, tokens), **found}
    expected = model.state_dict()
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    shapes = [
        f"{name} is {list(found[name].shape)}, here {list(expected[name].shape)}"
        for name in sorted(set(expected) & set(found))
        if found[name].shape != expected[name].shape
    ]
    if missing or unexpected or shapes:
        raise UserError(
            f"{state.source} does not fit: {len(missing)} missing {missing[:3]}, {len(unexpected)} unexpected "
            f"{unexpected[:3]}, {len(shapes)} of another shape {shapes[:2]}; is feature_width {state.feature_width}, "
            f"visual_norm {state.visual_norm}?"
        )
    model.load_state_dict(found, strict=True)
