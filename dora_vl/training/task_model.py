"""A backbone and its loss as the one module that DeepSpeed wraps and the Trainer calls."""

from __future__ import annotations

from typing import Any, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from dora_vl.heads.generation import generation_loss


class Backbone(nn.Module):
    """What training reads of a backbone, for type checkers: the Hugging Face model under `model`."""

    model: PreTrainedModel


class GenerationTask(nn.Module):
    """Next-token loss of a backbone. The loss goes through this forward, so every engine sees it.

    Args:
        backbone: gives `Features` for a batch, and holds its Hugging Face model under `model`.
        step_tokens: the loss is divided by all labelled tokens of the optimizer step, which the Trainer passes as
            `num_items_in_batch`; otherwise by this micro-batch's.
    """

    def __init__(self, backbone: nn.Module, *, step_tokens: bool) -> None:
        super().__init__()
        self.backbone = cast(Backbone, backbone)
        self.accepts_loss_kwargs = step_tokens  # the Trainer's own name for this switch
        self.register_state_dict_post_hook(_drop_frozen)

    @property
    def config(self) -> Any:
        """The Hugging Face model's config: DeepSpeed's `auto` sizes come from its hidden size."""
        return self.backbone.model.config

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        image_features: Float[Tensor, "images tokens width"] | None = None,
        layout: Int[Tensor, "batch 3 seq"] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """`loss` to go backward from, and `labelled_tokens`, the number of labels it saw."""
        features = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            pixel_values=pixel_values,
            image_features=image_features,
            layout=layout,
        )
        result = generation_loss(features.logits, features.targets, divide_by=num_items_in_batch)
        return {"loss": result.loss, "labelled_tokens": result.labelled_tokens}

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **layers: Any
    ) -> None:
        """Recomputes the layers' activations in the backward pass (transformers from 5.22 calls this)."""
        self.backbone.model.activation_checkpointing_enable(activation_checkpointing_kwargs, **layers)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **layers: Any
    ) -> None:
        """The same under the name that transformers before 5.22 calls."""
        self.backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **layers)


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A checkpoint holds what trains; the base, tied weights under a second name included, comes from its folder."""
    trained = {f"{prefix}{name}" for name, one in module.named_parameters() if one.requires_grad}
    for name in set(state) - trained:
        del state[name]
