"""What ranks know of each other: where each runs, its signs of life, and which of them did not come."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

TIMED_OUT = ("timed out", "timeout")
"""In what gloo, NCCL and the store say of a wait that took too long; no type tells it from their other errors. Gloo
says "Application timeout caused pair closure" of whatever else waited on that connection.
"""
Answer = TypeVar("Answer")
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")
"""Code that a thread is in while it waits for other ranks."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    process: int
    namespace: str
    """Of process numbers: those of another one mean nothing here."""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def is_gone(self) -> bool:
        """Whether the process has ended; for one of this machine."""
        try:
            state = Path(f"/proc/{self.process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return Path("/proc/self/stat").exists()
        return state in ("Z", "X")


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life: how many it has given, the steps it has taken, and whether it waits for others."""

    count: int
    step: int
    waits: bool
    left: bool = False


def is_timeout(error: Exception) -> bool:
    """Whether an error of communication is that others did not come in time."""
    return any(words in str(error).lower() for words in TIMED_OUT)


def waits_for_others() -> bool:
    """Whether a thread of this process is inside a collective, as far as Python sees it."""
    own = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        while frame is not None and thread != own:
            if any(part in frame.f_code.co_filename for part in COLLECTIVES):
                return True
            frame = frame.f_back
    return False


def who_did_not_come(before: Sequence[Sign], after: Sequence[Sign], places: Sequence[str]) -> str:
    """The ranks that give no sign of life, else those that are behind, else those that wait for nobody."""
    silent = [rank for rank, sign in enumerate(after) if sign.count == before[rank].count and not sign.left]
    step = max(sign.step for sign in after)
    behind = [rank for rank, sign in enumerate(after) if sign.step < step]
    elsewhere = [rank for rank, sign in enumerate(after) if not sign.waits]
    for ranks, why in (
        (silent, "no sign of life"),
        (behind, f"behind step {step}"),
        (elsewhere, "in no collective, as its stack says"),
    ):
        if ranks and len(ranks) < len(after):
            named = ", ".join(places[rank] for rank in ranks[:4]) + (", ..." if len(ranks) > 4 else "")
            return f"{named} did not come ({why})"
    return "all ranks wait for each other, as their stacks say"


def answer_within(seconds: float, work: Callable[[], Answer]) -> Answer | None:
    """What the store answers; None where it does not in time: a connection whose link is gone waits for ever."""
    answers: list[Answer] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(work())

    thread = threading.Thread(target=ask, daemon=True, name="asks")
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
