"""A LLaVA's tower and projector as llama.cpp's `mmproj` file: keys `clip.*`, tensors `v.*` and `mm.*`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from dora_vl.adapters.gguf_files import Piece, kind_for
from dora_vl.adapters.merged_weights import MergedWeights
from dora_vl.errors import UserError, shown

SELECTED = MappingProxyType({"clip_vision_model": "default", "siglip_vision_model": "full"})
"""Towers that llama.cpp's LLaVA takes -> how their tokens are selected there: without a class token."""
ACTIVATIONS = MappingProxyType({"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True})
"""A tower's `hidden_act` -> whether the file says `use_gelu`; llama.cpp computes the quick one otherwise."""
PROJECTOR = MappingProxyType({"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"})
TOWER = "vision_tower.vision_model."
"""How the tower's tensors begin in published folders."""
UNUSED = ("post_layernorm.", "head.")
"""Parts of a tower that a LLaVA does not run."""
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")


def check_vision(config: Any, folder: Path) -> None:
    """Raises a `UserError` where llama.cpp's LLaVA computes another thing, or has no such tower."""
    tower, strategy = config.vision_config, config.vision_feature_select_strategy
    where = f"{folder}: "
    if tower.model_type not in SELECTED:
        raise UserError(
            f"{where}its tower is a {shown(tower.model_type)}, which an mmproj file cannot hold; written are CLIP and "
            "SigLIP. dora-vl merge writes the model for transformers instead"
        )
    if strategy != SELECTED[tower.model_type]:
        raise UserError(
            f"{where}its tower's tokens are selected by {strategy!r}, llama.cpp's by {SELECTED[tower.model_type]!r}"
        )
    if tower.hidden_act not in ACTIVATIONS or config.projector_hidden_act != "gelu":
        raise UserError(
            f"{where}its tower computes {tower.hidden_act} and its projector {config.projector_hidden_act}; "
            f"llama.cpp's LLaVA knows {', '.join(ACTIVATIONS)}, and gelu"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(f"{where}its pictures are features of several layers, which is not written")


def blocks_run(config: Any) -> int:
    """How many of the tower's blocks a picture goes through: `vision_feature_layer` counted from the front."""
    layer, blocks = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layer if layer >= 0 else blocks + 1 + layer


def add_vision(writer: Any, config: Any, folder: Path) -> None:
    """Writes the file's settings."""
    tower, blocks = config.vision_config, blocks_run(config)
    mean, deviation = _colours(folder)
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    # Said twice, since without it llama.cpp leaves the last of the blocks out.
    writer.add_vision_block_count(blocks)
    writer.add_array("clip.vision.feature_layer", [blocks])
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(deviation)
    writer.add_vision_use_gelu(ACTIVATIONS[tower.hidden_act])


def _colours(folder: Path) -> tuple[list[float], list[float]]:
    for name in PICTURE_FILES:
        if (folder / name).is_file():
            content: Mapping[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            found = content.get("image_processor", content)
            if isinstance(found, Mapping) and {"image_mean", "image_std"} <= found.keys():
                return [float(one) for one in found["image_mean"]], [float(one) for one in found["image_std"]]
    raise UserError(f"{folder}: neither {' nor '.join(PICTURE_FILES)} says image_mean and image_std")


def vision_pieces(weights: MergedWeights, config: Any, kind: str) -> list[Piece]:
    """The tensors of the file, each read when it is written."""
    return list(_pieces(weights, config, kind))


def vision_names(keys: Mapping[str, str], config: Any) -> dict[str, str]:
    """A published folder's keys, by whatever name -> the file's names; what a LLaVA does not run is left out.

    Args:
        keys: name -> published key.
    """
    import gguf

    blocks = blocks_run(config)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(blocks, 1))
    found: dict[str, str] = {}
    for name, key in keys.items():
        owner, _, leaf = key.rpartition(".")
        if owner in PROJECTOR:
            found[name] = f"{PROJECTOR[owner]}.{leaf}"
        elif key.startswith(TOWER) and not key.removeprefix(TOWER).startswith(UNUSED) and _runs(key, blocks):
            own = table.get_name(key, try_suffixes=(".weight", ".bias"))
            if own is None:
                raise UserError(f"gguf knows no name for {key}")
            found[name] = own
    return found


def _runs(key: str, blocks: int) -> bool:
    """Whether a tower's tensor is read: not of blocks behind the one whose output is taken, nor a table of places."""
    inside = key.removeprefix(f"{TOWER}encoder.layers.")
    return not key.endswith("position_ids") and (inside == key or int(inside.split(".")[0]) < blocks)


def _pieces(weights: MergedWeights, config: Any, kind: str) -> Iterator[Piece]:
    stored = {one.name: one for one in weights.stored}
    keys = {name: weights.base.hub_keys.get(one.key, one.key) for name, one in stored.items()}
    for name, own in vision_names(keys, config).items():
        one = stored[name]
        # Places are added to what comes out of the convolution, and cost next to nothing.
        small = own.startswith(("v.position_embd", "v.class_embd"))
        read = partial(_read, weights, name)
        yield Piece(name=own, shape=one.shape, kind="f32" if small else kind_for(one.shape, kind), read=read)


def _read(weights: MergedWeights, name: str) -> Tensor:
    return weights.read(weights.base.tensors[name])


def known_to_be_misread(config: Any) -> tuple[str, ...]:
    """What is known of programs that read such a file otherwise than it is meant, to be told."""
    if config.vision_config.model_type != "clip_vision_model":
        return ()
    told = (
        "llama.cpp as of October 2026 puts a CLIP tower's class token behind the patches instead of before them (its "
        "issue 25814), whoever wrote the file: it misreads pictures until that is mended; SigLIP towers are right"
    )
    return (told,)
