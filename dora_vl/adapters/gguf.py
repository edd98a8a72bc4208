"""Language models that can be written as GGUF: llama.cpp's name for each, its settings, and what it stores otherwise.

A row is here when a model of its kind was written, read back by transformers and run by llama.cpp with equal logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dora_vl.adapters.adapter import Adapter
from dora_vl.adapters.base_weights import BaseWeights, config_in, skeleton
from dora_vl.adapters.files import refuse_to_replace, written_whole
from dora_vl.adapters.merge import CERTIFICATES, MergedWeights
from dora_vl.errors import UserError, shown

LOCAL_BASE = 10_000.0
"""Base of the rotary positions of Gemma 3's sliding layers, which llama.cpp has in its code."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp holds one kind of language model.

    Attributes:
        name: of gguf's `MODEL_ARCH_NAMES`.
        activation: `hidden_act` that its code computes.
        interleaved: rows of q and k of each head stand in pairs (x0, x_half, x1, ...) instead of halves.
        norm_offset: what is added to the weights of norms, which the model multiplies by 1 + weight.
        more: what else it states of a model's configuration.
    """

    name: str
    activation: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    norm_offset: float = 0.0
    more: Callable[[Any, Any], None] = lambda writer, config: None


def _gemma2(writer: Any, config: Any) -> None:
    _check_attention_scale(config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3(writer: Any, config: Any) -> None:
    _check_attention_scale(config)
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        raise UserError("its logits are capped, which llama.cpp's gemma3 does not do")
    pattern = [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(len(config.layer_types))
    ]
    if list(config.layer_types) != pattern:
        raise UserError("its layers are not five of sliding attention to one of full, as llama.cpp's gemma3 has them")
    if config.rope_parameters["sliding_attention"]["rope_theta"] != LOCAL_BASE:
        raise UserError(f"its sliding layers' rotary base is not {LOCAL_BASE:g}, which llama.cpp's gemma3 has")
    writer.add_sliding_window(config.sliding_window)


def _check_attention_scale(config: Any) -> None:
    if config.query_pre_attn_scalar != config.head_dim:
        raise UserError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp scales by the head's width, "
            f"{config.head_dim}"
        )


_GEMMA = ("gelu_pytorch_tanh",)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": Architecture(name="llama", interleaved=True),
        "mistral": Architecture(name="llama", interleaved=True),
        "qwen2": Architecture(name="qwen2"),
        "qwen3": Architecture(name="qwen3"),
        "gemma2": Architecture(name="gemma2", activation=_GEMMA, norm_offset=1.0, more=_gemma2),
        "gemma3_text": Architecture(name="gemma3", activation=_GEMMA, norm_offset=1.0, more=_gemma3),
    }
)
"""transformers' `model_type` of a language model -> llama.cpp's form."""


def architecture_of(config: Any, source: str) -> Architecture:
    """The row of a language model's configuration."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UserError(
            f"{source}: its language model is a {shown(config.model_type)}; as GGUF are written "
            f"{', '.join(ARCHITECTURES)}. dora-vl merge writes a plain folder, of which "
            "llama.cpp's own convert_hf_to_gguf.py may know more"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in found.activation:
        raise UserError(
            f"{source}: hidden_act is {activation!r}, and llama.cpp's {found.name} has {found.activation[0]}"
        )
    return found


def add_settings(writer: Any, config: Any, found: Architecture, source: str) -> tuple[str, ...]:
    """Writes a language model's settings; returns what the file cannot keep, to be told."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    context, told = _context(config, found)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    try:
        _add_positions(writer, config, head_dim)
        found.more(writer, config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return told


def _context(config: Any, found: Architecture) -> tuple[int, tuple[str, ...]]:
    """Tokens that the file says the model takes: no more than a window that llama.cpp does not know."""
    longest = config.max_position_embeddings
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if found.name.startswith("gemma") or not slides or config.sliding_window >= longest:
        return longest, ()
    told = (
        f"attention slides over {config.sliding_window} tokens, which llama.cpp's {found.name} does not do: the file "
        f"states that many as its context instead of {longest}"
    )
    return config.sliding_window, (told,)


def _add_positions(writer: Any, config: Any, head_dim: int) -> None:
    rope = positions_of(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise UserError(f"its rotary positions are of type {kind!r}; written are default, linear and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("its rotary positions cover a part of each head, which is not written")


def positions_of(config: Any) -> Mapping[str, Any]:
    """The settings of rotary positions; of full attention where layers differ."""
    found = config.rope_parameters
    return found.get("full_attention", found)


def frequency_factors(config: Any) -> Tensor | None:
    """What each pair of a head turns slower by, where that is one number a pair (Llama 3.1); float32 [head / 2]."""
    rope = positions_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    return plain / scaled


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: of each head, the two halves' rows in turn."""
    width = math.prod(weight.shape[1:])
    return weight.reshape(heads, 2, len(weight) // heads // 2, width).transpose(1, 2).reshape(weight.shape)


# Writes a GGUF file tensor by tensor: one is in memory at a time.


KINDS = ("f16", "f32", "q8_0")
"""Number types of the matrices; vectors are float32 in each."""
BLOCK = 32
"""Numbers of a row that Q8_0 holds with one scale."""


def check_package() -> None:
    """Raises a `UserError` where the package that writes the format is not installed."""
    if find_spec("gguf") is None:
        raise UserError("GGUF is written by the package gguf: pip install gguf (or 'dora-vl[gguf]')")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of the file.

    Attributes:
        shape: as torch has it.
        kind: one of `KINDS`.
        read: gives the values.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def kind_for(shape: Sequence[int], wanted: str) -> str:
    """How a tensor of this shape is stored: vectors whole, and as F16 what Q8_0 has no blocks for."""
    if len(shape) < 2:
        return "f32"
    blocks = len(shape) == 2 and shape[-1] % BLOCK == 0
    return "f16" if wanted == "q8_0" and not blocks else wanted


def write_gguf(
    path: Path, architecture: str, kind: str, pieces: Sequence[Piece], add_fields: Callable[[Any], None]
) -> int:
    """Writes one file and returns its size in bytes.

    Args:
        architecture: llama.cpp's name.
        kind: the number type that the file says most of it has.
        add_fields: writes the file's settings.
    """
    import gguf

    types = {one: gguf.GGMLQuantizationType[one.upper()] for one in KINDS}
    files = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_file_type(files[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_fields(writer)
        for piece in pieces:
            shape = (
                gguf.quant_shape_to_byte_shape(piece.shape, types[piece.kind]) if piece.kind == "q8_0" else piece.shape
            )
            dtype = np.dtype({"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[piece.kind])
            size = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(piece.name, shape, dtype, size, raw_dtype=types[piece.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in tqdm(pieces, desc=f"writing {path.name}", unit="tensor", disable=None):
            values = piece.read().detach().float().contiguous().numpy()
            if values.shape != piece.shape:
                raise ValueError(f"announced {piece.name} {piece.shape}, got {values.shape}")
            writer.write_tensor_data(gguf.quants.quantize(values, types[piece.kind]))
    finally:
        writer.close()
    return path.stat().st_size


# A tokenizer as GGUF holds it: tokens with their kinds, merges or scores, and how llama.cpp has to split text.


SPACE_MARK = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED_TOKEN, BYTE = range(1, 7)
"""gguf's `TokenType`."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = MappingProxyType(
    {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
)
"""Regular expression that splits a text before its bytes are merged -> llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """What the fields `tokenizer.ggml.*` say of tokens."""

    model: str
    """`gpt2`: merges of bytes; `llama`: SentencePiece's, by scores."""
    pre: str
    """llama.cpp's name of how text is split first."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool
    """Whether a text gets a space in front."""


def vocabulary_of(tokenizer: Any, rows: int, source: str) -> Vocabulary:
    """A fast tokenizer's vocabulary.

    Args:
        rows: of the embedding; ids that no token has are filled up.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    tokens, kinds = _tokens(state, rows, source)
    if model["type"] != "BPE":
        raise UserError(
            f"{source}: its tokenizer is of kind {model['type']}; as GGUF are written BPE and SentencePiece"
        )
    merges = [_merge(one) for one in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary(
            "gpt2", _split_name(state, source), tokens, kinds, [" ".join(one) for one in merges], [], False
        )
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    kinds = [BYTE if kind == NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, kinds, strict=True)]
    return Vocabulary("llama", "default", tokens, kinds, [], scores, _has_space_prefix(state))


def _tokens(state: Mapping[str, Any], rows: int, source: str) -> tuple[list[str], list[int]]:
    vocabulary, added = state["model"]["vocab"], state["added_tokens"]
    highest = max([*vocabulary.values(), *(one["id"] for one in added)])
    if highest >= rows:
        raise UserError(f"{source}: its tokenizer has the id {highest}, and its embedding {rows} rows")
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED_TOKEN] * rows
    for token, number in vocabulary.items():
        tokens[number], kinds[number] = token, NORMAL
    for one in added:
        tokens[one["id"]], kinds[one["id"]] = one["content"], CONTROL if one["special"] else USER_DEFINED
    unknown = state["model"].get("unk_token")
    if unknown in vocabulary and state["model"].get("byte_fallback"):
        kinds[vocabulary[unknown]] = UNKNOWN
    return tokens, kinds


def _merge(pair: str | Sequence[str]) -> tuple[str, str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left, right


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _split_name(state: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text."""
    steps = _steps(state.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    plain = bool(steps) and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        found = SPLITS.get(str(steps[0]["pattern"].get("Regex")))
        if found is not None and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return found
    raise UserError(
        f"{source}: its tokenizer splits text by {' and '.join(kinds) or 'nothing'} in a way that no name "
        f"of llama.cpp is known for here; known are gpt-2, smollm, {', '.join(SPLITS.values())}, and SentencePiece"
    )


def _has_space_prefix(state: Mapping[str, Any]) -> bool:
    for step in _steps(state.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE_MARK:
            return True
    steps = _steps(state.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps)


def add_tokenizer(writer: Any, tokenizer: Any, found: Vocabulary) -> None:
    """Writes the fields: tokens, special ids, what is put around a text, and the chat template."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    if found.scores:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    if found.merges:
        writer.add_token_merges(found.merges)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    for kind, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    text = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(text) and text[0] == ids["bos"])
    writer.add_add_eos_token(bool(text) and text[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


# A LLaVA's tower and projector as llama.cpp's `mmproj` file: keys `clip.*`, tensors `v.*` and `mm.*`.


SELECTED = MappingProxyType({"clip_vision_model": "default", "siglip_vision_model": "full"})
"""Towers that llama.cpp's LLaVA takes -> how their tokens are selected there: without a class token."""
ACTIVATIONS = MappingProxyType({"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True})
"""A tower's `hidden_act` -> whether the file says `use_gelu`; llama.cpp computes the quick one otherwise."""
PROJECTOR = MappingProxyType({"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"})
TOWER = "vision_tower.vision_model."
"""How the tower's tensors begin in published folders."""
UNUSED_TENSORS = ("post_layernorm.", "head.")
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
    return list(_vision_pieces(weights, config, kind))


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
        elif key.startswith(TOWER) and not key.removeprefix(TOWER).startswith(UNUSED_TENSORS) and _runs(key, blocks):
            own = table.get_name(key, try_suffixes=(".weight", ".bias"))
            if own is None:
                raise UserError(f"gguf knows no name for {key}")
            found[name] = own
    return found


def _runs(key: str, blocks: int) -> bool:
    """Whether a tower's tensor is read: not of blocks behind the one whose output is taken, nor a table of places."""
    inside = key.removeprefix(f"{TOWER}encoder.layers.")
    return not key.endswith("position_ids") and (inside == key or int(inside.split(".")[0]) < blocks)


def _vision_pieces(weights: MergedWeights, config: Any, kind: str) -> Iterator[Piece]:
    stored = {one.name: one for one in weights.stored}
    keys = {name: weights.base.hub_keys.get(one.key, one.key) for name, one in stored.items()}
    for name, own in vision_names(keys, config).items():
        one = stored[name]
        # Places are added to what comes out of the convolution, and cost next to nothing.
        small = own.startswith(("v.position_embd", "v.class_embd"))
        read = partial(_read_vision, weights, name)
        yield Piece(name=own, shape=one.shape, kind="f32" if small else kind_for(one.shape, kind), read=read)


def _read_vision(weights: MergedWeights, name: str) -> Tensor:
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


# Base + adapter as GGUF, which llama.cpp and its kin run: the language model, and beside it a LLaVA's eyes.


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
            pieces = list(_language_pieces(weights, config, found, kind))
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


def _language_pieces(weights: MergedWeights, config: Any, found: Architecture, kind: str) -> Iterator[Piece]:
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
        read = partial(_read_language, weights, stored.name, found, _heads(name, language))
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


def _read_language(weights: MergedWeights, name: str, found: Architecture, heads: int | None) -> Tensor:
    values = weights.read(weights.base.tensors[name]).float()
    if found.norm_offset and name.endswith("norm.weight"):
        return values + found.norm_offset
    return in_pairs(values, heads) if found.interleaved and heads is not None else values
