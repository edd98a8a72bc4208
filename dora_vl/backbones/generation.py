"""Helps transformers generate: text that grows with its tokens, and sequences whose scores are not finite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.errors import UserError
from dora_vl.shapes import Bool, Float, Int

NOT_YET_A_CHARACTER = "\ufffd"
"""Decoders return this for the first bytes of a character whose last bytes are still to come."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Iterable[object], keep: Collection[int] = ()) -> str:
    """Decodes ids without special tokens, but for those to `keep`; `ids` may be one of a batch."""
    parts = groupby((int(token) for token in ids), lambda token: token in keep)  # pyright: ignore[reportArgumentType]
    return "".join(str(tokenizer.decode([*run], skip_special_tokens=not is_kept)) for is_kept, run in parts)


def growing_text(
    tokenizer: PreTrainedTokenizerBase, answer_in: Callable[[str], str], keep: Collection[int] = ()
) -> Callable[[Sequence[int]], str]:
    """Returns a decoder for an answer's ids as they grow; `answer_in` cuts the answer out of the whole text."""
    if tokenizer.clean_up_tokenization_spaces:  # takes spaces back across several tokens
        return lambda ids: answer_in(decoded(tokenizer, ids, keep))
    return GrowingText(partial(decoded, tokenizer, keep=keep), answer_in)


class GrowingText:
    """Decodes ids that grow from call to call, at the cost of the last few; equal to decoding them all.

    A token's text depends on the one before it (a space between words, the rest of a character), so each call decodes
    the tokens since the last text but one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], answer_in: Callable[[str], str]) -> None:
        self._decode = decode
        self._answer_in = answer_in
        self._text = ""
        self._from = 0
        self._until = 0
        self._known = ""
        """Holds the text of the ids from `_from` to `_until`."""

    def __call__(self, ids: Sequence[int]) -> str:
        """Returns the answer so far; `ids` begin with those of the call before."""
        window = self._decode(ids[self._from :])
        if not window.startswith(self._known):
            return self._answer_in(self._decode_all(ids))
        new = window[len(self._known) :]
        if not new or window.endswith(NOT_YET_A_CHARACTER):
            return self._answer_in(self._text + new)
        self._text += new
        self._advance(len(ids), ids)
        return self._answer_in(self._text)

    def _decode_all(self, ids: Sequence[int]) -> str:
        """Decodes everything, for tokenizers that take text back, such as a space before a full stop."""
        text = self._decode(ids)
        if not text.endswith(NOT_YET_A_CHARACTER):
            self._text = text
            self._advance(len(ids), ids)
        return text

    def _advance(self, until: int, ids: Sequence[int]) -> None:
        self._from, self._until = self._until, until
        self._known = self._decode(ids[self._from : self._until])


NOT_FINITE_SCORES = "the model's scores for the next token are not finite; use a lower strength, or another adapter"


class NotFiniteScores(UserError):
    """Reports that the scores for a single question were not finite."""

    def __init__(self) -> None:
        super().__init__(NOT_FINITE_SCORES)


NO_TOKEN = -1
"""A sequence whose scores were not finite has this id everywhere."""


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Returns the tokens that end an answer."""
    generation = model.generation_config
    ends = None if generation is None else generation.eos_token_id
    return frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])


def without_broken(texts: Sequence[str], scores: Float[Tensor, "sequences ..."]) -> list[str | None]:
    """Keeps the texts chosen by scores, one sequence each; None replaces a text if one of its scores is NaN."""
    broken = scores.isnan().flatten(1).any(1).tolist()
    return [None if is_broken else text for text, is_broken in zip(texts, broken, strict=True)]


class ScoreWatch:
    """Stops sequences whose scores are not finite, and marks them; the other sequences go on.

    A sequence's largest score is NaN where any is. Nothing is read back from the device before the end. Callers that
    pass generate a logits processor or stopping criterion of their own must look at the scores themselves. `options`
    are arguments for generate.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.options: dict[str, Any] = {
            "logits_processor": LogitsProcessorList([cast(Any, self._note_broken)]),
            "stopping_criteria": StoppingCriteriaList([cast(Any, self._stop_broken)]),
        }
        self._ends = sorted(end_tokens(model))
        self._over: Tensor | None = None
        self._broken: Tensor | None = None

    def _note_broken(
        self, input_ids: Tensor, scores: Float[Tensor, "sequences vocab"]
    ) -> Float[Tensor, "sequences vocab"]:
        """Notes sequences whose scores are not finite; sequences that have ended are padded, and no longer count."""
        broken = ~scores.amax(-1).isfinite()
        if self._broken is None or self._over is None:
            self._broken, self._over = broken, torch.zeros_like(broken)
        self._broken = self._broken | (broken & ~self._over)
        return scores

    def _stop_broken(self, input_ids: Int[Tensor, "sequences seq"], scores: Any) -> Bool[Tensor, " sequences"]:
        """Stops broken sequences, and notes those that end; does nothing in beam search, where they change places."""
        last = input_ids[:, -1]
        if self._broken is None or self._over is None or len(last) != len(self._broken):
            return torch.zeros_like(last, dtype=torch.bool)
        self._over = self._over | torch.isin(last, last.new_tensor(self._ends))
        return self._broken

    def mark_broken(self, new: Int[Tensor, "batch new"]) -> Int[Tensor, "batch new"]:
        """Fills a sequence with `NO_TOKEN` if any of its beams had scores that are not finite."""
        if self._broken is None:
            return new
        broken = self._broken.view(len(new), -1).any(1, keepdim=True)
        return new.masked_fill(broken.to(new.device), NO_TOKEN)


class TokenDrawer(LogitsProcessor):
    """Draws each sequence's next token, never one of `excluded`, and masks all others, so that generate must take it.

    `options` are arguments for generate. `log_probs` and `entropies`, one tensor per token, mean nothing after a
    sequence's end.
    """

    def __init__(self, generator: torch.Generator, excluded: Collection[int]) -> None:
        self._generator = generator
        self._excluded = torch.tensor(sorted(excluded), dtype=torch.long, device=generator.device)
        self.log_probs: list[Float[Tensor, " sequences"]] = []
        self.entropies: list[Float[Tensor, " sequences"]] = []
        self.options: dict[str, Any] = {
            "logits_processor": LogitsProcessorList([self]),
            "stopping_criteria": StoppingCriteriaList(),
            "num_beams": 1,
            "repetition_penalty": 1.0,  # whatever the model's folder says
        }

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: Float[Tensor, "sequences vocab"]
    ) -> Float[Tensor, "sequences vocab"]:
        """Returns zero for the drawn token of each sequence, minus infinity for all others."""
        # On a GPU, to draw from NaN breaks every later call; the step's own loss tells of it.
        log_probs = scores.float().nan_to_num(0.0).log_softmax(-1)
        chances = log_probs.exp()
        tokens = torch.multinomial(chances.index_fill(1, self._excluded, 0.0), 1, generator=self._generator)
        self.log_probs.append(log_probs.gather(1, tokens)[:, 0])
        self.entropies.append(-(chances * log_probs).sum(-1))
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens, 0.0)


def says_true(logits: Float[Tensor, "batch vocab"], *, true_token: int, false_token: int) -> Bool[Tensor, " batch"]:
    """Tells which sequences prefer the token of "true" (NLVR2 in VL-T5); equal scores are false."""
    return logits[:, true_token] > logits[:, false_token]
