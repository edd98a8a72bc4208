"""The loss of an encoder-decoder's tasks: a mean over samples that weigh differently, or over tokens."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.tasks.subtask import NormaliseBy
from dora_vl.training.task import TaskModel


class Seq2SeqTask(TaskModel):
    """Cross-entropy of labels, normalised over the whole optimizer step, however it is dealt out to ranks.

    Args:
        backbone: a `VlBartBackbone`.
    """

    backbone: VlBartBackbone

    def __init__(self, backbone: Backbone[Any]) -> None:
        super().__init__(backbone, step_tokens=True)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch answer"],
        features: Float[Tensor, "batch images tokens channels"],
        sample_weights: Float[Tensor, " batch"],
        normalise_by: NormaliseBy = "samples",
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """`loss` and `labelled_tokens`.

        Args:
            sample_weights: each sample's weight over the number of usable samples of the step (`samples`).
            normalise_by: `samples`: a sample's mean over its tokens times its weight, added up; `tokens`: all tokens
                alike, over `num_items_in_batch`, the labelled tokens of the step.
        """
        found = self.backbone(input_ids, attention_mask, labels, features)
        each = functional.cross_entropy(found.logits.float(), found.targets, reduction="none")
        count = each.new_tensor(found.targets.numel()).detach()
        if normalise_by == "tokens":
            divisor = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            return {"loss": each.sum() / divisor, "labelled_tokens": count}
        tokens = found.rows.bincount(minlength=len(labels)).clamp_min(1)
        weights = (sample_weights / tokens).to(each.dtype)
        return {"loss": (each * weights[found.rows]).sum(), "labelled_tokens": count}
