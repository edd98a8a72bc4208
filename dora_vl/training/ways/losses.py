"""What the losses of a decoder's run share: a module over its backbone, and the reference that some compare with.

The reference is the model as it was when training began. It costs no second model: what trains changes places with its
values at the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.backbones.base import Backbone
from dora_vl.core import adapted_layers, trained_parts
from dora_vl.run.sharding import gather_to_write, is_sharded, let_go_of_whole_weights


class Reference:
    """Remembers what trains in a model, and puts it back for a while.

    It is right for whatever trains (DoRA, LoRA, magnitudes, whole weights, a projector) and wherever a run begins: an
    adapter that is switched off is the base, which is another model where the run started from an adapter or by PiSSA.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._layers = model, [layer for _, layer in adapted_layers(model)]
        self._trained = [weight for part in trained_parts(model) for weight in part.parameters.values()]
        self._start = self._exchange(None)
        self.is_sharded = any(map(is_sharded, model.parameters()))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Makes the model the reference, without gradients; no graph may span it. Every rank must call it."""
        with torch.no_grad():
            now = self._exchange(self._start)
            try:
                yield
            finally:
                self._exchange(now)

    @torch.no_grad()
    def _exchange(self, values: Sequence[Tensor] | None) -> list[Tensor]:
        """Writes values where some are given; returns the earlier ones. One tensor at a time is whole."""
        before: list[Tensor] = []
        for number, weight in enumerate(self._trained):
            with gather_to_write([weight]) as (whole,):
                before.append(whole.detach().clone())
                if values is not None:
                    whole.copy_(values[number])
        for layer in self._layers:
            layer.forget_norms()
        let_go_of_whole_weights(self._model)
        torch.clear_autocast_cache()  # it would go on with half-precision copies of the values before
        return before


def draws_in_training(model: nn.Module) -> bool:
    """Tells whether dropout makes two passes over one batch differ."""
    layers = (module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return any(layers) or any(layer.adapter.dropout for _, layer in adapted_layers(model))


class LossModel(nn.Module):
    """Joins a backbone with a loss. The loss is computed in `forward`, so every engine sees it.

    A subclass's `forward` takes a batch by name and `num_items_in_batch`, and gives `loss` to go backward from and
    `labelled_tokens`, the number of labels it saw. With `step_tokens` the loss is divided by a number of the whole
    optimizer step, so that neither accumulation nor ranks divide it again; the Trainer passes all labelled tokens of
    the step as `num_items_in_batch`.
    """

    def __init__(self, backbone: Backbone[Any], *, step_tokens: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.accepts_loss_kwargs = step_tokens  # the Trainer's own name for this switch

    def kept(self) -> Mapping[str, Any]:
        """Returns what a rank of a resumed run needs beside weights, in JSON's types."""
        return {}

    def keep(self, numbers: Mapping[str, Any]) -> None:
        """Restores what `kept` returned."""

    @property
    def config(self) -> Any:
        """The Hugging Face model's config: DeepSpeed's `auto` sizes come from its hidden size."""
        return self.backbone.model.config

    def activation_checkpointing_enable(self, *options: Any, **named: Any) -> None:
        """Recomputes the layers' activations in the backward pass (transformers from 5.22 calls this)."""
        self.backbone.model.activation_checkpointing_enable(*options, **named)

    def gradient_checkpointing_enable(self, *options: Any, **named: Any) -> None:
        """Does the same under the name that transformers called before 5.22."""
        self.backbone.model.gradient_checkpointing_enable(*options, **named)
