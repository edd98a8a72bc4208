"""A pipeline gives a training run its model, what is adapted in it, its data, its loss and its test.

Training calls these methods in the order in which they are defined here, and knows nothing else of backbones or tasks.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from transformers import TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.adapters.adapter import content_hash, local_folder, versions
from dora_vl.backbones.base import Backbone
from dora_vl.core import DoRAConfig
from dora_vl.data.samples import Labelled
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.run.arguments import training_arguments
from dora_vl.run.folder import ADAPTER, Watch, run_folder_of
from dora_vl.run.settings import RunConfig
from dora_vl.training.training_data import TrainingData
from dora_vl.training.ways.rollouts import Rollouts


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


AnyBackbone = TypeVar("AnyBackbone", bound=Backbone[Any])


class Pipeline(ABC):
    """Joins a kind of run with the settings of one."""

    kind: str
    """Names its backbone in `recipe.json`."""
    labels_shift = True
    """True where the loss predicts the label at t from what comes before t, unlike an encoder-decoder's."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def arguments(self) -> TrainingArguments:
        """Returns the settings as the Trainer takes them; starts the process group, so it comes before the model."""
        return training_arguments(self.config)

    @abstractmethod
    def prepare(self, arguments: TrainingArguments) -> None:
        """Refuses settings that it cannot use, and makes what the run names and does not find; on one rank only."""

    @abstractmethod
    def labelled(self, arguments: TrainingArguments) -> Iterable[Labelled]:
        """Yields the first samples' labels, and what they must say; on one rank only, after `prepare`."""

    @abstractmethod
    def skeleton(self) -> Backbone[Any]:
        """Builds the model without weights, on the meta device: patterns are checked on it before `load`."""

    @abstractmethod
    def load(self) -> Backbone[Any]:
        """Loads the base in `model.dtype`, sharded while loading under ZeRO-3."""

    def write_replay(self, backbone: Backbone[Any], arguments: TrainingArguments) -> None:  # noqa: B027
        """Puts the chats of `data.replay`, which the base writes, into the run's folder; every rank must call it."""

    @abstractmethod
    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """Returns what is adapted in the model and what else trains."""

    @abstractmethod
    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """Returns training and validation data; every rank must call it."""

    @abstractmethod
    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """Makes the module that DeepSpeed wraps: it maps a batch to `loss` and `labelled_tokens`."""

    @abstractmethod
    def watch(self, backbone: Backbone[Any], arguments: TrainingArguments) -> Watch | None:
        """Returns `watch` fixed questions to ask while it trains, if there are any; every rank must call it."""

    def rollouts(self, backbone: Backbone[Any], arguments: TrainingArguments, data: TrainingData) -> Rollouts | None:
        """Returns what draws the answers that are learned from; None if the data has them."""
        return None

    @abstractmethod
    def reading(
        self, backbone: Backbone[Any], arguments: TrainingArguments
    ) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
        """Returns the tokenizer of its batches, and the tokens in place of pieces of pictures and videos."""

    def recipe(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Returns what `adapter/recipe.json` says beside the adapter's own settings: enough to ask the model again."""
        model = self.config.model
        return {
            "task": self.config.task,
            "backbone": self.kind,
            "base": model.base,
            "base_sha256": content_hash(local_folder(model.base, model.revision)),
            **{name: dataclasses.asdict(spec) for name in ("compose", "source") if (spec := vars(model)[name])},
            "dtype": model.dtype,
            "training": dict(self.config.training),
            "versions": versions(),
        }

    def with_saved_adapter(self, base: AnyBackbone, strength: float = 1.0) -> AnyBackbone:
        """Loads the base again with the saved adapter, on the GPU where there is one, ready to answer.

        So what is tested is what was saved, whole, whatever ZeRO stage it was trained under.
        """
        return with_adapter(base, run_folder_of(self.config.training) / ADAPTER, strength=strength)[0]

    @abstractmethod
    def test(self, metrics: Mapping[str, Any]) -> None:
        """Tests the saved adapter in this process only and completes `metrics.json`, the training's included."""
