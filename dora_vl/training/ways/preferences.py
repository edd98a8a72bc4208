"""Preferences: answers are compared with others to their prompt, or judged by a flag."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.output_store import OutputStore
from dora_vl.errors import SettingError
from dora_vl.heads.objectives import FLAGS, OBJECTIVES, preference_loss, preference_metrics
from dora_vl.heads.preferences import Answers, Hyperparameters
from dora_vl.run.arguments import order_seed
from dora_vl.shapes import Bool, Float
from dora_vl.training.opened import AnswersEncoder, Opened
from dora_vl.training.pipeline import LossModel
from dora_vl.training.run_samples import RunSamples
from dora_vl.training.ways.way import Reference, Way, draws_in_training


class Preferences(Way):
    """Learns a weighted sum of preference losses, also with pictures exchanged."""

    def check(self, samples: RunSamples, arguments: TrainingArguments) -> None:
        """Refuses data without what the losses compare, or with more than they would learn from."""
        objective, (judged, compared) = self.config.objective, samples.judgements
        if judged and compared and not all(loss.mixes for loss in objective.losses):
            names = ", ".join(loss.name for loss in objective.losses if not loss.mixes)
            reason = "which would leave the latter out; take kto, or a run for each"
            what = "rejected answers beside chosen ones and answers that a flag calls good or bad"
            raise SettingError("objective.loss", f": {samples.name} has {what}, and {names} compares pairs, {reason}")
        paired = not all(FLAGS in loss.takes for loss in objective.losses)
        if not compared and (paired or not judged):
            needs = "rejected answers beside the chosen ones" + ("" if paired else ", or a flag for each answer")
            names = ", ".join(objective.weights)
            raise SettingError(
                "objective.loss", f": {names} needs {needs}, and {samples.name} has none; see docs/data.md"
            )
        unmatched = [loss.name for loss in objective.losses if loss.needs_unmatched]
        if unmatched and arguments.per_device_train_batch_size == 1:
            reason = (
                f" is 1, and {unmatched[0]} compares an answer with those to other prompts beside it; set 2 or more"
            )
            raise SettingError("training.per_device_train_batch_size", reason)
        if not objective.exchange_pictures:
            return
        trouble = None
        if samples.train is None:
            trouble = "draws among all pictures, and data.streaming reads samples as they come; set one of them false"
        elif not compared or {*Counter(map(len, {*map(tuple, samples.train.rows["images"])})).values()} == {1}:
            # No two samples show the same number of different pictures.
            trouble = f"needs pairs and several pictures, and {samples.name} has none; set it false"
        if trouble is not None:
            raise SettingError("objective.exchange_pictures", f" {trouble}")

    def picture_lists(self, samples: RunSamples) -> int:
        """Counts two where rejected answers may be about other pictures."""
        return 1 + (self.config.objective.exchange_pictures or samples.has_other_pictures)

    def sample_encoder(self, opened: Opened, outputs: OutputStore | None = None) -> AnswersEncoder:
        """Puts the rejected answers, and other pictures, beside the chosen answer."""
        exchanges = self.config.objective.exchange_pictures and opened.encoder.sees_pictures
        prompts = 1 + exchanges + self.collation()["unmatched"]
        return AnswersEncoder(
            encoder=opened.encoder,
            exchange=order_seed(opened.arguments) if exchanges else None,
            answers=prompts + opened.samples.most_rejected,
            prompts=prompts,
            **opened.media(outputs),
        )

    def collation(self) -> dict[str, bool]:
        """Has answers compared, for some losses also with those to other prompts of the batch."""
        return {"compares": True, "unmatched": any(loss.needs_unmatched for loss in self.config.objective.losses)}

    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """Makes the sum of losses."""
        objective = self.config.objective
        return PreferenceLoss(
            backbone,
            losses=objective.weights,
            hyperparameters=Hyperparameters(beta=objective.beta, margin=objective.margin),
            reference=Reference(backbone.model) if objective.has_reference else None,
            keeps=not self.config.data.streaming and not draws_in_training(backbone.model),
        )


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
        each = nothing.index_add(0, features.samples, -features.losses)
        return each, nothing.index_add(0, features.samples, torch.ones_like(features.losses.detach()))
