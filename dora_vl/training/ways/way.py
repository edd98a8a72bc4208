"""What a way of training gives a decoder's run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.frozen_outputs import OutputStore
from dora_vl.run.settings import RunConfig
from dora_vl.training.opened import Opened, SampleEncoder
from dora_vl.training.run_samples import RunSamples
from dora_vl.training.training_data import TrainingData
from dora_vl.training.ways.losses import LossModel
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
