"""Requests that wait, and which of them make the next batch."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dora_vl.app.answering import Answering, Failed, Prepared, Stopped, TooManyRequests

ENDING = "the server is ending"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How requests become batches.

    Attributes:
        batch_rows: most requests in a batch.
        batch_tokens: most tokens of a batch, prompts padded and answers at their longest; a single request may have
            more.
        window_seconds: how long the first request of a batch waits for others.
        waiting: most requests that wait.
        answer_seconds: longest time from handing a request in to the end of its answer.
        prompt_tokens: longest prompt; None: as the model takes.
        joining: requests come to a batch that is being answered, where the model allows it.
    """

    batch_rows: int = 16
    batch_tokens: int = 32768
    window_seconds: float = 0.005
    waiting: int = 64
    answer_seconds: float = 300.0
    prompt_tokens: int | None = None
    joining: bool = True


class WaitingRoom:
    """Where requests wait, in order; any thread may hand one in, one thread takes batches.

    Args:
        settings: how many may wait, and how large a batch is.
        one_kind: whether pictures and videos of this many kinds of inputs cannot be in one batch.
    """

    def __init__(self, settings: EngineSettings, one_kind: Callable[[], bool]) -> None:
        self._settings = settings
        self._one_kind = one_kind
        self._waiting: deque[Answering] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, one: Answering, check: Callable[[], object]) -> None:
        """Takes a request in, where `check` raises nothing while no other request comes or goes.

        Raises:
            TooManyRequests: as many wait as may.
            Stopped: the room is closed.
        """
        with self._changed:
            if self.closed:
                raise Stopped(ENDING)
            if len(self._waiting) >= self._settings.waiting:
                self._let_go()
            if len(self._waiting) >= self._settings.waiting:
                raise TooManyRequests(f"{len(self._waiting)} requests wait already, and no more may; try again later")
            check()
            self._waiting.append(one)
            self._changed.notify()

    def remove(self, name: str) -> list[Answering]:
        """The requests for an adapter, which wait no longer."""
        with self._changed:
            gone = [one for one in self._waiting if one.prepared.asked.name == name]
            self._waiting = deque(one for one in self._waiting if one.prepared.asked.name != name)
        return gone

    def close(self) -> None:
        """Lets nobody in any more, and tells those that wait."""
        with self._changed:
            self.closed = True
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for one in left:
            one.tell(Failed(Stopped(ENDING)))

    def next_batch(self) -> list[Answering] | None:
        """What is answered next: waits for a request, and a little for others; None when the room is closed."""
        rows = self._settings.batch_rows
        with self._changed:
            while not self._waiting and not self.closed:
                self._changed.wait()
            until = time.monotonic() + self._settings.window_seconds
            while len(self._waiting) < rows and not self.closed and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return None if self.closed else self._taken()

    def next_joiners(self, rows: int, columns: int, left: int) -> list[Answering]:
        """Those that may come to a running batch, none where the first of all that wait may not: it would wait longer.

        Args:
            rows: of the batch.
            columns: tokens that it has places for.
            left: most tokens that a row of it may still get.
        """

        def room(new: Sequence[Prepared]) -> bool:
            prompts = [len(one.sample.input_ids) for one in new]
            longest = max(columns, *prompts) + max(left, *(one.sampling.max_new_tokens for one in new))
            whole = rows + len(new)
            return whole <= self._settings.batch_rows and whole * longest <= self._settings.batch_tokens

        with self._changed:
            return self._taken(room) if self._waiting and not self.closed else []

    def _let_go(self) -> None:
        """Gives those up that nobody waits for."""
        for one in self._waiting:
            if one.unwanted:
                one.give_up()
        self._waiting = deque(one for one in self._waiting if not one.over)

    def _taken(self, also: Callable[[Sequence[Prepared]], bool] = lambda rows: True) -> list[Answering]:
        """The first of those that wait, and those after it that fit beside it, in order.

        Args:
            also: whether there is room for these; where it is not for the first, nothing is taken.
        """
        self._let_go()
        batch: list[Answering] = []
        left: deque[Answering] = deque()
        for one in self._waiting:
            rows = [*(other.prepared for other in batch), one.prepared]
            fits = len(rows) <= self._settings.batch_rows and self._fit(rows) and also(rows)
            if not fits and not batch:
                return []
            (batch if fits else left).append(one)
        self._waiting = left
        return batch

    def _fit(self, rows: Sequence[Prepared]) -> bool:
        """Whether these can be one batch."""
        if len(rows) == 1:
            return True
        if len(rows) * max(row.tokens for row in rows) > self._settings.batch_tokens:
            return False
        showing = [row for row in rows if row.media]
        eyes = {row.share if row.asked.alone else None for row in showing}
        kinds = {row.media for row in showing}
        return len(eyes) <= 1 and not (len(kinds) > 1 and self._one_kind())
