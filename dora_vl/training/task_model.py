"""A backbone and its loss as the one module that DeepSpeed wraps and the Trainer calls."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from dora_vl.backbones.module import Backbone
from dora_vl.heads.generation import generation_loss


class TaskModel(nn.Module):
    """A backbone and a loss. The loss goes through `forward`, so every engine sees it.

    A subclass's `forward` takes a batch by name and `num_items_in_batch`, and gives `loss` to go backward from and
    `labelled_tokens`, the number of labels it saw.

    Args:
        backbone: holds its Hugging Face model under `model`.
        step_tokens: the loss is divided by a number of the whole optimizer step, not of this micro-batch, so that
            neither accumulation nor ranks divide it again; the Trainer passes all labelled tokens of the step as
            `num_items_in_batch`.
    """

    def __init__(self, backbone: Backbone[Any], *, step_tokens: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.accepts_loss_kwargs = step_tokens  # the Trainer's own name for this switch
        self.register_state_dict_post_hook(_drop_frozen)

    @property
    def config(self) -> Any:
        """The Hugging Face model's config: DeepSpeed's `auto` sizes come from its hidden size."""
        return self.backbone.model.config

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


class GenerationTask(TaskModel):
    """Next-token loss of a backbone that gives `Features` for a batch.

    With `step_tokens` it is divided by all labelled tokens of the optimizer step, otherwise by this micro-batch's.
    """

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Tensor,
    ) -> dict[str, Tensor]:
        """`loss` to go backward from, and `labelled_tokens`, the number of labels it saw.

        `inputs` are what else the backbone takes and the batch brings, such as pictures.
        """
        features = self.backbone(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs)
        result = generation_loss(features.logits, features.targets, divide_by=num_items_in_batch)
        return {"loss": result.loss, "labelled_tokens": result.labelled_tokens}


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A checkpoint holds what trains; the base, tied weights under a second name included, comes from its folder."""
    trained = {f"{prefix}{name}" for name, one in module.named_parameters() if one.requires_grad}
    for name in set(state) - trained:
        del state[name]
