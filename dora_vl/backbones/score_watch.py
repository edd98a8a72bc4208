"""Rows of transformers' generate whose scores are no numbers: the likeliest of NaN would be any token, in silence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dora_vl.errors import UserError

NO_NUMBERS = "the model's scores of the next word are no numbers; ask with a lower strength, or another adapter"


class NoNumbers(UserError):
    """The scores were no numbers for the one question that was asked."""

    def __init__(self) -> None:
        super().__init__(NO_NUMBERS)


NO_TOKEN = -1
"""What the ids of a row without numbers are."""


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer."""
    generation = model.generation_config
    ends = None if generation is None else generation.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def with_numbers(texts: Sequence[str], scores: Float[Tensor, "rows ..."]) -> list[str | None]:
    """The texts that were chosen by scores, a row each; None where one of a row's is NaN."""
    broken = scores.isnan().flatten(1).any(1).tolist()
    return [None if one else text for text, one in zip(texts, broken, strict=True)]


class ScoreWatch:
    """Ends rows whose scores are no numbers, and marks them; the others go on.

    A row's largest score is NaN where any is. Nothing is read back from the device before the end. Whoever gives
    generate a logits processor or a stopping criterion of their own looks at the scores themselves.

    Attributes:
        options: for transformers' generate.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.options: dict[str, Any] = {
            "logits_processor": LogitsProcessorList([_Look(self)]),
            "stopping_criteria": StoppingCriteriaList([_End(self)]),
        }
        self._ends = sorted(end_tokens(model))
        self._over: Tensor | None = None
        self._broken: Tensor | None = None

    def look(self, scores: Float[Tensor, "rows vocab"]) -> None:
        """Notes the rows without numbers; one that is over already is padded, and says nothing any more."""
        broken = ~scores.amax(-1).isfinite()
        if self._broken is None or self._over is None:
            self._broken, self._over = broken, torch.zeros_like(broken)
        self._broken = self._broken | (broken & ~self._over)

    def end(self, last: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
        """Which rows end here, given each one's newest token; none of a search with beams, whose rows change places."""
        if self._broken is None or self._over is None or len(last) != len(self._broken):
            return torch.zeros_like(last, dtype=torch.bool)
        self._over = self._over | torch.isin(last, last.new_tensor(self._ends))
        return self._broken

    def marked(self, new: Int[Tensor, "batch new"]) -> Int[Tensor, "batch new"]:
        """The ids, all `NO_TOKEN` in rows without numbers in any of their beams."""
        if self._broken is None:
            return new
        broken = self._broken.view(len(new), -1).any(1, keepdim=True)
        return new.masked_fill(broken.to(new.device), NO_TOKEN)


class _Look(LogitsProcessor):
    def __init__(self, watch: ScoreWatch) -> None:
        self._watch = watch

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        self._watch.look(scores)
        return scores


class _End(StoppingCriteria):
    def __init__(self, watch: ScoreWatch) -> None:
        self._watch = watch

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "rows seq"], scores: Any, **named: Any
    ) -> Bool[Tensor, " rows"]:
        return self._watch.end(input_ids[:, -1])
