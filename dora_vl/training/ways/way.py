"""What a way of training gives a decoder's run, and the reference that the losses of some ways compare with.

The reference is the model as it was when training began. It costs no second model: what trains changes places with its
values at the start.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.output_store import OutputStore
from dora_vl.core import adapted_layers, trained_parts
from dora_vl.run.launch import gather_to_write, is_sharded, let_go_of_whole_weights
from dora_vl.run.settings import RunConfig
from dora_vl.training.opened import Opened, SampleEncoder
from dora_vl.training.pipeline import LossModel
from dora_vl.training.run_samples import RunSamples
from dora_vl.training.training_data import TrainingData
from dora_vl.training.ways.rollouts import Rollouts


@dataclass(frozen=True)
class Way(ABC):
    """Trains a decoder in one way; a run calls these methods in the order in which they stand here."""

    config: RunConfig

    @abstractmethod
    def check(self, samples: RunSamples, arguments: TrainingArguments) -> None:
        """Refuses settings and samples that it cannot learn from; on one rank only, before the base is there."""

    def picture_lists(self, samples: RunSamples) -> int:
        """Returns how many lists of pictures a sample's answers are about."""
        return 1

    @abstractmethod
    def sample_encoder(self, opened: Opened, outputs: OutputStore | None = None) -> SampleEncoder:
        """Returns what makes its samples, of stored `outputs` where there are some."""

    def collation(self) -> dict[str, bool]:
        """Returns the fields of a `Collator` that it sets."""
        return {}

    def with_room(self, data: TrainingData, arguments: TrainingArguments) -> TrainingData:
        """Returns data whose largest samples have room for what a step adds to them."""
        return data

    @abstractmethod
    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """Makes the loss."""

    def rollouts(
        self, opened: Opened, backbone: Backbone[Any], data: TrainingData, never: frozenset[int]
    ) -> Rollouts | None:
        """Returns what draws the answers that it learns from, no token of `never`; None: the data has them."""
        return None


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
