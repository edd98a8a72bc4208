"""Opens a model of any kind, ready to be asked; what a kind needs is imported for it alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import logging as transformers_logging

from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.shared_copy import replaced_by, shared_tensors
from dora_vl.backbones.base import Backbone
from dora_vl.core.strength import whole_model_between
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import Opened, Wanted
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.model_source import ModelSource, find_source
from dora_vl.evaluation.prompt_inputs import Prompts
from dora_vl.run.adapting import CAUSAL_LM, IMAGE_TEXT, LLAVA, VLBART, load_base
from dora_vl.run.recipe import ModelConfig

AnyBackbone = TypeVar("AnyBackbone", bound=Backbone[Any])
LONGEST_ANSWERED = 1 << 20
"""Tokens of a prompt with an answer behind it, where no run said how many: none is cut."""


def open_asker(wanted: Wanted) -> Opened:
    """The model that is wanted, on the GPU where there is one.

    Raises:
        UserError: as `find_source`; or its weights, processor or tokenizer cannot be used.
    """
    return open_source(find_source(wanted))


def open_source(source: ModelSource) -> Opened:
    """The model of a source, quietly; see `open_asker`."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if source.kind == VLBART:
        from dora_vl.evaluation.vlbart_assistant import open_vlbart

        return open_vlbart(source)
    parts = decoder_parts(source)
    return _opened(source, parts.load(), parts.prompts)


@dataclass(frozen=True)
class DecoderParts:
    """How a decoder of a source is opened; what may be refused before its weights are read was refused.

    Attributes:
        load: reads the weights.
        prompts: what makes the inputs of a backbone that was loaded so.
    """

    load: Callable[[], Backbone[Any]]
    prompts: Callable[[Any], Prompts]


def decoder_parts(source: ModelSource) -> DecoderParts:
    """How the decoder of a source is opened.

    Raises:
        UserError: it is no decoder, or its processor or tokenizer cannot be used.
    """
    if source.kind not in DECODERS:
        raise UserError(f"{source.place} is a {source.kind}, which answers no chat; there are {', '.join(DECODERS)}")
    return DECODERS[source.kind](source)


def _llava_parts(source: ModelSource) -> DecoderParts:
    from dora_vl.backbones.chat_template import get_template
    from dora_vl.backbones.language_source import load_tokenizer
    from dora_vl.evaluation.prompt_inputs import LlavaPrompts
    from dora_vl.run.assembly import build_encoder, load_backbone
    from dora_vl.run.samples import image_preparation

    model = _model_config(source)
    get_template(model.template, load_tokenizer(source.place, revision=source.revision))  # refused before the weights
    preparation = image_preparation(model)

    def prompts(backbone: Any) -> Prompts:
        return LlavaPrompts(build_encoder(model, backbone, max_tokens=_max_tokens(source)), preparation)

    return DecoderParts(lambda: load_backbone(model, cached_features=False), prompts)


def _image_text_parts(source: ModelSource) -> DecoderParts:
    from dora_vl.backbones.image_text import load_image_text
    from dora_vl.evaluation.prompt_inputs import ImageTextPrompts
    from dora_vl.run.assembly import processor_encoder

    model = _model_config(source)
    encoder = processor_encoder(model, max_tokens=_max_tokens(source))  # before the weights: it may refuse
    return DecoderParts(lambda: load_base(load_image_text, model), lambda _: ImageTextPrompts(encoder))


def _causal_lm_parts(source: ModelSource) -> DecoderParts:
    from dora_vl.backbones.causal_lm import load_causal_lm

    prompts = _language_prompts(source)
    return DecoderParts(lambda: load_base(load_causal_lm, _model_config(source)), lambda _: prompts)


def _language_prompts(source: ModelSource) -> Prompts:
    """A run's instruction prompt, or a chat by a template."""
    from dora_vl.backbones.chat_template import get_template
    from dora_vl.backbones.encode import LlavaEncoder
    from dora_vl.backbones.instruction_prompt import InstructionEncoder
    from dora_vl.backbones.language_source import load_tokenizer
    from dora_vl.evaluation.prompt_inputs import ChatPrompts, InstructionPrompts

    tokenizer, most = load_tokenizer(source.place, revision=source.revision), _max_tokens(source)
    if source.recipe:
        prompt, train_on = source.recipe["prompt"], source.recipe["train_on"]
        return InstructionPrompts(InstructionEncoder(tokenizer, prompt=prompt, train_on=train_on, max_tokens=most))
    template = get_template(source.wanted.template or "tokenizer", tokenizer)
    return ChatPrompts(LlavaEncoder(tokenizer, template, tokens_per_image=0, image_token_id=-1, max_tokens=most))


DECODERS: Mapping[str, Callable[[ModelSource], DecoderParts]] = {
    LLAVA: _llava_parts,
    IMAGE_TEXT: _image_text_parts,
    CAUSAL_LM: _causal_lm_parts,
}


def _model_config(source: ModelSource) -> ModelConfig:
    template: Any = source.recipe.get("template") or source.wanted.template or ModelConfig.template
    dtype: Any = source.dtype
    attention: Any = source.attention
    return ModelConfig(
        base=source.place,
        revision=source.revision,
        template=template,
        image_aspect=source.recipe.get("image_aspect") or "pad",
        dtype=dtype,
        attn_implementation=attention,
        quantisation=source.recipe.get("quantisation"),
    )


def _max_tokens(source: ModelSource) -> int:
    return int(source.recipe.get("max_tokens", LONGEST_ANSWERED))


def _opened(source: ModelSource, backbone: Backbone[Any], prompts: Callable[[Any], Prompts]) -> Opened:
    wanted = source.wanted
    adapted, plain = with_adapter(backbone, wanted.adapter, with_base=wanted.with_base, strength=wanted.strength)
    said = prompts(adapted)
    return Opened(
        adapted=Assistant(adapted, said),
        base=None if plain is None else Assistant(plain, said),
    )


def with_adapter(
    backbone: AnyBackbone, adapter: Path | None, *, with_base: bool = False, strength: float = 1.0
) -> tuple[AnyBackbone, AnyBackbone | None]:
    """The backbone with the adapter loaded, and one without it where that is asked for, ready to answer.

    Args:
        strength: how much of the adapter is applied; at 0 the two are one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if adapter is None:
        return backbone.to(device).eval(), None
    needs_base = with_base or strength != 1
    plain = without_adapter(backbone, adapter).to(device).eval() if needs_base else None
    load_adapter(backbone.model, adapter, change_base=not needs_base)  # the two share the frozen weights
    adapted = backbone.to(device).eval()
    if plain is not None and strength == 0:
        adapted = plain
    elif plain is not None and strength != 1:
        whole_model_between(plain.model, adapted.model, strength)
    return adapted, plain if with_base else None


def without_adapter(backbone: AnyBackbone, adapter: Path) -> AnyBackbone:
    """A second backbone that shares every weight but those the adapter folder replaces (such as the projector).

    Call it before the adapter is loaded.
    """
    return copy.deepcopy(backbone, shared_tensors(backbone.model, replaced_by(adapter)))
