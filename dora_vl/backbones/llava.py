"""LLaVA: a vision tower, a projector and a language model, run so that training pays for nothing it does not use.

The model is transformers' own `LlavaForConditionalGeneration`, whether downloaded or composed by `compose.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation.streamers import BaseStreamer
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.adapters.quantised_base import Quantisation
from dora_vl.backbones.base import Attention, Backbone, Features, labelled_positions, layout_attention, pad_token_id
from dora_vl.backbones.families import LLAVA
from dora_vl.backbones.generation import ScoreWatch
from dora_vl.backbones.loading import quantised_loading
from dora_vl.backbones.towers import register_towers
from dora_vl.errors import UserError
from dora_vl.files import check_model_folder, opening

LANGUAGE_LAYERS = "model.language_model.layers.*"
DORA_TARGETS = (
    f"{LANGUAGE_LAYERS}.self_attn.q_proj",
    f"{LANGUAGE_LAYERS}.self_attn.k_proj",
    f"{LANGUAGE_LAYERS}.self_attn.v_proj",
    f"{LANGUAGE_LAYERS}.self_attn.o_proj",
    f"{LANGUAGE_LAYERS}.mlp.gate_proj",
    f"{LANGUAGE_LAYERS}.mlp.up_proj",
    f"{LANGUAGE_LAYERS}.mlp.down_proj",
)
"""Full-name globs of every linear of the language model; never `lm_head`, never the vision tower."""
ALSO_TRAIN = {"projector": ("model.multi_modal_projector.*",)}
"""What trains beside the adapters."""

PictureSource = Literal["pixel_values", "image_features"]


class LlavaBackbone(Backbone[LlavaForConditionalGeneration]):
    """Runs a LLaVA from token ids and pictures to the positions that predict a label.

    `picture_source` says what batches of this run bring. A micro-batch without pictures then takes the same
    modules over a dummy picture, whose result is multiplied by zero: ranks stay in step under ZeRO-3, and the
    projector's gradients are zeros instead of missing.
    """

    def __init__(self, model: LlavaForConditionalGeneration, *, picture_source: PictureSource = "pixel_values") -> None:
        super().__init__()
        self.model = model
        self.picture_source: PictureSource = picture_source
        self.train(model.training)

    @property
    def config(self) -> LlavaConfig:
        """The model's config; transformers' Trainer and DeepSpeed read sizes from it."""
        return self.model.config

    @property
    def tokens_per_image(self) -> int:
        """Picture tokens that one picture needs in the text."""
        return self.config.image_seq_length

    @property
    def tower_trains(self) -> bool:
        """Whether any weight of the vision tower gets a gradient."""
        return any(weight.requires_grad for weight in self.tower.parameters())

    def train(self, mode: bool = True) -> LlavaBackbone:
        """Sets the mode; a frozen tower stays in eval, so that its features never change."""
        super().train(mode)
        if not self.tower_trains:
            self.tower.eval()
        return self

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.model.model.vision_tower

    @property
    def tower_settings(self) -> dict[str, object]:
        """What decides, beside its weights and the preparation, which features the tower gives."""
        return {
            "layer": self.config.vision_feature_layer,
            "select": self.config.vision_feature_select_strategy,
            "vision_config": self.vision_config().to_diff_dict(),
        }

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Tokens and width of one picture's features, before the projector."""
        return self.tokens_per_image, self.model.model.multi_modal_projector.linear_1.in_features

    @property
    def feature_dtype(self) -> torch.dtype:
        """The dtype that features are computed, and stored, in."""
        return self.model.dtype

    @torch.no_grad()
    def picture_features(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images tokens channels"]:
        """The tower's output before the projector, without gradients: what a feature store keeps."""
        return self._tower(pixel_values)

    def embed(
        self,
        input_ids: Int[Tensor, "batch seq"],
        *,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images tokens channels"] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Token embeddings with the projected pictures at the picture tokens, in order.

        Raises: UserError if the picture tokens are not as many as the features, also where there are only the ones or
            only the others.
        """
        embeds = self.model.model.language_model.embed_tokens(input_ids)
        if pixel_values is not None:
            image_features = self._features(pixel_values)
        places = (input_ids.flatten() == self.config.image_token_id).nonzero().squeeze(1)
        pictures, tokens = (0, self.tokens_per_image) if image_features is None else image_features.shape[:2]
        if len(places) != pictures * tokens:
            raise UserError(
                f"{len(places)} picture tokens in the batch, but {pictures} pictures of {tokens} features each; encode "
                "with the model's tokens_per_image and one <image> a picture, and give all pixels or features"
            )
        if image_features is None:
            return embeds
        projected = self.model.model.multi_modal_projector(image_features.to(self.model.dtype))
        flat = embeds.flatten(0, 1).index_copy(0, places, projected.flatten(0, 1).to(embeds.dtype))
        return flat.view_as(embeds)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"] | None = None,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images tokens channels"] | None = None,
        layout: Int[Tensor, "batch 3 seq"] | None = None,
    ) -> Features:
        """Hidden states and logits at the positions that predict a label.

        `labels[b, t]` is the token at `t`, or -100; the shift by one happens here. `layout` says what each token
        sees where rows hold several samples (`data.collate`).
        """
        embeds = self.embed(input_ids, pixel_values=pixel_values, image_features=image_features)
        if pixel_values is None and image_features is None:
            embeds = embeds + self._nothing()
        hidden = self._language(embeds, attention_mask, layout)
        rows, places, targets = labelled_positions(labels, attention_mask)
        chosen = hidden[rows, places]
        return Features(chosen, self.model.lm_head(chosen), targets, rows)

    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        *,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images tokens channels"] | None = None,
        max_new_tokens: int = 128,
        streamer: BaseStreamer | None = None,
        options: Mapping[str, Any] | None = None,
        **named: Any,
    ) -> Int[Tensor, "batch new"]:
        """New token ids of left-padded prompts, greedy unless options of transformers' generate say otherwise.

        They are those of `options` and those given by name. Ids of a row whose scores are no numbers are `NO_TOKEN`.
        """
        with torch.no_grad():
            embeds = self.embed(input_ids, pixel_values=pixel_values, image_features=image_features)
            model: Any = self.model  # generate is typed for a protocol that pyright cannot match to the class
            watch, chosen = ScoreWatch(self.model), {"do_sample": False, "pad_token_id": pad_token_id(self.model)}
            new = model.generate(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                **{**chosen, **watch.options, **(options or {}), **named},
            )
            return watch.marked(new)

    def _features(self, pixel_values: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.tower_trains and torch.is_grad_enabled()):
            return self._tower(pixel_values)

    def _tower(self, pixel_values: Tensor) -> Tensor:
        """The hidden states that the config chooses, as transformers' `get_image_features` does before projecting."""
        chosen_layers = self.config.vision_feature_layer
        # transformers >= 5.24 keeps only the layers asked for; before, anything true keeps all.
        states = self.tower(
            pixel_values.to(self.model.device, self.model.dtype),
            return_dict=True,
            output_hidden_states=chosen_layers or True,
        ).hidden_states
        layers = [chosen_layers] if isinstance(chosen_layers, int) else chosen_layers
        chosen = [states[layer] for layer in layers]
        if self.config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def vision_config(self) -> PreTrainedConfig:
        """The tower's part of the config."""
        vision = self.config.vision_config
        if not isinstance(vision, PreTrainedConfig):
            raise TypeError(f"the model's vision_config is a {type(vision).__name__}")
        return vision

    def _nothing(self) -> Tensor:
        """A zero that has gone through the modules a picture would have gone through."""
        model = self.model
        if self.picture_source == "pixel_values":
            side = picture_side(self.config)
            features = self._features(torch.zeros(1, 3, side, side))
        else:
            features = torch.zeros(1, 1, self.feature_shape[1], device=model.device, dtype=model.dtype)
        return model.model.multi_modal_projector(features).sum() * 0

    def _language(self, embeds: Tensor, attention_mask: Tensor, layout: Tensor | None) -> Tensor:
        """Last hidden states; padding on the right needs no mask, since attention is causal."""
        positions = None
        mask: Tensor | None = None
        if layout is not None:
            kernel = str(self.model.model.language_model.config._attn_implementation)
            mask = layout_attention(layout, kernel=kernel, dtype=self.model.dtype)
            positions = layout[:, 0]
        elif not bool(attention_mask[:, 0].all()):
            mask = attention_mask
            positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
        if self.training and torch.is_grad_enabled() and not embeds.requires_grad:
            # Reentrant checkpointing sees nothing to differentiate otherwise. Asked or not: it costs one layer's share.
            embeds = embeds.detach().requires_grad_()
        return self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state


def _opening(folder: str) -> AbstractContextManager[None]:
    return opening(f"model.base {folder!r} cannot be opened as a LLaVA")


def llava_config(folder_or_id: str, *, revision: str | None = None) -> LlavaConfig:
    """The config of a LLaVA's folder or hub id.

    Raises: UserError if it cannot be opened, or its picture token is none of its tokens.
    """
    register_towers()
    check_model_folder(folder_or_id)
    with _opening(folder_or_id):
        config = LlavaConfig.from_pretrained(folder_or_id, revision=revision or "main")
    token, tokens = config.image_token_id, config.get_text_config().vocab_size
    if not 0 <= token < tokens:  # LLaVA's own code writes -200
        raise UserError(f"{folder_or_id}: image_token_index in its config is {token}, and it has {tokens:,} tokens")
    return config


def picture_side(config: LlavaConfig) -> int:
    """Pixels of a side of the pictures that the tower takes."""
    return int(config.to_dict()["vision_config"]["image_size"])


def llava_skeleton(folder_or_id: str, *, revision: str | None = None) -> LlavaBackbone:
    """A LLaVA of a folder's or hub id's config, with nothing in its weights: on the meta device.

    Raises: UserError if its config cannot be opened.
    """
    config = llava_config(folder_or_id, revision=revision)
    with _opening(folder_or_id), torch.device("meta"):
        return LlavaBackbone(LlavaForConditionalGeneration(config))


def load_llava(
    folder_or_id: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: Attention = None,
    revision: str | None = None,
    quantisation: Quantisation | None = None,
    picture_source: PictureSource = "pixel_values",
) -> LlavaBackbone:
    """A LLaVA folder or hub id, every weight in `dtype`, in eval mode.

    With `quantisation` the linear layers of its language model are quantised.

    Raises: UserError if it is no LLaVA, some of its weights are missing, or it cannot be quantised.
    """
    register_towers()
    check_model_folder(folder_or_id)
    with _opening(folder_or_id):
        found = PreTrainedConfig.get_config_dict(folder_or_id, revision=revision or "main")[0].get("model_type")
    if found not in (LLAVA, None):
        raise UserError(f"{folder_or_id!r} is a {found!r}, and as a {LLAVA!r} it would give other numbers than its own")
    quantised = quantised_loading(folder_or_id, quantisation, dtype=dtype, revision=revision)
    with _opening(folder_or_id):
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            folder_or_id,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision or "main",
            output_loading_info=True,
            **quantised.options,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{folder_or_id}: {len(missing)} weights are missing, first {missing[:3]}; the folder is broken"
        )
    quantised.finish(model)
    return LlavaBackbone(model, picture_source=picture_source)
