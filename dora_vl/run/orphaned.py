"""Ends a rank whose launcher is gone: nobody would stop it, read its output or restart it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_SAVE = 120.0
"""After the polite signal, which finishes the step and saves; then the process ends whatever it does."""
DEEPSPEED_PARENT = "deepspeed.launcher.launch"
"""What the deepspeed launcher puts between itself and the ranks; it outlives a launcher that is killed."""
STATUS = 128 + signal.SIGTERM


def end_with_launcher(*, every: float = SECONDS_BETWEEN_LOOKS, patience: float = SECONDS_TO_SAVE) -> None:
    """Watches the launcher of this process from a thread of its own; without one it does nothing.

    A process that a person started is left alone when their shell closes. On Linux, where `/proc` says who is whose
    parent.
    """
    if "LOCAL_RANK" not in os.environ or not Path("/proc/self/stat").exists():
        return
    watched = _launchers()
    threading.Thread(target=_watch, args=(watched, every, patience), daemon=True, name="launcher").start()


def _watch(watched: Sequence[int], every: float, patience: float) -> None:
    while _launchers()[: len(watched)] == watched:
        time.sleep(every)
    logger.warning("the launcher (process %d) is gone: this rank saves what it can and ends", watched[-1])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(patience)
    os._exit(STATUS)


def _launchers() -> list[int]:
    """The parent, and behind DeepSpeed's own process in between the launcher itself."""
    parent = os.getppid()
    return [parent, _parent_of(parent)] if DEEPSPEED_PARENT in _command_of(parent) else [parent]


def _parent_of(process: int) -> int:
    """0 of one that is gone."""
    try:  # the name in brackets may hold anything, brackets too
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
