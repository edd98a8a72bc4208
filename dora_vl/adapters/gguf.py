"""Base + adapter as GGUF, which llama.cpp and its kin run: the language model, and beside it a LLaVA's vision part.

An architecture is here when a model of it was written, read back by transformers and run by llama.cpp with equal
logits. Tensors are written one at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dora_vl.adapters.adapter import Adapter
from dora_vl.adapters.base_weights import BaseWeights, StoredTensor, config_in, skeleton
from dora_vl.adapters.files import refuse_to_replace
from dora_vl.adapters.foreign import GGUF_KINDS
from dora_vl.adapters.merge import CHECK_FILE, MergedWeights
from dora_vl.errors import UserError, shown
from dora_vl.files import whole_folder

MODEL_FILE, VISION_FILE = "model.gguf", "mmproj.gguf"
LLAVA, LANGUAGE_PREFIX = "llava", "model.language_model."
WRITE_PLAIN = "dora-vl merge writes a plain folder, of which llama.cpp's own convert_hf_to_gguf.py may know more"
LOCAL_BASE = 10_000.0
"""Rotary base of Gemma 3's sliding layers, fixed in llama.cpp's code."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """llama.cpp's form of one kind of language model."""

    name: str
    """The architecture's name, as gguf's `MODEL_ARCH_NAMES` has it."""
    activation: str = "silu"
    """The `hidden_act` that llama.cpp's code computes."""
    interleaved: bool = False
    """Rows of q and k of each head stand in pairs (x0, x_half, x1, ...) instead of halves."""
    norm_offset: float = 0.0
    """Number added to norm weights; such models multiply by 1 + weight."""
    add_more: Callable[[Any, Any], None] = lambda writer, config: None
    """Writes further settings of the model's configuration."""


def _gemma2(writer: Any, config: Any) -> None:
    _check_attention_scale(config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma3(writer: Any, config: Any) -> None:
    _check_attention_scale(config)
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        raise UserError("its logits are capped, which llama.cpp's gemma3 does not do")
    if any((kind == "full_attention") != (number % 6 == 0) for number, kind in enumerate(config.layer_types, start=1)):
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


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="llama", interleaved=True),
    "mistral": Architecture(name="llama", interleaved=True),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "gemma2": Architecture(name="gemma2", activation="gelu_pytorch_tanh", norm_offset=1.0, add_more=_gemma2),
    "gemma3_text": Architecture(name="gemma3", activation="gelu_pytorch_tanh", norm_offset=1.0, add_more=_gemma3),
}
"""Maps a language model's `model_type` in transformers to llama.cpp's form."""


def architecture_of(config: Any, source: str) -> Architecture:
    """Finds llama.cpp's form for a language model's configuration."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UserError(
            f"{source}: its language model is a {shown(config.model_type)}; as GGUF are written "
            f"{', '.join(ARCHITECTURES)}. {WRITE_PLAIN}"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        has = f"llama.cpp's {architecture.name} has {architecture.activation}"
        raise UserError(f"{source}: hidden_act is {activation!r}, and {has}")
    return architecture


def add_settings(writer: Any, config: Any, architecture: Architecture, source: str) -> list[str]:
    """Writes a language model's settings; returns warnings of what the file cannot keep."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    warnings, context = [], config.max_position_embeddings
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
    if slides and config.sliding_window < context and not architecture.name.startswith("gemma"):
        warnings.append(
            f"attention slides over {config.sliding_window} tokens, which llama.cpp's {architecture.name} does not do: "
            f"the file states that many as its context instead of {context}"
        )
        context = config.sliding_window
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
        architecture.add_more(writer, config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return warnings


def _add_positions(writer: Any, config: Any, head_dim: int) -> None:
    rope = positions_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"its rotary positions are of type {kind!r}; written are default, linear and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("its rotary positions cover a part of each head, which is not written")
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def positions_of(config: Any) -> Mapping[str, Any]:
    """Returns the settings of rotary positions; those of full attention where layers differ."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def frequency_factors(config: Any) -> Tensor | None:
    """Returns the factor that slows each rotary pair (Llama 3.1), as float32 [head / 2]; None without such factors."""
    rope = positions_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = 2 * len(scaled)
    plain = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    return plain / scaled


def in_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorders rows of q or k as llama.cpp does: the two halves of each head alternate."""
    width = math.prod(weight.shape[1:])
    return weight.reshape(heads, 2, len(weight) // heads // 2, width).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """How the tensor is stored, one of `GGUF_KINDS`."""
    read: Callable[[], Tensor]


def kind_for(shape: Sequence[int], kind: str) -> str:
    """Chooses how a tensor of this shape is stored: vectors whole, rows that do not fill Q8_0's blocks of 32 as F16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and (len(shape) > 2 or shape[-1] % 32) else kind


def write_gguf(
    path: Path, architecture: str, kind: str, tensors: Sequence[WrittenTensor], add_fields: Callable[[Any], None]
) -> int:
    """Writes one file tensor by tensor, most of them of one `kind`; returns its size in bytes."""
    import gguf

    types = {name: gguf.GGMLQuantizationType[name.upper()] for name in GGUF_KINDS}
    dtypes = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "q8_0": np.dtype(np.uint8)}
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_fields(writer)
        for tensor in tensors:
            shape, dtype, raw = tensor.shape, dtypes[tensor.kind], types[tensor.kind]
            if tensor.kind == "q8_0":
                shape = gguf.quant_shape_to_byte_shape(shape, raw)
            writer.add_tensor_info(tensor.name, shape, dtype, math.prod(shape) * dtype.itemsize, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tqdm(tensors, desc=f"writing {path.name}", unit="tensor", disable=None):
            values = tensor.read().detach().float().contiguous().numpy()
            if values.shape != tensor.shape:
                raise ValueError(f"announced {tensor.name} {tensor.shape}, got {values.shape}")
            writer.write_tensor_data(gguf.quants.quantize(values, types[tensor.kind]))
    finally:
        writer.close()
    return path.stat().st_size


SPACE_MARK = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED_TOKEN, BYTE = range(1, 7)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""Maps the regular expression that splits a text before bytes are merged to llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """The fields `tokenizer.ggml.*`: merges of bytes, or SentencePiece tokens with their scores."""

    pre: str
    """llama.cpp's name of the split before tokenisation."""
    tokens: list[str]
    kinds: list[int]
    merges: Sequence[str] = ()
    scores: Sequence[float] = ()
    space_prefix: bool = False
    """The tokenizer puts a space in front of a text."""


def vocabulary_of(tokenizer: Any, rows: int, source: str) -> Vocabulary:
    """Reads a fast tokenizer's vocabulary; ids below the embedding's `rows` without a token are filled up."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise UserError(f"{source}: its tokenizer is a {model['type']}; as GGUF are written BPE and SentencePiece")
    tokens, kinds = _tokens(state, rows, source)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary(_split_name(state, source), tokens, kinds, merges=[" ".join(pair) for pair in merges])
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    kinds = [
        BYTE if kind == NORMAL and re.fullmatch("<0x..>", token) else kind
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    steps = [*_steps(state.get("normalizer"), "normalizers"), *_steps(state.get("pre_tokenizer"), "pretokenizers")]
    space_prefix = any(
        (step["type"] == "Prepend" and step["prepend"] == SPACE_MARK)
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in steps
    )
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    return Vocabulary("default", tokens, kinds, scores=scores, space_prefix=space_prefix)


def _tokens(state: Mapping[str, Any], rows: int, source: str) -> tuple[list[str], list[int]]:
    vocabulary, added, unknown = state["model"]["vocab"], state["added_tokens"], state["model"].get("unk_token")
    highest = max([*vocabulary.values(), *(token["id"] for token in added)])
    if highest >= rows:
        raise UserError(f"{source}: its tokenizer has the id {highest}, and its embedding {rows} rows")
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED_TOKEN] * rows
    for text, number in vocabulary.items():
        tokens[number], kinds[number] = text, NORMAL
    for token in added:
        tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if unknown in vocabulary and state["model"].get("byte_fallback"):
        kinds[vocabulary[unknown]] = UNKNOWN
    return tokens, kinds


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _split_name(state: Mapping[str, Any], source: str) -> str:
    steps = _steps(state.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    plain = bool(steps) and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = SPLITS.get(str(steps[0]["pattern"].get("Regex")))
        if name is not None and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return name
    raise UserError(
        f"{source}: its tokenizer splits text by {' and '.join(kinds) or 'nothing'} in a way that llama.cpp has no "
        f"known name for; known are gpt-2, smollm, {', '.join(SPLITS.values())}, and SentencePiece"
    )


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Writes the tokenizer's fields: tokens, special ids, what surrounds a text, and the chat template."""
    writer.add_tokenizer_model("llama" if vocabulary.scores else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    for kind, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    text = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(text) and text[0] == ids["bos"])
    writer.add_add_eos_token(bool(text) and text[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


SELECTED = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""Maps each tower that llama.cpp's LLaVA takes to its only token selection, which drops a class token."""
ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
"""Maps a tower's `hidden_act` to the file's `use_gelu`; without it llama.cpp computes the quick one."""
PROJECTOR = {"multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2"}
TOWER = "vision_tower.vision_model."
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")


def check_vision(config: Any, folder: Path) -> None:
    """Refuses a vision part that llama.cpp's LLaVA has no tower for or would compute in another way."""
    tower, strategy = config.vision_config, config.vision_feature_select_strategy
    reason = None
    if tower.model_type not in SELECTED:
        reason = (
            f"its tower is a {shown(tower.model_type)}; an mmproj file holds CLIP and SigLIP. --text-only writes its "
            "language model, which then sees no pictures; with them dora-vl merge --to FOLDER and dora-vl serve "
            "--model FOLDER answer"
        )
    elif strategy != SELECTED[tower.model_type]:
        reason = f"its tower's tokens are selected by {strategy!r}, llama.cpp's by {SELECTED[tower.model_type]!r}"
    elif tower.hidden_act not in ACTIVATIONS or config.projector_hidden_act != "gelu":
        reason = (
            f"its tower computes {tower.hidden_act} and its projector {config.projector_hidden_act}; llama.cpp's LLaVA "
            f"knows {', '.join(ACTIVATIONS)}, and gelu"
        )
    elif not isinstance(config.vision_feature_layer, int):
        reason = "its pictures are features of several layers, which is not written"
    if reason is not None:
        raise UserError(f"{folder}: {reason}")


def blocks_run(config: Any) -> int:
    """Counts the tower's blocks that a picture goes through: `vision_feature_layer` counted from the front."""
    layer, blocks = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layer if layer >= 0 else blocks + 1 + layer


def add_vision(writer: Any, config: Any, folder: Path) -> None:
    """Writes the settings of a tower and its projector, llama.cpp's `mmproj` file."""
    tower, blocks = config.vision_config, blocks_run(config)
    files = [folder / name for name in PICTURE_FILES if (folder / name).is_file()]
    sections = [
        content.get("image_processor", content) for content in (json.loads(f.read_text("utf-8")) for f in files)
    ]
    colours = (part for part in sections if isinstance(part, Mapping) and {"image_mean", "image_std"} <= part.keys())
    stated = next(colours, None)
    if stated is None:
        raise UserError(f"{folder}: neither {' nor '.join(PICTURE_FILES)} says image_mean and image_std")
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
    # Both are needed: without the second llama.cpp skips the last block.
    writer.add_vision_block_count(blocks)
    writer.add_array("clip.vision.feature_layer", [blocks])
    writer.add_vision_image_mean([float(value) for value in stated["image_mean"]])
    writer.add_vision_image_std([float(value) for value in stated["image_std"]])
    writer.add_vision_use_gelu(ACTIVATIONS[tower.hidden_act])


def vision_names(keys: Mapping[str, str], config: Any) -> dict[str, str]:
    """Maps each key in published folders to the file's name, without tensors that a LLaVA does not run.

    It does not run the blocks behind the one whose output is taken, nor a table of positions.
    """
    import gguf

    blocks = blocks_run(config)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(blocks, 1))
    names: dict[str, str] = {}
    for name, key in keys.items():
        owner, _, leaf = key.rpartition(".")
        if owner in PROJECTOR:
            names[name] = f"{PROJECTOR[owner]}.{leaf}"
        elif key.startswith(TOWER) and leaf != "position_ids":
            part, block = key.removeprefix(TOWER), re.match(r"encoder\.layers\.(\d+)\.", key.removeprefix(TOWER))
            if not part.startswith(("post_layernorm.", "head.")) and (block is None or int(block[1]) < blocks):
                names[name] = _name_in(table, key, "a vision tower")
    return names


def _name_in(table: Any, name: str, model: str) -> str:
    """Returns llama.cpp's name of a tensor."""
    own = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if own is None:
        raise UserError(f"llama.cpp has no name for {name} of {model}")
    return own


def _vision_tensors(weights: MergedWeights, config: Any, kind: str) -> Iterator[WrittenTensor]:
    stored = {tensor.name: tensor for tensor in weights.stored}
    keys = {name: weights.base.hub_keys.get(tensor.key, tensor.key) for name, tensor in stored.items()}
    for name, own in vision_names(keys, config).items():
        # Positions are added to the convolution's output, and are small.
        small = own.startswith(("v.position_embd", "v.class_embd"))
        shape = stored[name].shape
        yield WrittenTensor(own, shape, "f32" if small else kind_for(shape, kind), partial(weights.read, stored[name]))


@dataclass(frozen=True)
class ExportedGguf:
    """The result of an export."""

    architecture: str
    files: dict[str, int]
    """Bytes of each file by name."""
    warnings: tuple[str, ...]
    """Say what the files cannot keep of the model, and what is known to read them wrongly."""


def refuse_gguf_target(target: Path) -> None:
    """Refuses a target that exists and is no earlier export."""
    refuse_to_replace(target, (MODEL_FILE, VISION_FILE, CHECK_FILE))


def refuse_gguf_base(base_folder: Path, *, text_only: bool = False) -> None:
    """Refuses a base without a GGUF form, before its weights are read."""
    _forms(config_in(base_folder), base_folder, text_only)


def export_gguf(
    adapter: Adapter,
    base_folder: Path,
    target: Path,
    tokenizer: Any,
    *,
    kind: str,
    text_only: bool = False,
    open_base: Callable[[Path], BaseWeights] = BaseWeights,
) -> ExportedGguf:
    """Writes `target/model.gguf`, and for a LLaVA `target/mmproj.gguf` unless `text_only`.

    Every product is computed in float32 and rounded once.
    """
    refuse_gguf_target(target)
    with open_base(base_folder) as base:
        config, language, architecture = _forms(base.config, base_folder, text_only)
        warnings: list[str] = []
        vocabulary = vocabulary_of(tokenizer, language.vocab_size, str(base_folder))
        weights = MergedWeights(base, adapter)

        def add_language(writer: Any) -> None:
            writer.add_name(f"{language.model_type} (dora_vl)")
            warnings.extend(add_settings(writer, language, architecture, str(base_folder)))
            add_tokenizer(writer, tokenizer, vocabulary)

        with whole_folder(target) as folder:
            tensors = list(_language_tensors(weights, config, architecture, kind))
            files = {MODEL_FILE: write_gguf(folder / MODEL_FILE, architecture.name, kind, tensors, add_language)}
            if config.model_type == LLAVA and not text_only:
                add_fields = partial(add_vision, config=config, folder=base_folder)
                tensors = list(_vision_tensors(weights, config, kind))
                files[VISION_FILE] = write_gguf(folder / VISION_FILE, "clip", kind, tensors, add_fields)
                if config.vision_config.model_type == "clip_vision_model":
                    warnings.append(
                        "llama.cpp as of October 2026 puts a CLIP tower's class token behind the patches instead of "
                        "before them (its issue 25814), whoever wrote the file: it misreads pictures until that is "
                        "mended; SigLIP towers are right"
                    )
    return ExportedGguf(architecture.name, files, tuple(warnings))


def _forms(stated: Mapping[str, Any], folder: Path, text_only: bool) -> tuple[Any, Any, Architecture]:
    """Reads a base's configuration as transformers completes it, its language model's, and the form of the latter."""
    model = skeleton(stated)
    if model is None:
        raise UserError(f"{folder} is a {shown(stated.get('model_type'))}, which transformers has no class for")
    config = model.config
    if config.model_type != LLAVA and "vision_config" in config.sub_configs:
        raise UserError(
            f"{folder} is a {shown(config.model_type)}; of vision-language models LLaVA is written. {WRITE_PLAIN}"
        )
    language = config.text_config if config.model_type == LLAVA else config
    architecture = architecture_of(language, str(folder))
    if config.model_type == LLAVA and not text_only:
        check_vision(config, folder)
    return config, language, architecture


def _language_tensors(
    weights: MergedWeights, config: Any, architecture: Architecture, kind: str
) -> Iterator[WrittenTensor]:
    import gguf

    language = config.text_config if config.model_type == LLAVA else config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(number, language.num_hidden_layers)
    heads = {"q_proj": language.num_attention_heads}
    heads["k_proj"] = language.num_key_value_heads or heads["q_proj"]

    def read(stored: StoredTensor, layer: str) -> Tensor:
        values = weights.read(stored).float()
        if architecture.norm_offset and stored.name.endswith("norm.weight"):
            return values + architecture.norm_offset
        return in_pairs(values, heads[layer]) if architecture.interleaved and layer in heads else values

    factors = frequency_factors(language)
    if factors is not None:
        yield WrittenTensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)
    for stored in weights.stored:
        name = stored.name
        if config.model_type == LLAVA and not name.startswith("lm_head."):
            if not name.startswith(LANGUAGE_PREFIX):
                continue
            name = f"model.{name.removeprefix(LANGUAGE_PREFIX)}"
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            own, layer = _name_in(table, name, architecture.name), name.rpartition(".")[0].rpartition(".")[2]
            yield WrittenTensor(own, stored.shape, kind_for(stored.shape, kind), partial(read, stored, layer))
