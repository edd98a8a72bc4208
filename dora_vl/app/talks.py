"""The talks that people have on the page, so many of them, each under a key that nobody can guess."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict

from dora_vl.app.side_by_side import Talk
from dora_vl.errors import UserError

MOST_TALKS = 64
"""A talk holds its pictures; the one that was used longest ago goes."""


class Talks:
    """Talks by key, for several threads."""

    def __init__(self, most: int = MOST_TALKS) -> None:
        self._most = most
        self._talks: OrderedDict[str, Talk] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, talk: Talk) -> str:
        """Keeps a new talk; its key."""
        key = secrets.token_urlsafe(16)
        self.keep(key, talk)
        return key

    def get(self, key: str) -> Talk:
        """A talk as it was kept last; of no key an empty one.

        Raises:
            UserError: it is gone.
        """
        if not key:
            return Talk()
        with self._lock:
            if key not in self._talks:
                raise UserError("this chat is no longer here; show its pictures again, or press New chat")
            self._talks.move_to_end(key)
            return self._talks[key]

    def keep(self, key: str, talk: Talk) -> None:
        """Keeps how far a talk has come."""
        with self._lock:
            self._talks[key] = talk
            self._talks.move_to_end(key)
            while len(self._talks) > self._most:
                self._talks.popitem(last=False)
