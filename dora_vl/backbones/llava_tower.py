"""A LLaVA's frozen vision tower, as the store of its outputs uses it (`vision_store.FrozenTower`)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LlavaTower:
    """Runs the tower up to the projector.

    Args:
        model: transformers' `LlavaForConditionalGeneration`.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._config = model, model.config

    @property
    def tower(self) -> nn.Module:
        """The network."""
        return self._model.model.vision_tower

    @property
    def trains(self) -> bool:
        """Whether any of its weights gets a gradient."""
        return any(weight.requires_grad for weight in self.tower.parameters())

    @property
    def tower_settings(self) -> dict[str, object]:
        """What decides, beside its weights and the preparation, which features it gives."""
        return {
            "layer": self._config.vision_feature_layer,
            "select": self._config.vision_feature_select_strategy,
            "vision_config": self._config.vision_config.to_diff_dict(),
        }

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Tokens and width of one picture's features, before the projector."""
        return self._config.image_seq_length, self._model.model.multi_modal_projector.linear_1.in_features

    @property
    def feature_dtype(self) -> torch.dtype:
        """The dtype that features are computed, and stored, in."""
        return self._model.dtype

    @torch.no_grad()
    def picture_features(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images tokens channels"]:
        """The hidden states that the config chooses, as transformers' `get_image_features` does before projecting."""
        chosen_layers = self._config.vision_feature_layer
        # transformers >= 5.24 keeps only the layers asked for; before, anything true keeps all.
        states = self.tower(
            pixel_values.to(self._model.device, self._model.dtype),
            return_dict=True,
            output_hidden_states=chosen_layers or True,
        ).hidden_states
        layers = [chosen_layers] if isinstance(chosen_layers, int) else chosen_layers
        chosen = [states[layer] for layer in layers]
        if self._config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)
