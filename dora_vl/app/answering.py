"""A request from its prompt to its last event, and what may become of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dora_vl.app.row_decoding import Reason, Sampling
from dora_vl.app.served_model import Asked
from dora_vl.backbones.families import ALIGNED
from dora_vl.core.strength import Share
from dora_vl.data.dataset import Sample
from dora_vl.errors import UserError


class TooManyRequests(UserError):
    """As many requests wait as may."""


class TooLate(UserError):
    """The answer was not there in the time that a request has."""


def too_late() -> TooLate:
    """That a request's time is over, wherever it was by then."""
    return TooLate("it took too long; ask for a shorter answer, or try again later")


class Stopped(UserError):
    """The server is ending, the adapter was taken away meanwhile, or nobody waits for the answer."""


def unloaded(name: str) -> Stopped:
    """That an adapter was there when its request came, and is not any more."""
    return Stopped(f"adapter {name} was unloaded before its answer began")


@dataclass(frozen=True)
class Piece:
    """The next of an answer's text."""

    text: str


@dataclass(frozen=True)
class Finished:
    """An answer is over: why, its whole text, and how many tokens prompt and answer have."""

    reason: Reason
    text: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Piece | Finished | Failed
"""What becomes of a request: pieces, then one of the other two."""


@dataclass(frozen=True)
class Prepared:
    """A request whose prompt stands.

    Attributes:
        strength: how much of the adapter is applied.
    """

    asked: Asked
    sample: Sample
    sampling: Sampling
    strength: float = 1.0

    @property
    def share(self) -> Share | None:
        """What its row has of an adapter; None is the base."""
        return self.asked.share(self.strength)

    @property
    def tokens(self) -> int:
        """Prompt and longest answer."""
        return len(self.sample.input_ids) + self.sampling.max_new_tokens

    @property
    def media(self) -> frozenset[str]:
        """Names of the inputs that hold its pictures and videos."""
        own = frozenset(self.sample.inputs).difference(ALIGNED)
        return own | {"pictures"} if self.sample.pictures else own

    @property
    def pictures(self) -> int:
        """How many pictures it shows; at most 1 of a model with its own processor, where they are not told apart."""
        return len(self.sample.pictures) or int(bool(self.media))


@dataclass
class Answering:
    """A request that was handed in.

    Attributes:
        put: receives its events.
        deadline: when its answer comes too late, by `time.monotonic`.
        over: whether it got its last event.
        pieces: how many pieces it got.
    """

    prepared: Prepared
    put: Callable[[Event], object]
    deadline: float
    over: bool = False
    pieces: int = 0
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the answer any more; its row ends at the next token."""
        self._cancelled.set()

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline

    @property
    def unwanted(self) -> bool:
        """Whether the answer comes too late, or for nobody."""
        return self._cancelled.is_set() or self.late

    def tell(self, event: Event) -> None:
        """Hands an event on; none after the last."""
        if self.over:
            return
        self.over = not isinstance(event, Piece)
        self.pieces += not self.over
        self.put(event)

    def give_up(self) -> None:
        """Tells that there is no answer, or no more of it: it took too long, or nobody waits for it."""
        if self.late:
            self.tell(Failed(too_late()))
        else:
            self.tell(Failed(Stopped("nobody waits for it any more")))
