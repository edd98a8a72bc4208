"""Builds the parts of a LLaVA run from its sections: model, adapter, encoder, data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.models.llava.configuration_llava import LlavaConfig

from dora_vl.adapters.provenance import content_hash, local_folder, versions
from dora_vl.backbones.base import max_positions
from dora_vl.backbones.chat_template import get_template
from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.image_text_encode import ImageTextEncoder, load_processor
from dora_vl.backbones.instruction_prompt import InstructionEncoder
from dora_vl.backbones.language_source import load_tokenizer
from dora_vl.backbones.llava import ALSO_TRAIN, DORA_TARGETS, LlavaBackbone, load_llava
from dora_vl.core import DoRAConfig
from dora_vl.data.sampler import ModalityLengthSampler, SamplingLengths
from dora_vl.errors import UserError
from dora_vl.run.adapting import core_config, load_base
from dora_vl.run.arguments import order_seed
from dora_vl.run.recipe import AdapterConfig, LoadedModelConfig, ModelConfig, RunConfig


def load_backbone(model: ModelConfig, *, cached_features: bool) -> LlavaBackbone:
    """The base, with pictures put in as pixels or as the tower's stored output."""
    return load_base(load_llava, model, picture_source="image_features" if cached_features else "pixel_values")


def dora_config(adapter: AdapterConfig, model: PreTrainedModel) -> DoRAConfig:
    """The core's config of a run's adapter section, with LLaVA's own targets and projector.

    Raises:
        UserError: full training without saying of what.
    """
    if adapter.method == "full" and adapter.targets is None:
        raise UserError(
            "adapter.method: full needs adapter.targets, the modules whose weights train, such as "
            '["model.language_model*", "lm_head", "model.multi_modal_projector*"]'
        )
    trains_projector = adapter.train_projector and adapter.method != "full"
    return core_config(adapter, model, targets=DORA_TARGETS, also_train=ALSO_TRAIN if trains_projector else {})


def build_encoder(model: ModelConfig, backbone: LlavaBackbone, *, max_tokens: int) -> LlavaEncoder:
    """Tokens and labels for this base and template; what the model has no positions for is cut as by `max_tokens`."""
    return encoder_of(model, backbone.config, max_tokens=max_tokens)


def encoder_of(model: ModelConfig, config: LlavaConfig, *, max_tokens: int) -> LlavaEncoder:
    """The same by the base's config alone, before its weights are read.

    Raises:
        UserError: the template does not fit the tokenizer.
    """
    tokenizer = load_tokenizer(model.base, revision=model.revision)
    return LlavaEncoder(
        tokenizer,
        get_template(model.template, tokenizer),
        tokens_per_image=config.image_seq_length,
        image_token_id=config.image_token_id,
        max_tokens=min(max_tokens, max_positions(config) or max_tokens),
    )


def pad_token_id(encoder: LlavaEncoder | InstructionEncoder) -> int:
    """What fills short rows; masked, so any id does where the tokenizer names none."""
    tokenizer: Any = encoder.tokenizer
    return int(next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None))


def build_sampler(
    lengths: SamplingLengths, arguments: TrainingArguments, *, share_pictures: bool
) -> ModalityLengthSampler:
    """LLaVA's grouping by modality and length for this run's global batch, or by modality and picture."""
    return ModalityLengthSampler(
        lengths.lengths,
        lengths.is_multimodal,
        pictures=lengths.pictures if share_pictures else None,
        batch_size=arguments.per_device_train_batch_size,
        world_size=arguments.world_size,
        accumulation=arguments.gradient_accumulation_steps,
        seed=order_seed(arguments),
    )


def recipe_record(config: RunConfig, task: str) -> dict[str, Any]:
    """What `adapter/recipe.json` says beside the adapter's own settings: enough to ask the model again."""
    model = config.model
    return {
        **base_record(model, task, max_tokens=config.data.max_tokens, training=config.training),
        "compose": None if model.compose is None else dataclasses.asdict(model.compose),
        "image_aspect": model.image_aspect,
        "as_published": config.data.as_published,
    }


def base_record(model: LoadedModelConfig, task: str, *, max_tokens: int, training: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `recipe_record` that every decoder's run has: the base, its length and number types, the training."""
    return {
        "task": task,
        "base": model.base,
        "revision": model.revision,
        "base_sha256": content_hash(local_folder(model.base, model.revision)),
        "dtype": model.dtype,
        "quantisation": model.quantisation,
        "max_tokens": max_tokens,
        "training": dict(training),
        "versions": versions(),
    }


def processor_encoder(model: ModelConfig, *, max_tokens: int) -> ImageTextEncoder:
    """The encoder over the base's own processor, or a language model's tokenizer."""
    processor = load_processor(model.base, model.revision)
    return ImageTextEncoder(processor, model.base, max_tokens=max_tokens, template=model.template)
