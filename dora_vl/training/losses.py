"""The losses of a decoder's run, each a module over its backbone, and the reference that some compare with.

The reference is the model as it was when training began. It costs no second model: what trains changes places with its
values at the start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.backbones.base import Backbone, Expected
from dora_vl.core import adapted_layers, trained_parts
from dora_vl.heads.objectives import OBJECTIVES, preference_loss, preference_metrics
from dora_vl.heads.preferences import Answers, Hyperparameters
from dora_vl.heads.rewards import divergence
from dora_vl.run.sharding import gather_to_write, is_sharded, let_go_of_whole_weights
from dora_vl.shapes import Bool, Float, Int


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


class NextTokenLoss(LossModel):
    """Next-token loss of a backbone that gives `Features` for a batch.

    With `step_tokens` it is divided by all labelled tokens of the optimizer step, otherwise by this micro-batch's.
    Chats that the base wrote are learned by how far the model is from the `reference`, in place of their tokens.
    """

    def __init__(self, backbone: Backbone[Any], *, step_tokens: bool, reference: Reference | None = None) -> None:
        super().__init__(backbone, step_tokens=step_tokens)
        self.reference = reference

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"],
        num_items_in_batch: Tensor | int | None = None,
        chats: Mapping[str, Any] | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Returns `loss` to go backward from, and `labelled_tokens`; `inputs` are the rest of the batch (pictures)."""
        if self.training and chats is not None and self.reference is not None:
            inputs |= self._expected(self.reference, chats)
        losses = self.backbone(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs).losses
        # Without any label the loss is 0 and still belongs to the graph, so that ranks stay in step.
        count = torch.tensor(len(losses), device=losses.device)
        divisor = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / divisor, "labelled_tokens": count}

    def _expected(self, reference: Reference, chats: Mapping[str, Any]) -> dict[str, Expected]:
        """Returns the reference's predictions for a batch's chats; the ranks of a sharded model all compute it."""
        numbers = chats["samples"]
        if not len(numbers) and not reference.is_sharded:
            return {}
        with reference.in_place():
            self.backbone.eval()  # without dropout
            features = self.backbone(**chats["inputs"], keep_logits=True)
            self.backbone.train()
        if not len(numbers):
            return {}
        assert features.logits is not None
        return {"expected": Expected(numbers, features.logits[features.rows.argsort(stable=True)])}


class RewardLoss(NextTokenLoss):
    """Raises the log-probability of drawn answers by their advantage; see `heads.rewards`.

    Batches of validation hold the data's own answers, and get their next-token loss. `kl` is the weight of the
    divergence from `reference`, the model as it was when training began.
    """

    def __init__(self, backbone: Backbone[Any], *, kl: float, reference: Reference | None) -> None:
        super().__init__(backbone, step_tokens=True, reference=reference)
        self.kl = kl

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


def mean_over_ranks(values: Float[Tensor, " answers"], kept: Bool[Tensor, " answers"]) -> Float[Tensor, ""]:
    """Computes the mean over some answers of all ranks' micro-batches, 0 where there is none; every rank calls it."""
    sums = torch.stack([torch.where(kept, values, 0).sum().float(), kept.sum().float()])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums[0] / sums[1].clamp_min(1)


class PreferenceLoss(LossModel):
    """Computes a sum of preference losses, which `losses` weighs by name.

    What `reference`, the model as it was when training began, says of a sample is kept for later epochs with `keeps`.
    """

    def __init__(
        self,
        backbone: Backbone[Any],
        *,
        losses: Mapping[str, float],
        hyperparameters: Hyperparameters,
        reference: Reference | None,
        keeps: bool = False,
    ) -> None:
        super().__init__(backbone, step_tokens=False)
        self.losses, self.hyperparameters, self.reference = losses, hyperparameters, reference
        self._needs_unmatched = any(OBJECTIVES[name].needs_unmatched for name in losses)
        self._keeps = keeps and not self._needs_unmatched  # answers to other prompts change every epoch
        self._kept: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}
        """Holds the reference's log-probability by sample and answer, for the training and for the validation data."""

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
        hyper, exchanged = self.hyperparameters, answers["of_pictures"]
        if self._needs_unmatched:
            hyper = replace(hyper, kl=mean_over_ranks(compared.gains().detach(), weights == 0).clamp_min(0))
        loss = preference_loss(compared, hyper, self.losses, exchanged=exchanged)
        metrics = preference_metrics(compared, hyper.beta, self.losses, exchanged=exchanged)
        return {"loss": loss, "labelled_tokens": tokens.sum().long(), **metrics}

    def kept(self) -> Mapping[str, Any]:
        """Returns the reference's log-probabilities, which other batches would round differently."""
        return {"reference": [[*key, value] for key, value in self._kept[True].items()]}

    def keep(self, numbers: Mapping[str, Any]) -> None:
        """Restores the log-probabilities of the run that is resumed."""
        self._kept[True].update({(sample, answer): value for sample, answer, value in numbers.get("reference", ())})

    def _of_reference(
        self, reference: Reference, keys: Sequence[tuple[int, int]], inputs: Mapping[str, Any]
    ) -> Float[Tensor, " answers"]:
        """Computes the reference's log-probabilities, or returns those of an earlier epoch where all are kept."""
        kept, device = self._kept[self.training], inputs["input_ids"].device
        values = [kept.get(key) for key in keys]
        lacks = not self._keeps or None in values
        if self._keeps and reference.is_sharded:  # its passes gather weights: no rank may skip one alone
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
