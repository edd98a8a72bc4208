"""Rows of one batch, each decoded in its own way through transformers' generate: sampling, ends, text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dora_vl.backbones.growing_text import NOT_YET_A_CHARACTER
from dora_vl.backbones.score_watch import NO_NUMBERS
from dora_vl.errors import UserError

LEAST_TEMPERATURE = 1e-3
"""Below it the likeliest token is taken: scores divided by less may leave the numbers that there are."""

Reason = Literal["stop", "length", "ended"]
"""Why an answer is over: it was complete, it was as long as allowed, or nobody waits for it any more."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token.
        top_p: of the likeliest tokens, as few as have this probability together.
        stop: texts that end the answer, and are not part of it.
        seed: the same answer again; None: another each time.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass
class RowText:
    """One row's answer while it is made.

    Attributes:
        sampling: how it is chosen.
        decode: its tokens as text.
        write: receives the text piece by piece.
        over: whether nobody waits for the rest; asked at every token.
        done: is told once, when the row is over.
    """

    sampling: Sampling
    decode: Callable[[list[int]], str]
    write: Callable[[str], object]
    over: Callable[[], bool] = lambda: False
    done: Callable[[RowText], object] = lambda row: None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """What has been written."""
    reason: Reason | None = None
    """Why it is over; None while it goes on."""
    error: Exception | None = None
    """What broke it, and no other row."""

    def take(self, token: int, ends: Collection[int]) -> None:
        """Takes the next token, and writes what it adds to the text; an error ends this row alone."""
        if self.reason is not None:
            return
        try:
            self._take(token, ends)
        except Exception as error:  # noqa: BLE001 - the other rows of the batch go on
            self._break(error)

    def draw(self, scores: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
        """The next token, drawn; scores that are no numbers end this row alone, and the token is any."""
        try:
            return token_of(scores, self.sampling, generator)
        except UserError as error:
            if self.reason is None:
                self._break(error)
            return 0

    def end_without_numbers(self) -> None:
        """Ends this row alone: its scores are no numbers, and the likeliest of them would be any token."""
        if self.reason is None:
            self._break(UserError(NO_NUMBERS))

    def _break(self, error: Exception) -> None:
        self.error, self.reason = error, "ended"
        self.done(self)

    def _take(self, token: int, ends: Collection[int]) -> None:
        if self.over():
            self._finish("ended", self.text)
            return
        self.ids.append(token)
        text = self.decode(self.ids)
        stopped = _first_place(text, self.sampling.stop)
        if stopped is not None:
            self._finish("stop", text[:stopped])
        elif token in ends:
            self._finish("stop", text)
        elif len(self.ids) >= self.sampling.max_new_tokens:
            self._finish("length", text)
        elif not text.endswith(NOT_YET_A_CHARACTER):
            self._write(text[: len(text) - _begun(text, self.sampling.stop)])

    def _finish(self, reason: Reason, text: str) -> None:
        self._write(text)
        self.reason = reason
        self.done(self)

    def _write(self, text: str) -> None:
        if len(text) > len(self.text):
            self.write(text[len(self.text) :])
            self.text = text


def _first_place(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stopping texts begins."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stopping text, and are kept back."""
    most = max(map(len, stops), default=1) - 1
    sizes = range(min(most, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)


class RowStops(StoppingCriteria):
    """Gives each row its next token, and says which rows are over."""

    def __init__(self, rows: Sequence[RowText], ends: Collection[int]) -> None:
        self._rows = rows
        self._ends = ends

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "rows seq"], scores: Any, **named: Any
    ) -> Bool[Tensor, " rows"]:
        """Which rows are over."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token, self._ends)
        over = [row.reason is not None for row in self._rows]
        return torch.tensor(over, device=input_ids.device)


class RowSampling(LogitsProcessor):
    """Leaves each row that samples the one token that it drew, so that the likeliest is taken of all rows.

    A row whose scores are no numbers is ended here, whether it samples or not.
    """

    def __init__(self, rows: Sequence[RowText], device: torch.device) -> None:
        self._rows = rows
        found = ((number, drawing(one.sampling, device)) for number, one in enumerate(rows))
        self._draws = {number: one for number, one in found if one is not None}

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """The scores, of a row that samples all but one minus infinity."""
        likeliest(scores, self._rows)
        for number, generator in self._draws.items():
            drawn = self._rows[number].draw(scores[number], generator)
            scores[number] = float("-inf")
            scores[number, drawn] = 0.0
        return scores


def likeliest(scores: Float[Tensor, "rows vocab"], rows: Sequence[RowText]) -> list[int]:
    """Each row's likeliest token; a row whose scores are no numbers is ended, and its token is any.

    A row's largest score is NaN where any is, so that looking at it costs no more than choosing.
    """
    most, tokens = scores.max(-1)
    for row, number in zip(rows, most.isfinite().tolist(), strict=True):
        if not number:
            row.end_without_numbers()
    return tokens.tolist()


def _samples(sampling: Sampling) -> bool:
    return sampling.temperature >= LEAST_TEMPERATURE


def drawing(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """Where a row's draws come from; None where it takes the likeliest token."""
    if not _samples(sampling):
        return None
    generator = torch.Generator(device=device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def token_of(scores: Float[Tensor, " vocab"], sampling: Sampling, generator: torch.Generator) -> int:
    """A token drawn at the row's temperature from the likeliest that have `top_p` together.

    Raises:
        UserError: the scores are no numbers, as those of an adapter that is applied too strongly.
    """
    probabilities = (scores.float() / sampling.temperature).softmax(-1)
    if bool(probabilities.isnan().any()):  # on a GPU, to draw from these would break every later call too
        raise UserError(NO_NUMBERS)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        unlikely = order[ranked.cumsum(-1) - ranked >= sampling.top_p]
        probabilities = probabilities.index_fill(0, unlikely, 0.0)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate_options(rows: Sequence[RowText], ends: Collection[int], device: torch.device) -> dict[str, Any]:
    """What transformers' generate is called with so that it decodes these rows, each in its own way."""
    stops = StoppingCriteriaList([RowStops(rows, ends)])
    chosen = LogitsProcessorList([RowSampling(rows, device)])
    # One beam whatever the model's folder says.
    return {"stopping_criteria": stops, "logits_processor": chosen, "num_beams": 1}
