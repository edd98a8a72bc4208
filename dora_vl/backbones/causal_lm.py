"""Any causal language model of transformers, with logits only where a label or a decode step needs them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from dora_vl.adapters.quantised_base import Quantisation
from dora_vl.backbones.base import (
    Attention,
    Backbone,
    Features,
    labelled_positions,
    layout_attention,
    new_tokens,
    output_layer_sees,
)
from dora_vl.backbones.loading import LanguageSource as LanguageSource
from dora_vl.backbones.loading import PlainLanguageModel, quantised_loading, read_language_model, written_base
from dora_vl.errors import UserError
from dora_vl.files import NO_OWN_CODE, check_model_folder, opening

log = logging.getLogger(__name__)

LAYERS = "model.layers.*"
PAPER_TARGETS = (
    f"{LAYERS}.self_attn.q_proj",
    f"{LAYERS}.self_attn.k_proj",
    f"{LAYERS}.self_attn.v_proj",
    f"{LAYERS}.mlp.up_proj",
    f"{LAYERS}.mlp.down_proj",
)
"""The five of the paper's commonsense runs (table 8), in the names of LLaMA 1, 2, 3 and everything built like it."""


class CausalLMBackbone(Backbone[PreTrainedModel]):
    """Runs a causal language model from token ids to the positions that predict a label.

    Args:
        model: transformers' own, for example a `LlamaForCausalLM`.
        generation: options of transformers' `generate` that every answer of this run uses, such as `num_beams`.
    """

    def __init__(self, model: PreTrainedModel, *, generation: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.generation = dict(generation or {})
        self.train(model.training)

    @property
    def config(self) -> Any:
        """The model's config; transformers' Trainer and DeepSpeed read sizes from it."""
        return self.model.config

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"] | None = None,
        layout: Int[Tensor, "batch 3 seq"] | None = None,
    ) -> Features:
        """Hidden states and logits at the positions that predict a label.

        `labels[b, t]` is the token at `t`, or -100; the shift by one happens here. `layout` says what each token
        sees where rows hold several samples (`data.collate`).
        """
        rows, places, targets = labelled_positions(labels, attention_mask)
        embeds = self.model.get_input_embeddings()(input_ids)
        if self.training and torch.is_grad_enabled() and not embeds.requires_grad:
            # Reentrant checkpointing sees nothing to differentiate otherwise. Asked or not: it costs one layer's share.
            embeds = embeds.detach().requires_grad_()
        mask, positions = self._attention(attention_mask, layout)
        with output_layer_sees(self.model, rows, places) as seen:
            logits = self.model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        return Features(seen[0], logits.squeeze(0), targets, rows)

    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        *,
        max_new_tokens: int = 32,
        streamer: BaseStreamer | None = None,
        options: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> Int[Tensor, "batch new"]:
        """New token ids of left-padded prompts, greedy unless options or the run's `generation` say otherwise.

        They are those of `options` and those given by name.
        """
        return new_tokens(
            self.model,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            options={**self.generation, **(options or {}), **named},
        )

    def _attention(self, attention_mask: Tensor, layout: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Mask and positions; padding on the right needs no mask, since attention is causal."""
        if layout is not None:
            window = getattr(self.config, "sliding_window", None)
            if window is not None and layout.shape[2] > window:
                raise UserError(
                    f"rows of {layout.shape[2]} tokens hold several samples, but this model sees {window} tokens back "
                    "in some layers, which such rows' mask does not say; set data.packing: false"
                )
            kernel = str(self.config._attn_implementation)
            return layout_attention(layout, kernel=kernel, dtype=self.model.dtype), layout[:, 0]
        if bool(attention_mask[:, 0].all()):
            return None, None
        return attention_mask, (attention_mask.cumsum(1) - 1).clamp_min(0)


def load_causal_lm(
    folder_or_id: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: Attention = None,
    revision: str | None = None,
    quantisation: Quantisation | None = None,
    generation: Mapping[str, Any] | None = None,
) -> CausalLMBackbone:
    """A causal language model's folder or hub id, every weight in `dtype`, in eval mode.

    With `quantisation` the linear layers below its head are quantised.

    Raises: UserError if it is none, some of its weights are missing, or it cannot be quantised.
    """
    check_model_folder(folder_or_id)
    with opening(f"model.base {folder_or_id!r} cannot be opened as a causal language model"):
        quantised = quantised_loading(folder_or_id, quantisation, dtype=dtype, revision=revision)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder_or_id,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision or "main",
            output_loading_info=True,
            **NO_OWN_CODE,
            **quantised.options,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder_or_id}: {len(missing)} weights are missing, first {missing[:3]}; the folder is broken"
        )
    quantised.finish(model)
    return CausalLMBackbone(model, generation=generation)


def write_causal_lm(source: LanguageSource, folder: Path) -> None:
    """Writes a plain Hugging Face folder, with its tokenizer; it appears under its name only when it is whole.

    Raises: UserError if the folder exists, or the source cannot be read.
    """
    with written_base(folder, source) as unfinished:
        dtype = getattr(torch, source.dtype) if source.dtype else None
        language = read_language_model(source.folder, gguf_file=source.gguf_file, dtype=dtype)
        _whole(language).save_pretrained(unfinished)
        language.tokenizer.save_pretrained(unfinished)
    log.info("wrote %s from %s", folder, source.gguf_file or source.folder)


def _whole(language: PlainLanguageModel) -> PreTrainedModel:
    """The parts as one model, nothing copied."""
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
    return model
