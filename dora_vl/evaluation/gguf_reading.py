"""An exported GGUF read back as a plain model folder, so that it can be asked like any other.

The language model comes through transformers' own reader of the format, its configuration too; the tower and the
projector by gguf's table of names. Tokenizer and picture preparation are the base's.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_vl.adapters.base_weights import BaseWeights, skeleton
from dora_vl.adapters.gguf_export import LANGUAGE_PREFIX, MODEL_FILE, VISION_FILE
from dora_vl.adapters.gguf_vision import vision_names
from dora_vl.adapters.merge_folder import NOT_COPIED, WEIGHT_SUFFIXES
from dora_vl.backbones.language_source import read_language_model
from dora_vl.errors import UserError


def folder_of_gguf(exported: Path, base_folder: Path, target: Path) -> Path:
    """Writes what the files of an export hold as a model folder in float32.

    Raises:
        UserError: transformers cannot read the language model, or a tensor is missing.
    """
    language = read_language_model(str(exported), gguf_file=MODEL_FILE, dtype=torch.float32)
    with BaseWeights(base_folder) as base:
        shell = skeleton(base.config)
        config = copy.deepcopy(shell.config)
        weights = dict(language.weights)
        if config.model_type == "llava":
            weights = {
                LANGUAGE_PREFIX + name.removeprefix("model.") if name.startswith("model.") else name: value
                for name, value in weights.items()
            }
            weights |= _vision(exported / VISION_FILE, base, config)
            text = config.text_config.to_dict() | language.config.to_dict()
            config.text_config = type(config.text_config).from_dict(text)
            config.tie_word_embeddings = language.config.tie_word_embeddings
        else:
            config = type(config).from_dict(config.to_dict() | language.config.to_dict())
    config.architectures = shell.config.architectures
    config.dtype = torch.float32
    with torch.device("meta"):
        model = type(shell)(config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights[_embedding(config)]
    expected = {name: value.shape for name, value in model.state_dict().items() if name not in weights}
    unread = {name: torch.zeros(shape) for name, shape in expected.items() if not _is_run(name, config)}
    model.load_state_dict(weights | unread, strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    for path in sorted(base_folder.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in {"config.json", *NOT_COPIED}:
            shutil.copyfile(path, target / path.name)
    return target


def _embedding(config: Any) -> str:
    prefix = LANGUAGE_PREFIX if config.model_type == "llava" else "model."
    return f"{prefix}embed_tokens.weight"


def _is_run(name: str, config: Any) -> bool:
    """Whether a LLaVA's answers depend on a tensor; what they do not, an mmproj file leaves out."""
    if config.model_type != "llava" or not name.startswith("model.vision_tower."):
        return True
    hub = {name: name.replace("model.vision_tower.", "vision_tower.vision_model.", 1)}
    return bool(vision_names(hub, config))


def _vision(file: Path, base: BaseWeights, config: Any) -> dict[str, Tensor]:
    """The tower's and the projector's tensors by the model's own names."""
    import gguf

    keys = {one.name: base.hub_keys.get(one.key, one.key) for one in base.tensors.values()}
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found: dict[str, Tensor] = {}
    for name, own in vision_names(keys, config).items():
        if own not in held:
            raise UserError(f"{file} lacks {own}")
        values = gguf.quants.dequantize(held[own].data, held[own].tensor_type)
        found[name] = torch.from_numpy(values.copy()).float().view(base.tensors[name].shape)
    return found
