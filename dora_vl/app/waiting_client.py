"""Whoever waits for an answer: whether it is still there, and how much of its time is left."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

from fastapi import Request

from dora_vl.app.answering import Stopped, too_late

LOOK_SECONDS = 0.5
"""How often it is looked whether a client that waits is still there."""


class WaitingClient:
    """The client of a request, from the moment that it came.

    Args:
        request: its body is read before `watched`.
        seconds: longest time from now to the end of its answer.
    """

    def __init__(self, request: Request, seconds: float) -> None:
        self._request = request
        self.deadline = time.monotonic() + seconds
        """By `time.monotonic`, as `Answering` has it."""
        self._gone = threading.Event()

    def check(self) -> None:
        """Goes on only where somebody waits; from any thread.

        Raises:
            Stopped: the client has gone away.
            TooLate: its time is over.
        """
        if self._gone.is_set():
            raise Stopped("the client has gone away")
        if time.monotonic() > self.deadline:
            raise too_late()

    @contextlib.asynccontextmanager
    async def watched(self, leave: Callable[[], object]) -> AsyncIterator[None]:
        """Meanwhile `leave` is called where the client goes away, or where waiting for it is broken off."""

        def gone() -> None:
            self._gone.set()
            leave()

        async def look() -> None:
            while not await self._request.is_disconnected():
                await asyncio.sleep(LOOK_SECONDS)
            gone()

        looking = asyncio.create_task(look())
        try:
            yield
        except BaseException:
            gone()
            raise
        finally:
            looking.cancel()
