"""Bases that a run writes: a LLaVA of any vision tower and any language model, or a language model by itself."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava.processing_llava import LlavaProcessor

from dora_vl.adapters.base_weights import save_under_hub_names
from dora_vl.backbones.loading import ComposeSpec as ComposeSpec
from dora_vl.backbones.loading import (
    LanguageModel,
    LanguageSource,
    load_language_model,
    read_language_model,
    written_base,
)
from dora_vl.backbones.tower_pictures import image_processor
from dora_vl.backbones.tower_sources import LoadedTower, load_tower
from dora_vl.backbones.towers import register_towers

log = logging.getLogger(__name__)


def compose_llava(spec: ComposeSpec, folder: Path | str) -> None:
    """Writes a folder: weights, config, tokenizer and picture preparation.

    Tensors have the names of published LLaVAs. Plain transformers opens it too; where the tower is a `GridTower`, after
    `import dora_vl`. The folder appears under its name only when it is whole.
    """
    with written_base(Path(folder), spec) as unfinished:
        register_towers()
        tower = load_tower(spec.tower())
        dtype = getattr(torch, spec.dtype) if spec.dtype else None
        language = load_language_model(spec.language_model, gguf_file=spec.gguf_file, dtype=dtype)
        model = join(tower, language, seed=spec.projector_seed)
        save_under_hub_names(model)
        model.save_pretrained(unfinished)
        processor(tower, language).save_pretrained(unfinished)
    log.info("composed %s: %s + %s, %d tokens a picture", folder, spec.vision_name, spec.language_model, tower.tokens)


def join(tower: LoadedTower, language: LanguageModel, *, seed: int) -> LlavaForConditionalGeneration:
    """The two parts and a fresh projector as one model, nothing copied that need not be."""
    config = LlavaConfig(
        vision_config=tower.model.config,
        text_config=language.config,
        image_token_index=language.image_token_id,
        image_seq_length=tower.tokens,
        vision_feature_layer=tower.layer,
        vision_feature_select_strategy=tower.select,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    dtype = next(iter(language.weights.values())).dtype
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    weights = {f"model.vision_tower.{name}": value for name, value in tower.model.state_dict().items()}
    weights |= {f"model.multi_modal_projector.{name}": value for name, value in fresh_projector(model, seed).items()}
    for name, value in language.weights.items():
        weights["model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name] = value
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    if language.generation is not None:
        model.generation_config = language.generation
    return model


def fresh_projector(model: LlavaForConditionalGeneration, seed: int) -> dict[str, Tensor]:
    """`mlp2x_gelu` as LLaVA begins it: torch's own initial weights of two linears, from this seed alone."""
    meta = model.model.multi_modal_projector
    state: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in (("linear_1", meta.linear_1), ("linear_2", meta.linear_2)):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            state |= {f"{name}.{leaf}": value.detach() for leaf, value in linear.state_dict().items()}
    return state


def processor(tower: LoadedTower, language: LanguageModel) -> LlavaProcessor:
    """transformers' own processor of the folder, so that the folder serves without dora_vl as well."""
    side = tower.preparation.image_size // tower.patch_size
    if side**2 != tower.tokens:
        log.warning(
            "transformers' processor will count %d tokens a picture instead of %d, because no whole number of pixels "
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
        weights = dict(language.weights)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(language.config)
        if language.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights, strict=True, assign=True)
        model.tie_weights()
        model.config.dtype = next(iter(weights.values())).dtype
        if language.generation is not None:
            model.generation_config = language.generation
        model.save_pretrained(unfinished)
        language.tokenizer.save_pretrained(unfinished)
    log.info("wrote %s from %s", folder, source.gguf_file or source.folder)
