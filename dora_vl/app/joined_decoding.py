"""A batch that takes requests in while it is decoded: a decoding method for transformers' generate.

A request that comes reads its prompt at the next token and goes on with the others; one that is over leaves. Models
whose rows cannot come to others (`joined_rows.may_join`) are decoded as generate does it, from the first to the last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.app.answering import Answering
from dora_vl.app.joined_rows import JoinedRows, may_join
from dora_vl.app.row_decoding import RowSampling, RowText, likeliest


@dataclass
class Member:
    """A request in a batch: its text, and where its draws come from (None: it takes the likeliest token)."""

    answering: Answering
    text: RowText
    draws: torch.Generator | None = None


Members = Sequence[Member]
Read = tuple[list[Member], JoinedRows, Float[Tensor, "rows vocab"]]


class JoinableDecoding(ABC):
    """What transformers' generate calls to decode a batch (`custom_generate`); nobody reads the ids that it returns."""

    media: Collection[str]
    """Names of the inputs that hold pictures and videos."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **arguments: Any,
    ) -> Tensor:
        """Reads the prompts and takes them from there, or does what is done with rows that cannot join others."""
        if not can_join(logits_processor, generation_config) or not may_join(arguments, self.media):
            named = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            return self.alone(model, input_ids, generation_config=generation_config, **named, **arguments)
        self.take(model, *JoinedRows.read(model, input_ids, generation_config, arguments))
        return input_ids

    @abstractmethod
    def alone(self, model: Any, input_ids: Tensor, **named: Any) -> Tensor:
        """Rows that cannot join others, with all that generate gave by name."""

    @abstractmethod
    def take(self, model: Any, rows: JoinedRows, logits: Float[Tensor, "rows vocab"]) -> None:
        """Rows whose prompts have been read, and the scores of their next tokens."""


@dataclass(frozen=True, kw_only=True)
class JoinedDecoding(JoinableDecoding):
    """Decodes a batch, whatever joins it.

    Attributes:
        members: one for each row, in the rows' order.
        ends: tokens that end an answer.
        media: names of the inputs that hold pictures and videos.
        holding: a context in which the model's rows are these.
        newcomers: reads what may join so many columns of these, once a token; nothing where nothing may.
        order: by what rows are sorted.
    """

    members: list[Member]
    ends: Collection[int]
    media: Collection[str]
    holding: Callable[[Members], AbstractContextManager[None]]
    newcomers: Callable[[Members, int], Sequence[Read]]
    order: Callable[[Member], Any]

    def alone(self, model: Any, input_ids: Tensor, **named: Any) -> Tensor:
        """As generate does it."""
        return model._sample(input_ids, **named)

    def take(self, model: Any, rows: JoinedRows, logits: Float[Tensor, "rows vocab"]) -> None:
        """Token by token, until no member is left."""
        members, tokens = self.members, self._next(self.members, logits)
        while True:
            members, tokens = self._let_go(members, tokens, rows)
            if not members:
                return
            for new, read, first in self.newcomers(members, rows.columns):
                rows.join(read)
                members, tokens = [*members, *new], [*tokens, *self._next(new, first)]
                members, tokens = self._sorted(members, tokens, rows)
            members, tokens = self._let_go(members, tokens, rows)
            if not members:
                return
            with self.holding(members):
                logits = rows.step(model, torch.tensor(tokens, device=logits.device))
            tokens = self._next(members, logits)

    def _next(self, members: Members, logits: Float[Tensor, "rows vocab"]) -> list[int]:
        """Each row's next token, which it has taken."""
        tokens = [
            token if one.draws is None else one.text.draw(row, one.draws)
            for one, token, row in zip(members, likeliest(logits, [one.text for one in members]), logits, strict=True)
        ]
        for one, token in zip(members, tokens, strict=True):
            one.text.take(token, self.ends)
        return tokens

    def _let_go(self, members: list[Member], tokens: list[int], rows: JoinedRows) -> tuple[list[Member], list[int]]:
        """Without those that are over."""
        on = [place for place, one in enumerate(members) if one.text.reason is None]
        if on and len(on) < len(members):
            rows.keep(on)
        return [members[place] for place in on], [tokens[place] for place in on]

    def _sorted(self, members: list[Member], tokens: list[int], rows: JoinedRows) -> tuple[list[Member], list[int]]:
        """Adapter by adapter, so that the model's layers see few runs."""
        places = sorted(range(len(members)), key=lambda place: self.order(members[place]))
        if places != [*range(len(members))]:
            rows.keep(places)
        return [members[place] for place in places], [tokens[place] for place in places]


@dataclass
class Reading(JoinableDecoding):
    """Reads prompts and no more."""

    media: Collection[str]
    found: list[tuple[JoinedRows, Tensor]] = field(default_factory=list)

    def alone(self, model: Any, input_ids: Tensor, **named: Any) -> Tensor:
        """Raises ValueError: these cannot join, though the batch's first rows could."""
        raise ValueError("a prompt that cannot join the batch at hand")

    def take(self, model: Any, rows: JoinedRows, logits: Float[Tensor, "rows vocab"]) -> None:
        """Keeps them."""
        self.found.append((rows, logits))


def can_join(logits_processor: Any, generation_config: Any) -> bool:
    """Whether each token is chosen by the row's own sampling alone; what looks at the tokens before is generate's."""
    own = all(isinstance(one, RowSampling) for one in logits_processor)
    return own and not generation_config.stop_strings and generation_config.prefill_chunk_size is None
