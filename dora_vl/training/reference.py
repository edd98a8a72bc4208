"""The model as it was when training began, which costs no second model: what trains changes places with its start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dora_vl.core import adapted_layers, trained_parts
from dora_vl.run.sharding import gather_to_write, is_sharded


def draws_in_training(model: nn.Module) -> bool:
    """Tells whether dropout makes two passes over one batch differ."""
    layers = (module.p for module in model.modules() if isinstance(module, nn.Dropout))
    return any(layers) or any(layer.adapter.dropout for _, layer in adapted_layers(model))


class Reference:
    """Remembers what trains in a model, and puts it back for a while.

    It is right for whatever trains (DoRA, LoRA, magnitudes, whole weights, a projector) and wherever a run begins: an
    adapter that is switched off is the base, which is another model where the run started from an adapter or by PiSSA.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for _, layer in adapted_layers(model)]
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
        """Writes values where some are given; returns those that stood there. One tensor at a time is whole."""
        before: list[Tensor] = []
        for number, weight in enumerate(self._trained):
            with gather_to_write([weight]) as (whole,):
                before.append(whole.detach().clone())
                if values is not None:
                    whole.copy_(values[number])
        for layer in self._layers:
            layer.forget_norms()
        return before
