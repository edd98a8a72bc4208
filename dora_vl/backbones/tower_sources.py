"""Loads a pretrained vision network from its library, measures it once, and writes the bases that a run composes.

A base is a LLaVA of any vision tower and any language model, or a language model by itself, published or small and
random.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING, AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from dora_vl.adapters.base_weights import save_under_hub_names
from dora_vl.adapters.files import read_tensors
from dora_vl.backbones import register_towers
from dora_vl.backbones.loading import (
    LanguageModel,
    add_image_token,
    filled,
    load_pretrained,
    read_language_model,
    with_image_token,
    written_base,
)
from dora_vl.backbones.specs import PRETRAINED, RANDOM, ComposeSpec, LanguageSource, SmallLanguageModel, TowerSpec
from dora_vl.backbones.towers import (
    GridTower,
    GridTowerConfig,
    Preparation,
    image_processor,
    keep_all_buffers,
    network_output,
    stated_preparation,
)
from dora_vl.backbones.vision_store import open_features
from dora_vl.data.check import FileCheck
from dora_vl.data.data_files import find_files
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import BadSample, SettingError, UserError, needs_extra, one_line
from dora_vl.files import NO_OWN_CODE, check_model_folder, json_or_nothing, opening, write_json
from dora_vl.shapes import Float

log = logging.getLogger(__name__)

NEW_PROJECTOR = "new_projector.json"
"""This file of a composed base records its projector as it was drawn."""


@dataclass(frozen=True, kw_only=True)
class LoadedTower:
    """A tower with its weights and what LLaVA's config must say about it (the preparation included)."""

    model: PreTrainedModel
    layer: int
    select: Literal["default", "full"]
    tokens: int
    patch_size: int
    prefix_tokens: int
    preparation: Preparation


def load_tower(spec: TowerSpec) -> LoadedTower:
    """Loads a pretrained network as a `GridTower`, or as transformers' own class where LLaVA takes that directly."""
    loaders = {"timm": load_timm, "open_clip": load_open_clip, "transformers": load_transformers}
    if spec.weights_in_order and spec.library == "open_clip":
        raise UserError("vision_weights_in_order: open_clip reads its files itself, by name; leave it off")
    network, config = loaders[spec.library](spec)
    network.eval()
    measure(network, config)
    # LLaVA itself reads sequences only, and drops at most one class token.
    readable = config.layout == "NLC" and config.prefix_tokens <= 1 and spec.grid_pool is None
    tower = {"tokens": config.tokens, "patch_size": config.patch_size, "preparation": preparation_of(config)}
    if readable and isinstance(network, PreTrainedModel):
        select = "default" if config.prefix_tokens else "full"
        return LoadedTower(
            model=network, layer=config.layer, select=select, prefix_tokens=config.prefix_tokens, **tower
        )
    model = GridTower(config).eval()
    keep_all_buffers(network)
    model.network.load_state_dict(network.state_dict(), strict=True)
    return LoadedTower(model=model, layer=-1, select="full", prefix_tokens=0, **tower)


def preparation_of(config: GridTowerConfig) -> Preparation:
    """Returns the preparation that a tower expects."""
    return Preparation(
        image_size=config.image_size,
        mean=tuple(config.image_mean or ()),
        std=tuple(config.image_std or ()),
        interpolation=config.interpolation,
    )


def load_timm(spec: TowerSpec) -> tuple[nn.Module, GridTowerConfig]:
    """Loads a timm network without its classifier."""
    import timm

    published = timm.get_pretrained_cfg(spec.name, allow_unregistered=True)
    if published is None or not timm.is_model(spec.name.split(".")[0]):
        raise UserError(f"timm has no model {spec.name!r}; timm.list_models('*part of the name*') finds it")
    options: dict[str, Any] = {}
    if spec.image_size is not None and published.fixed_input_size:
        options["img_size"] = spec.image_size
    try:
        network: Any = timm.create_model(spec.name, pretrained=spec.weights == PRETRAINED, **options)
    except (OSError, RuntimeError) as error:
        raise UserError(f"timm could not load {spec.name!r}, weights {spec.weights!r}: {error}") from error
    load_from_file(network, spec)
    network.reset_classifier(0)
    preparation = Preparation(
        image_size=published.input_size[-1],
        mean=tuple(published.mean),
        std=tuple(published.std),
        interpolation=published.interpolation,
    )
    return network, draft_config(spec, architecture=spec.name, options=options, published=preparation)


def load_open_clip(spec: TowerSpec) -> tuple[nn.Module, GridTowerConfig]:
    """Loads an open_clip model's vision tower."""
    with needs_extra("towers", "a tower of open_clip"):
        import open_clip
        from open_clip.transformer import QuickGELU

    config = open_clip.get_model_config(spec.name)
    if config is None:
        raise UserError(f"open_clip has no model {spec.name!r}; open_clip.list_models() names them")
    tag = None if spec.weights == RANDOM else spec.weights
    try:
        model: Any = open_clip.create_model(
            spec.name, pretrained=tag, load_weights=tag is not None, force_image_size=spec.image_size
        )
    except (OSError, RuntimeError) as error:
        raise UserError(f"open_clip could not load {spec.name!r}, weights {spec.weights!r}: {error}") from error
    published = open_clip.get_model_preprocess_cfg(model)
    size = spec.image_size or config["vision_cfg"].get("image_size", 224)
    options = {
        "embed_dim": config["embed_dim"],
        # The tower is rebuilt from these options later, which must not download weights again.
        "vision_cfg": {**config["vision_cfg"], "image_size": size, "timm_model_pretrained": False},
        "quick_gelu": any(isinstance(module, QuickGELU) for module in model.visual.modules()),
    }
    preparation = Preparation(
        image_size=size,
        mean=tuple(published["mean"]),
        std=tuple(published["std"]),
        interpolation=published.get("interpolation", "bicubic"),
    )
    return model.visual, draft_config(spec, architecture=spec.name, options=options, published=preparation)


def load_transformers(spec: TowerSpec) -> tuple[nn.Module, GridTowerConfig]:
    """Loads a transformers vision model, out of a two-tower model where the folder holds one."""
    check_model_folder(spec.name)
    with opening(f"transformers could not load a vision model from {spec.name!r}"):
        config = AutoConfig.from_pretrained(spec.name, **NO_OWN_CODE)
        vision: PreTrainedConfig = config.vision_config if "vision_config" in config.sub_configs else config
        network_class: Any = MODEL_MAPPING[type(vision)]
        if spec.weights == PRETRAINED:
            network = load_pretrained(network_class, spec.name, config=vision)
        else:
            network = network_class(vision)
    load_from_file(network, spec)
    vision.name_or_path = network.config.name_or_path = ""  # a path of this machine, which no folder should carry
    options = {**vision.to_diff_dict(), "model_type": vision.model_type}
    return network, draft_config(
        spec, architecture=vision.model_type, options=options, published=transformers_preparation(spec, vision)
    )


def load_from_file(network: nn.Module, spec: TowerSpec) -> None:
    """Fills the network from the file that `weights` names, if any: each tensor once, by name or `weights_in_order`."""
    if spec.weights in {PRETRAINED, RANDOM}:
        return
    source, state, target = spec.weights, read_tensors(Path(spec.weights)), network.state_dict()
    if spec.weights_in_order:
        if len(state) != len(target):
            raise UserError(f"{source} holds {len(state)} tensors, the network {len(target)}: not the same order")
        state = dict(zip(target, state.values(), strict=True))
    try:
        network.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:  # it names what is missing, unexpected or has another shape
        raise UserError(
            f"{one_line(f'{source} does not fit: {error}', 400)}; where the tensors are in the same order under "
            "other names, set vision_weights_in_order"
        ) from error


def transformers_preparation(spec: TowerSpec, vision: PreTrainedConfig) -> Preparation:
    """Reads the folder's picture preparation; its size comes from the network's config."""
    size = spec.image_size or vision.to_dict().get("image_size")
    if size is None:
        raise UserError(f"{spec.name} states no image_size; set it (pixels along a side)")
    if spec.image_mean is not None and spec.image_std is not None:
        return Preparation(image_size=size, mean=spec.image_mean, std=spec.image_std)
    with opening(f"{spec.name} has no picture preprocessor; set image_mean and image_std"):
        processor: Any = AutoImageProcessor.from_pretrained(spec.name, backend="pil", **NO_OWN_CODE)
        return stated_preparation(processor.to_dict(), size)


def draft_config(
    spec: TowerSpec, *, architecture: str, options: dict[str, Any], published: Preparation
) -> GridTowerConfig:
    """Makes a tower config without what only a run of the network can tell (`measure`)."""
    default_layer = -2 if spec.library == "transformers" else -1  # -2 as in LLaVA-1.5
    return GridTowerConfig(
        library=spec.library,
        architecture=architecture,
        options=options,
        layer=default_layer if spec.layer is None else spec.layer,
        grid_pool=spec.grid_pool,
        image_size=spec.image_size or published.image_size,
        image_mean=list(spec.image_mean or published.mean),
        image_std=list(spec.image_std or published.std),
        interpolation=published.interpolation,
    )


@torch.no_grad()
def measure(network: nn.Module, config: GridTowerConfig) -> None:
    """Runs one empty picture and writes layout, grid side, prefix tokens and width into the config.

    A sequence's grid is the largest square in it; what is left over (class and register tokens) comes first.
    """
    blank = torch.zeros(1, 3, config.image_size, config.image_size)
    try:
        raw = network_output(network, config, blank)
    except (IndexError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"{config.architecture}: layer {config.layer} of a {config.image_size} px picture failed: {error}"
        ) from error
    shape = tuple(raw.shape)
    if len(shape) == 3:
        config.layout, config.grid_side, config.hidden_size = "NLC", math.isqrt(shape[1]), shape[2]
        config.prefix_tokens = shape[1] - config.grid_side**2
    elif len(shape) == 4 and shape[2] == shape[3]:  # a square picture's grid has two equal sides
        config.layout, config.grid_side, config.hidden_size = "NCHW", shape[2], shape[1]
    elif len(shape) == 4 and shape[1] == shape[2]:
        config.layout, config.grid_side, config.hidden_size = "NHWC", shape[2], shape[3]
    else:
        raise UserError(f"{config.architecture} gives {shape}; a square grid or a sequence is needed")


def compose_llava(spec: ComposeSpec, folder: Path | str) -> None:
    """Writes a folder: weights, config, tokenizer and picture preparation.

    Tensors have the names of published LLaVAs. Plain transformers opens it too; where the tower is a `GridTower`, after
    `import dora_vl`. The folder appears under its name only when it is whole.
    """
    with written_base(Path(folder), spec) as unfinished:
        language = with_image_token(_language(spec))
        tower = load_tower(spec.tower())
        model = join(tower, language, seed=spec.projector_seed)
        if spec.standardise is not None:
            standardise(model.model.multi_modal_projector.linear_1, *measured(Path(spec.standardise)))
        save_under_hub_names(model)
        model.save_pretrained(unfinished)
        processor(tower, language).save_pretrained(unfinished)
        write_json(unfinished / NEW_PROJECTOR, {"sha256": _projector_digest(unfinished)})
    named = spec.language_model or "a small Llama"
    log.info("composed %s: %s + %s, %d tokens per picture", folder, spec.vision_name, named, tower.tokens)


def has_new_projector(folder: Path) -> bool:
    """Tells whether a base was composed here and its projector is still as it was drawn; a merge may change it."""
    digest = json_or_nothing(folder / NEW_PROJECTOR).get("sha256")
    return digest is not None and digest == _projector_digest(folder)


def _projector_digest(folder: Path) -> str:
    numbers: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                _, projector, leaf = key.rpartition("multi_modal_projector.")
                if projector:
                    numbers[leaf] = file.get_tensor(key).float().numpy().tobytes()
    digest = hashlib.sha256(b"".join(numbers[leaf] for leaf in sorted(numbers)))
    return digest.hexdigest()


def _language(spec: ComposeSpec) -> LanguageModel:
    dtype = getattr(torch, spec.dtype) if spec.dtype else None
    if spec.small is not None and spec.language_model is None:
        return small_llama(spec.small, seed=spec.projector_seed, dtype=dtype or torch.float32)
    if spec.small is not None or spec.language_model is None:
        raise SettingError("model.compose", ": give language_model or small, one of the two")
    return read_language_model(spec.language_model, gguf_file=spec.gguf_file, dtype=dtype)


def join(tower: LoadedTower, language: LanguageModel, *, seed: int) -> LlavaForConditionalGeneration:
    """Joins the two parts and a fresh projector to one model, with as few copies as possible."""
    register_towers()
    config = LlavaConfig(
        vision_config=tower.model.config,
        text_config=language.config,
        image_token_index=add_image_token(language.tokenizer),
        image_seq_length=tower.tokens,
        vision_feature_layer=tower.layer,
        vision_feature_select_strategy=tower.select,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    weights = {f"model.vision_tower.{name}": value for name, value in tower.model.state_dict().items()}
    projector = model.model.multi_modal_projector
    with torch.random.fork_rng(devices=[]):  # torch's own initial weights of two linears, from only this seed
        torch.manual_seed(seed)
        for name, layer in (("linear_1", projector.linear_1), ("linear_2", projector.linear_2)):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            for leaf, value in linear.state_dict().items():
                weights[f"model.multi_modal_projector.{name}.{leaf}"] = value.detach()
    for name, value in language.weights.items():
        weights["model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name] = value
    dtype = next(iter(language.weights.values())).dtype
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    filled(model, weights, language)
    return model


def processor(tower: LoadedTower, language: LanguageModel) -> LlavaProcessor:
    """Makes the folder's processor in transformers' own class, so that the folder serves without dora_vl as well."""
    side = tower.preparation.image_size // tower.patch_size
    if side**2 != tower.tokens:
        log.warning(
            "transformers' processor will count %d tokens per picture instead of %d, because no whole number of pixels "
            "makes this grid; dora_vl is not affected, other tools need a grid_pool that divides the picture",
            side**2,
            tower.tokens,
        )
    return LlavaProcessor(
        image_processor=image_processor(tower.preparation, aspect="pad"),
        tokenizer=language.tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=tower.select,
        num_additional_image_tokens=tower.prefix_tokens,
        chat_template=language.tokenizer.chat_template,
    )


def write_language_model(source: LanguageSource, folder: Path) -> None:
    """Writes a plain Hugging Face folder, with its tokenizer; it appears under its name only when it is whole."""
    with written_base(folder, source) as unfinished:
        dtype = getattr(torch, source.dtype) if source.dtype else None
        language = read_language_model(source.folder, gguf_file=source.gguf_file, dtype=dtype)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(language.config)
        filled(model, dict(language.weights), language)
        model.save_pretrained(unfinished)
        language.tokenizer.save_pretrained(unfinished)
    log.info("wrote %s from %s", folder, source.gguf_file or source.folder)


def measured(folder: Path) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Measures mean and spread of each number of a token, over the tokens of the folder's first files."""
    source = open_features(folder)
    tokens = torch.cat([source.read(name).double() for name in islice(source.places, 2000)])
    spread = tokens.std(dim=0, correction=0)
    least = 0.1 * float(tokens.std(correction=0))  # what hardly varies is not blown up into noise
    return tokens.mean(dim=0).float(), spread.clamp_min(least).float()


@torch.no_grad()
def standardise(linear: nn.Linear, mean: Float[Tensor, " channels"], spread: Float[Tensor, " channels"]) -> None:
    """Changes a layer so that it does with raw values what it did with standardised ones."""
    linear.weight.div_(spread)
    linear.bias.sub_(linear.weight @ mean)


def small_llama(spec: SmallLanguageModel, *, seed: int, dtype: torch.dtype) -> LanguageModel:
    """Makes a Llama with random weights; its texts begin with `<s>` as Llama's do."""
    tokenizer = small_tokenizer(texts_of(spec), vocabulary=spec.vocabulary, form="<s> $A")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=spec.feedforward,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_positions,
        initializer_range=spec.init_std,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = LlamaForCausalLM(config).state_dict()
    weights = {name: value.to(dtype) for name, value in drawn.items() if name != "lm_head.weight"}  # the embedding's
    return LanguageModel(config=config, weights=weights, generation=None, tokenizer=tokenizer)


def small_tokenizer(
    texts: Iterator[str], *, vocabulary: int, leading_space: bool = False, form: str = "<s> $A </s>"
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on texts, with BART's special tokens at BART's ids; no text is unknown to it.

    Args:
        leading_space: a text begins with a space, so that an answer's first word is the token that it is inside a
            question; BART's own does not.
        form: a text and the special tokens around it.
    """
    named = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    special = list(named.values())
    bpe = ByteLevelBPETokenizer(add_prefix_space=leading_space)
    bpe.train_from_iterator(texts, vocabulary, min_frequency=0, show_progress=False, special_tokens=special)
    backend = Tokenizer.from_str(bpe.to_str())
    ends = [(token, special.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in named.items()}
    )


def texts_of(spec: SmallLanguageModel) -> Iterator[str]:
    """Yields all words of the files a vocabulary is made from, and its further texts."""
    for path in map(Path, spec.texts):
        check = FileCheck(path, answers_needed=False)
        for example in map(check.read, find_files(path).rows()):
            if isinstance(example, BadSample):
                raise UserError(f"{path}: {example}")
            turns = (turn.text.replace(IMAGE_PLACEHOLDER, "").strip() for turn in example.turns)
            yield from filter(None, (example.question, *turns, *example.choices))
            yield from (part.text for part in (*example.answers, *example.subtitles))
    yield from spec.words
