"""The loss of an encoder-decoder's tasks: of its words, a mean over samples or tokens; or of a closed list's scores."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.dataset import IGNORED_LABEL
from dora_vl.heads.answer import answer_loss
from dora_vl.tasks.seq2seq import ClosedBatch
from dora_vl.tasks.subtask import NormaliseBy
from dora_vl.training.pipeline import LossModel


class Seq2SeqLoss(LossModel):
    """The loss of one task's micro-batch, normalised over the whole optimizer step, however it is dealt out to ranks.

    Args:
        backbone: a `VlBartBackbone`.
    """

    backbone: VlBartBackbone

    def __init__(self, backbone: Backbone[Any]) -> None:
        super().__init__(backbone, step_tokens=True)

    def forward(
        self,
        labels: Int[Tensor, "batch answer"],
        features: Float[Tensor, "batch images tokens channels"],
        sample_weights: Float[Tensor, " batch"],
        normalise_by: NormaliseBy = "samples",
        num_items_in_batch: Tensor | int | None = None,
        closed: ClosedBatch | None = None,
        **text: Int[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """`loss` and `labelled_tokens`.

        Args:
            sample_weights: each sample's weight over the number of usable samples of the step (`samples`).
            normalise_by: `samples`: a sample's mean over its tokens times its weight, added up; `tokens`: all tokens
                alike, over `num_items_in_batch`, the labelled tokens of the step.
            closed: the list that is scored instead, and each sample's right answers; None: words are said.
            text: `input_ids` and `attention_mask`.
        """
        if closed is not None:
            hidden, head = self.backbone.first_hidden(**text, features=features), self.backbone.answer_head(closed.task)
            targets = head.targets(closed.soft_scores).to(hidden.device)
            loss = answer_loss(head(hidden), targets, sample_weights)
            count = (labels != IGNORED_LABEL).sum()
            return {"loss": self._with_idle_heads(loss, hidden, closed), "labelled_tokens": count}
        found = self.backbone(**text, labels=labels, features=features)
        each = functional.cross_entropy(found.logits.float(), found.targets, reduction="none")
        count = each.new_tensor(found.targets.numel()).detach()
        if normalise_by == "tokens":
            divisor = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            loss = each.sum() / divisor
        else:
            tokens = found.rows.bincount(minlength=len(labels)).clamp_min(1)
            weights = (sample_weights / tokens).to(each.dtype)
            loss = (each * weights[found.rows]).sum()
        return {"loss": self._with_idle_heads(loss, found.hidden, closed), "labelled_tokens": count}

    def _with_idle_heads(
        self, loss: Float[Tensor, ""], hidden: Float[Tensor, "places width"], closed: ClosedBatch | None
    ) -> Float[Tensor, ""]:
        """The loss and zero times every other head: under ZeRO-3 all that trains must have a gradient."""
        for task, head in self.backbone.model.answer_heads.items():
            if closed is None or task != closed.task:
                loss = loss + 0.0 * head(hidden[:1].detach()).float().sum()
        return loss
