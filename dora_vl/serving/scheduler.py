"""A request from its prompt to its last event, and which waiting requests form the next batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dora_vl.core.strength import AppliedAdapter
from dora_vl.data.batches import ALIGNED
from dora_vl.data.samples import Sample
from dora_vl.errors import UserError
from dora_vl.serving.decoding import Reason, Sampling
from dora_vl.serving.model import ServedEntry
from dora_vl.serving.options import ServerSettings


class TooManyRequests(UserError):
    """The queue is full."""


class TooLate(UserError):
    """The answer was not ready in the time that a request has."""

    def __init__(self, message: str = "it took too long; ask for a shorter answer, or try again later") -> None:
        super().__init__(message)


class Stopped(UserError):
    """The server is ending, or nobody waits for the answer."""


@dataclass(frozen=True)
class TextPiece:
    """The next piece of an answer's text."""

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


Event = TextPiece | Finished | Failed
"""A request's events are pieces, then one of the other two."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request with its prompt encoded; `strength` says how much of the adapter is applied."""

    entry: ServedEntry
    sample: Sample
    sampling: Sampling
    strength: float = 1.0

    @property
    def applied(self) -> AppliedAdapter | None:
        """Returns the adapter and how much of it is applied; None is the base."""
        return self.entry.applied(self.strength)

    @property
    def prompt_tokens(self) -> int:
        """Counts the prompt's tokens."""
        return len(self.sample.input_ids)

    @property
    def tokens(self) -> int:
        """Counts the tokens of the prompt and the longest answer."""
        return self.prompt_tokens + self.sampling.max_new_tokens

    @property
    def media(self) -> frozenset[str]:
        """Names the inputs that hold its pictures and videos."""
        return frozenset(self.sample.inputs).difference(ALIGNED)

    @property
    def pictures(self) -> int:
        """Counts the pictures that it shows; at most 1 for a model whose inputs do not tell them apart."""
        pixels = self.sample.inputs.get("pixel_values")
        return len(pixels) if isinstance(pixels, Tensor) and pixels.dim() == 4 else int(bool(self.media))


@dataclass
class SubmittedRequest:
    """A submitted request; `put` receives its events."""

    prepared: PreparedRequest
    put: Callable[[Event], object]
    deadline: float
    """After this time, by `time.monotonic`, its answer comes too late."""
    is_finished: bool = False
    pieces: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        """Ends the answer at the next token, since nobody waits for it any more."""
        self.cancelled = True

    @property
    def is_expired(self) -> bool:
        """Tells whether the answer comes too late, or for nobody."""
        return self.cancelled or time.monotonic() > self.deadline

    def send(self, event: Event) -> None:
        """Passes an event on; none after the last."""
        if self.is_finished:
            return
        self.is_finished = not isinstance(event, TextPiece)
        self.pieces += not self.is_finished
        self.put(event)

    def fail(self) -> None:
        """Reports that the answer ends here: it took too long, or nobody waits for it."""
        late = time.monotonic() > self.deadline
        self.send(Failed(TooLate() if late else Stopped("nobody waits for it any more")))


ENDING = "the server is ending"


class Scheduler:
    """The requests that wait, in order. Any thread may add one; one thread, the engine's, takes batches.

    Args:
        one_kind: returns True where the model cannot tell pictures from videos of one batch.
    """

    def __init__(self, settings: ServerSettings, one_kind: Callable[[], bool]) -> None:
        self._settings = settings
        self._one_kind = one_kind
        self._waiting: deque[SubmittedRequest] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: SubmittedRequest) -> None:
        """Adds a request to the queue."""
        with self._changed:
            if self.closed:
                raise Stopped(ENDING)
            if len(self._waiting) >= self._settings.waiting:
                self._drop_unwanted()
            if len(self._waiting) >= self._settings.waiting:
                raise TooManyRequests(f"{len(self._waiting)} requests are waiting, the most allowed; try again later")
            self._waiting.append(request)
            self._changed.notify()

    def close(self) -> None:
        """Refuses further requests, and tells those that wait."""
        with self._changed:
            self.closed = True
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for request in left:
            request.send(Failed(Stopped(ENDING)))

    def next_batch(self) -> list[SubmittedRequest] | None:
        """Waits for a request, and briefly for others; None once the scheduler is closed."""
        with self._changed:
            while not (self._waiting or self.closed):
                self._changed.wait()
            until, most = time.monotonic() + self._settings.window_ms / 1000, self._settings.batch
            while len(self._waiting) < most and not self.closed and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return None if self.closed else self._take()

    def next_joiners(self, running: int, columns: int, left: int) -> list[SubmittedRequest]:
        """Returns the requests that may join a running batch; none if the first in the queue may not.

        Args:
            running: how many requests the batch has.
            columns: tokens that its cache holds for each.
            left: most tokens that one of them may still get.
        """

        def room(new: Sequence[PreparedRequest]) -> bool:
            longest = max(columns, *(prepared.prompt_tokens for prepared in new))
            longest += max(left, *(prepared.sampling.max_new_tokens for prepared in new))
            count = running + len(new)
            return count <= self._settings.batch and count * longest <= self._settings.batch_tokens

        with self._changed:
            return self._take(room) if self._waiting and not self.closed else []

    def _drop_unwanted(self) -> None:
        for request in self._waiting:
            if request.is_expired:
                request.fail()
        self._waiting = deque(request for request in self._waiting if not request.is_finished)

    def _take(
        self, room: Callable[[Sequence[PreparedRequest]], bool] = lambda requests: True
    ) -> list[SubmittedRequest]:
        """Takes the first waiting request, and later ones that fit beside it; none if there is no room for it."""
        self._drop_unwanted()
        batch: list[SubmittedRequest] = []
        left: deque[SubmittedRequest] = deque()
        for request in self._waiting:
            together = [*(other.prepared for other in batch), request.prepared]
            fits = len(together) <= self._settings.batch and self._fit(together) and room(together)
            if not fits and not batch:
                return []
            (batch if fits else left).append(request)
        self._waiting = left
        return batch

    def _fit(self, requests: Sequence[PreparedRequest]) -> bool:
        if len(requests) == 1:
            return True
        if len(requests) * max(request.tokens for request in requests) > self._settings.batch_tokens:
            return False
        showing = [request for request in requests if request.media]
        vision_adapters = {request.applied if request.entry.alone else None for request in showing}
        kinds = {request.media for request in showing}
        return len(vision_adapters) <= 1 and not (len(kinds) > 1 and self._one_kind())
