"""A pipeline gives a training run its model, what is adapted in it, its data, its loss and its test.

Training calls these methods in the order in which they stand here, and knows nothing else of backbones or tasks.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import TrainingArguments

from dora_vl.adapters.adapter import content_hash, local_folder, versions
from dora_vl.backbones.base import Backbone
from dora_vl.core import DoRAConfig
from dora_vl.data.samples import Labelled
from dora_vl.data.stream import StreamOrder
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.heads.preferences import Answers, Scale, mean_over, measures, preference_loss
from dora_vl.heads.rewards import divergence
from dora_vl.report.batch import TokenText
from dora_vl.run.arguments import training_arguments
from dora_vl.run.folder import ADAPTER, run_folder_of
from dora_vl.run.settings import RunConfig
from dora_vl.run.watched import Watch
from dora_vl.training.reference import Reference
from dora_vl.training.rollouts import Rollouts


class LossModel(nn.Module):
    """Joins a backbone with a loss. The loss is computed in `forward`, so every engine sees it.

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

    def kept(self) -> Mapping[str, Any]:
        """Returns what a rank of a resumed run needs beside weights, in JSON's types."""
        return {}

    def keep(self, numbers: Mapping[str, Any]) -> None:
        """Restores what `kept` returned."""

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
        """Does the same under the name that transformers before 5.22 calls."""
        self.backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **layers)


class NextTokenLoss(LossModel):
    """Next-token loss of a backbone that gives `Features` for a batch.

    With `step_tokens` it is divided by all labelled tokens of the optimizer step, otherwise by this micro-batch's.
    """

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Returns `loss` to go backward from, and `labelled_tokens`, the number of labels it saw.

        `inputs` are what else the backbone takes and the batch brings, such as pictures.
        """
        losses = self.backbone(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs).losses
        # Without any label the loss is 0 and still belongs to the graph, so that ranks stay in step.
        count = torch.tensor(len(losses), device=losses.device)
        divisor = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / divisor, "labelled_tokens": count}


class RewardLoss(NextTokenLoss):
    """Raises the log-probability of drawn answers by their advantage; see `heads.rewards`.

    Batches of validation hold the data's own answers, and get their next-token loss.

    Args:
        kl: the weight of the divergence from `reference`, the model as it was when training began.
    """

    def __init__(self, backbone: Backbone[Any], *, kl: float, reference: Reference | None) -> None:
        super().__init__(backbone, step_tokens=True)
        self.kl, self.reference = kl, reference

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        num_items_in_batch: Tensor | int | None = None,
        weights: Float[Tensor, " samples"] | None = None,
        token_weights: Float[Tensor, " samples"] | None = None,
        drawn_log_probs: Float[Tensor, " samples"] | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Returns `loss` to go backward from, `labelled_tokens`, and how far the model is from rollout and reference.

        `weights` are advantages times `token_weights`.
        """
        if weights is None or token_weights is None or drawn_log_probs is None:
            return super().forward(num_items_in_batch=num_items_in_batch, **inputs)
        before, noted = torch.zeros(()), dict[str, Tensor]()
        if self.reference is not None:
            with self.reference.in_place():
                before = -self.backbone(**inputs).losses
        features = self.backbone(**inputs)
        log_probs = -features.losses
        # A ratio of 1, so that the loss is of the advantages' size; its gradient is that of the log-probability.
        each = -weights[features.rows] * (log_probs - log_probs.detach()).exp()
        if self.reference is not None:
            kl = divergence(log_probs, before)
            each = each + self.kl * token_weights[features.rows] * kl
            noted["log_probs/kl"] = kl.detach().mean()
        drawn = drawn_log_probs.float()  # DeepSpeed's bfloat16 engine casts what goes in
        of_answers = torch.zeros_like(drawn).index_add(0, features.rows, log_probs.detach().float())
        noted["log_probs/gap"] = (of_answers - drawn).abs().mean()
        count = torch.tensor(len(log_probs), device=log_probs.device)
        divisor = 1 if num_items_in_batch is None else num_items_in_batch
        return {"loss": each.sum() / divisor, "labelled_tokens": count, **noted}


class PreferenceLoss(LossModel):
    """Computes a weighted sum of `heads.preferences.LOSSES`.

    Args:
        objective: the weight of each loss, by its name.
        reference: the model as it was when training began; None where no loss needs it.
        keeps: what the reference says of a sample is computed once, and kept for later epochs.
    """

    def __init__(
        self,
        backbone: Backbone[Any],
        *,
        objective: Mapping[Any, float],
        scale: Scale,
        reference: Reference | None,
        keeps: bool = False,
    ) -> None:
        super().__init__(backbone, step_tokens=False)
        self.objective, self.scale, self.reference = objective, scale, reference
        self._keeps = keeps and "kto" not in objective  # whose answers to other prompts are others in every epoch
        self._kept: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}
        """The reference's log-probability by sample and answer, of the training and of the validation data."""

    def forward(
        self,
        weights: Float[Tensor, " samples"],
        answers: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Returns `loss` to go backward from, `labelled_tokens`, and the numbers that people watch."""
        of_reference = None if self.reference is None else self._of_reference(self.reference, answers["keys"], inputs)
        log_probs, tokens = self._log_probs(len(weights), inputs)
        compared = Answers(log_probs, of_reference, tokens, weights, answers["pairs"])
        scale, of_pictures = self.scale, answers["of_pictures"]
        if "kto" in self.objective:
            scale = replace(scale, kl=mean_over(compared.gains(), weights == 0).clamp_min(0).detach())
        loss = preference_loss(compared, scale, self.objective, of_pictures=of_pictures)
        watched = measures(compared, self.scale.beta, of_pictures=of_pictures)
        return {"loss": loss, "labelled_tokens": tokens.sum().long(), **watched}

    def kept(self) -> Mapping[str, Any]:
        """Returns the reference's log-probabilities, which other batches would round otherwise."""
        return {"reference": [[*key, value] for key, value in self._kept[True].items()]}

    def keep(self, numbers: Mapping[str, Any]) -> None:
        """Restores those of the run that is resumed."""
        self._kept[True].update({(sample, answer): value for sample, answer, value in numbers.get("reference", ())})

    def _of_reference(
        self, reference: Reference, keys: Sequence[tuple[int, int]], inputs: Mapping[str, Any]
    ) -> Float[Tensor, " answers"]:
        """Computes the reference's log-probabilities, or returns those of an earlier epoch where all are kept."""
        kept, device = self._kept[self.training], inputs["input_ids"].device
        values = [kept.get(key) for key in keys]
        lacks = not self._keeps or None in values
        if self._keeps and reference.is_sharded:  # whose passes gather weights: no rank may leave one out alone
            together = torch.tensor(lacks, dtype=torch.int32, device=device)
            torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
            lacks = bool(together)
        if not lacks:
            return torch.tensor(values, dtype=torch.float32, device=device)
        with reference.in_place():
            log_probs, _ = self._log_probs(len(keys), inputs)
        if self._keeps:
            kept.update(zip(keys, log_probs.tolist(), strict=True))
        return log_probs

    def _log_probs(self, count: int, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the log-probability of each answer, and the number of its tokens."""
        features = self.backbone(**inputs)
        nothing = features.losses.new_zeros(count)
        each = nothing.index_add(0, features.rows, -features.losses)
        return each, nothing.index_add(0, features.rows, torch.ones_like(features.losses.detach()))


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A pipeline's data as the Trainer takes it.

    Attributes:
        train: its items are what `collate` makes a batch of: samples, or whole micro-batches of a mixture.
        validation: the same, for the loss while training.
        collate: a batch from items: the loss's inputs by name (`input_ids` and `labels` among them) and bookkeeping
            (`BatchStatistics`).
        sampler: order of `train`, what its items are asked for by; None leaves it to the Trainer.
        stream: `sampler` where it is a stream that begins its next epoch by itself.
        set_epoch: each gets the epoch before its first batch.
        samples: training samples in an epoch.
        read_in_a_pass: how many an epoch reads over all ranks; None: `samples`, and what accelerate repeats of them.
        source: the training file, for messages.
        ids: the training samples', in the data's order; None: they are not known beforehand, as of a stream.
        media: what the picture and video files of some of them hold, by name (`content_key`).
        batch_tokens: of the largest micro-batch, for the memory estimate.
        pools: of `train`'s items, the largest of each kind that a micro-batch is drawn from; read when it is asked.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None = None
    collate: Callable[[list[Any]], Mapping[str, Any]]
    sampler: Sampler[Any] | None = None
    stream: StreamOrder | None = None
    set_epoch: tuple[Callable[[int], None], ...] = ()
    samples: int
    source: str
    batch_tokens: int
    ids: Callable[[], Iterable[str]] | None = None
    media: Callable[[], Mapping[str, str]] = dict
    read_in_a_pass: int | None = None
    pools: Callable[[], Sequence[Sequence[Any]]] = tuple


AnyBackbone = TypeVar("AnyBackbone", bound=Backbone[Any])


class Pipeline(ABC):
    """Joins a kind of run with the settings of one."""

    kind: str
    """Names its backbone in `recipe.json`."""
    labels_shift = True
    """True where the loss predicts the label at t from what stands before t, unlike an encoder-decoder's."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def arguments(self) -> TrainingArguments:
        """Its settings as the Trainer takes them; this starts the process group, so it comes before the model."""
        return training_arguments(self.config)

    @abstractmethod
    def prepare(self, arguments: TrainingArguments) -> None:
        """Refuses settings it cannot use and makes what the run names and does not find; for one rank alone."""

    @abstractmethod
    def labelled(self, arguments: TrainingArguments) -> Iterable[Labelled]:
        """The first training samples' labels, and what they must say; for one rank alone, after `prepare`."""

    @abstractmethod
    def skeleton(self) -> Backbone[Any]:
        """The model with nothing in its weights, on the meta device: what patterns are checked on before `load`."""

    @abstractmethod
    def load(self) -> Backbone[Any]:
        """The base, in `model.dtype`, sharded while loading under ZeRO-3."""

    @abstractmethod
    def write_replay(self, backbone: Backbone[Any], arguments: TrainingArguments) -> None:
        """Puts the chats of `data.replay` into the run's folder; the base that has none yet writes them.

        Every rank must call it, before anything is adapted.
        """

    @abstractmethod
    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """Returns what is adapted in the model and what else trains."""

    @abstractmethod
    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """Training and validation data; every rank must call it."""

    @abstractmethod
    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """The module that DeepSpeed wraps: batch in, `loss` and `labelled_tokens` out."""

    @abstractmethod
    def watch(self, backbone: Backbone[Any], arguments: TrainingArguments) -> Watch | None:
        """`watch` fixed questions, ready to be asked while it trains; None where the settings name nothing to ask.

        Every rank must call it, once the data is there.
        """

    def rollouts(self, backbone: Backbone[Any], arguments: TrainingArguments, data: TrainingData) -> Rollouts | None:
        """Returns what draws the answers that are learned from; None where the data's own are."""
        return None

    @abstractmethod
    def reading(self, backbone: Backbone[Any]) -> TokenText:
        """Returns the reader of its batches' tokens."""

    def recipe(self) -> dict[str, Any]:
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
        """A base that was loaded again with the saved adapter, on the GPU where there is one, ready to answer.

        So what is tested is what was saved, whole, whatever ZeRO stage it was trained under.
        """
        return with_adapter(base, run_folder_of(self.config.training) / ADAPTER, strength=strength)[0]

    @abstractmethod
    def test(self, numbers: Mapping[str, Any]) -> None:
        """Tests the saved adapter in this process alone and completes `metrics.json`, `numbers` included."""
