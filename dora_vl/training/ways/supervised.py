"""Supervised tuning: the data's answers are learned token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from dora_vl.backbones.base import Backbone, Expected
from dora_vl.backbones.output_store import OutputStore
from dora_vl.errors import SettingError
from dora_vl.shapes import Int
from dora_vl.training.opened import Opened, SampleEncoder
from dora_vl.training.pipeline import LossModel
from dora_vl.training.run_samples import RunSamples
from dora_vl.training.ways.way import Reference, Way


class Supervised(Way):
    """Learns whole conversations, and beside them the base's own chats (`data.replay`)."""

    def check(self, samples: RunSamples, arguments: TrainingArguments) -> None:
        """Refuses data that calls answers bad: it would learn them, or leave them out."""
        judged, compared = samples.judgements
        if judged or compared:
            both = "dpo" if compared else "kto"
            alone = "data.columns: {chosen: completion}" if compared else "a file without the bad ones"
            what = "rejected answers" if compared else "answers that a flag calls good or bad"
            reason = f"{both} learns from both, {alone} from the good ones alone"
            raise SettingError("objective.loss", f" is sft, and {samples.name} has {what}; {reason}")

    def sample_encoder(self, opened: Opened, outputs: OutputStore | None = None) -> SampleEncoder:
        """Takes each conversation whole."""
        return SampleEncoder(encoder=opened.encoder, **opened.media(outputs))

    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """Makes the next-token loss."""
        reference = Reference(backbone.model) if self.config.data.replay else None
        by_tokens = self.config.optim.loss_normalisation == "step_tokens"
        return NextTokenLoss(backbone, step_tokens=by_tokens, reference=reference)


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
        return {"expected": Expected(numbers, features.logits[features.samples.argsort(stable=True)])}
