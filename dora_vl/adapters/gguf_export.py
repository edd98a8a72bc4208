"""Base + adapter as GGUF, which llama.cpp and its kin run: the language model, and beside it a LLaVA's eyes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_vl.adapters.adapter import Adapter
from dora_vl.adapters.base_weights import BaseWeights, config_in, skeleton
from dora_vl.adapters.checkpoints import refuse_to_replace, written_whole
from dora_vl.adapters.gguf_architectures import (
    Architecture,
    add_settings,
    architecture_of,
    frequency_factors,
    in_pairs,
)
from dora_vl.adapters.gguf_files import Piece, check_package, kind_for, write_gguf
from dora_vl.adapters.gguf_tokenizer import add_tokenizer, vocabulary_of
from dora_vl.adapters.gguf_vision import add_vision, check_vision, known_to_be_misread, vision_pieces
from dora_vl.adapters.merge_folder import CERTIFICATES
from dora_vl.adapters.merged_weights import MergedWeights
from dora_vl.errors import UserError, shown

MODEL_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
LLAVA = "llava"
LANGUAGE_PREFIX = "model.language_model."


@dataclass(frozen=True)
class ExportedGguf:
    """What an export wrote."""

    architecture: str
    files: dict[str, int]
    """Bytes by name."""
    told: tuple[str, ...]
    """What the files cannot keep of the model, and what is known to read them wrongly."""


def refuse_gguf_target(target: Path) -> None:
    """Raises a `UserError` where something is there already that is no earlier export."""
    refuse_to_replace(target, (MODEL_FILE, VISION_FILE, *CERTIFICATES))


def refuse_gguf_base(base_folder: Path) -> None:
    """Raises a `UserError` where a base's configuration is of no form that is written, before its weights are read."""
    _forms(config_in(base_folder), base_folder)


def export_gguf(
    adapter: Adapter,
    base_folder: Path,
    target: Path,
    tokenizer: Any,
    *,
    kind: str,
    open_base: Callable[[Path], BaseWeights] = BaseWeights,
) -> ExportedGguf:
    """Writes `target/model.gguf`, and of a LLaVA `target/mmproj.gguf`; every product in float32, rounded once.

    Args:
        tokenizer: the base's, a fast one.
        kind: number type of the matrices, one of `gguf_files.KINDS`.
        open_base: gives the values that the adapter was trained on, where they are not the stored ones.

    Raises:
        UserError: a model, tower or tokenizer that llama.cpp does not have or is not written, an adapter that does
            not fit, or a target that is there already. Nothing is written then.
    """
    check_package()
    refuse_gguf_target(target)
    with open_base(base_folder) as base:
        config, language, found = _forms(base.config, base_folder)
        told: list[str] = []
        vocabulary = vocabulary_of(tokenizer, language.vocab_size, str(base_folder))
        weights = MergedWeights(base, adapter)

        def add_language(writer: Any) -> None:
            writer.add_name(f"{language.model_type} (dora_vl)")
            told.extend(add_settings(writer, language, found, str(base_folder)))
            add_tokenizer(writer, tokenizer, vocabulary)

        with written_whole(target) as folder:
            pieces = list(_pieces(weights, config, found, kind))
            files = {MODEL_FILE: write_gguf(folder / MODEL_FILE, found.name, kind, pieces, add_language)}
            if config.model_type == LLAVA:
                files[VISION_FILE] = _write_vision(folder / VISION_FILE, weights, config, kind)
                told.extend(known_to_be_misread(config))
    return ExportedGguf(found.name, files, tuple(told))


def _write_vision(path: Path, weights: MergedWeights, config: Any, kind: str) -> int:
    add_fields = partial(add_vision, config=config, folder=weights.base.folder)
    return write_gguf(path, "clip", kind, vision_pieces(weights, config, kind), add_fields)


def _forms(stated: Mapping[str, Any], folder: Path) -> tuple[Any, Any, Architecture]:
    """A base's configuration as transformers completes it, its language model's, and llama.cpp's form of that."""
    model = skeleton(stated)
    if model is None:
        raise UserError(
            f"{folder} is a {shown(stated.get('model_type'))}, of which transformers has no class and "
            "llama.cpp no form; dora-vl merge writes it as a plain folder"
        )
    config = model.config
    if config.model_type != LLAVA and "vision_config" in config.sub_configs:
        raise UserError(
            f"{folder} is a {shown(config.model_type)}; of models that see, LLaVA is written as GGUF. "
            "dora-vl merge writes a plain folder, from which llama.cpp's own convert_hf_to_gguf.py may know more"
        )
    if config.model_type != LLAVA:
        return config, config, architecture_of(config, str(folder))
    found = architecture_of(config.text_config, str(folder))
    check_vision(config, folder)
    return config, config.text_config, found


def _pieces(weights: MergedWeights, config: Any, found: Architecture, kind: str) -> Iterator[Piece]:
    import gguf

    language = config.text_config if config.model_type == LLAVA else config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == found.name)
    table = gguf.get_tensor_name_map(number, language.num_hidden_layers)
    factors = frequency_factors(language)
    if factors is not None:
        yield Piece(name="rope_freqs.weight", shape=tuple(factors.shape), kind="f32", read=lambda: factors)
    for stored in weights.stored:
        name = language_name(stored.name, config)
        if name is None or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        own = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise UserError(f"{weights.base.folder}: llama.cpp's {found.name} has no tensor for {stored.name}")
        read = partial(_read, weights, stored.name, found, _heads(name, language))
        yield Piece(name=own, shape=stored.shape, kind=kind_for(stored.shape, kind), read=read)


def language_name(name: str, config: Any) -> str | None:
    """A tensor's name in the language model alone; None: it belongs to what sees."""
    if config.model_type != LLAVA or name.startswith("lm_head."):
        return name
    return f"model.{name.removeprefix(LANGUAGE_PREFIX)}" if name.startswith(LANGUAGE_PREFIX) else None


def _heads(name: str, language: Any) -> int | None:
    """How many heads' rows a tensor of q or k holds; None: it is of another kind."""
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if layer == "q_proj":
        return language.num_attention_heads
    return (language.num_key_value_heads or language.num_attention_heads) if layer == "k_proj" else None


def _read(weights: MergedWeights, name: str, found: Architecture, heads: int | None) -> Tensor:
    values = weights.read(weights.base.tensors[name]).float()
    if found.norm_offset and name.endswith("norm.weight"):
        return values + found.norm_offset
    return in_pairs(values, heads) if found.interleaved and heads is not None else values
