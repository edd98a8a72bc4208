"""Lines that are written while a live view stands at the bottom of a terminal: they go above it, not through it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast


class LinesAbove:
    """Stands for a terminal's stream: whole lines are handed on, all else is the stream's own.

    A process forked from this one, such as a data worker, has no view and writes to the stream itself. What has drawn
    over its line (`\\r`, as progress bars do) is told as it was last.

    Args:
        tell: takes a line, without its end.
    """

    def __init__(self, stream: TextIO, tell: Callable[[str], None]) -> None:
        self._stream = stream
        self._tell = tell
        self._process = os.getpid()
        self._begun = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Tells each line that is whole now."""
        if os.getpid() != self._process:
            return self._stream.write(text)
        *whole, begun = (self._begun + text).split("\n")
        self._begun = begun[begun.rfind("\r") + 1 :]
        for line in whole:
            self._tell(line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes one after another."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """A line that has no end yet waits for it."""
        if os.getpid() != self._process:
            self._stream.flush()

    def finish(self) -> None:
        """Tells a line that never got its end."""
        if self._begun:
            self._tell(self._begun)
            self._begun = ""


@contextlib.contextmanager
def lines_above(tell: Callable[[str], None]) -> Iterator[None]:
    """What is written to stdout and stderr where they are terminals, by loggers too, goes to `tell`, line by line."""
    out, err = sys.stdout, sys.stderr
    own = {id(stream): LinesAbove(stream, tell) for stream in (out, err) if stream.isatty()}
    handlers = [one for one in _stream_handlers() if id(one.stream) in own]  # they keep the stream they were made with
    before = [one.stream for one in handlers]
    for one in handlers:
        one.setStream(own[id(one.stream)])
    sys.stdout, sys.stderr = (cast(TextIO, own.get(id(stream), stream)) for stream in (out, err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for one, stream in zip(handlers, before, strict=True):
            one.setStream(stream)
        for stream in own.values():
            stream.finish()


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler)  # some ask for sys.stderr each time
    ]
