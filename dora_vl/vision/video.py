"""Frames of a video file as pictures, whatever the file does to its decoder.

`read_frames` decodes in this process. `VideoReader` has a process of its own do it, because decoders hang, crash and
leak on files from the wild: a file that takes too long or takes the decoder with it is one `BadSample`, and the next
file is read by a fresh process.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from PIL import Image

from dora_vl.data.examples import Clip
from dora_vl.data.media import MediaFolder
from dora_vl.data.media_limits import VIDEO_SECONDS
from dora_vl.errors import BadSample, UserError
from dora_vl.vision.frame_sampling import Sampling
from dora_vl.vision.video_backends import BACKENDS, BackendMissing, Unreadable
from dora_vl.vision.video_decoding import (
    READY,
    Decoded,
    Frames,
    Kept,
    Request,
    clip_path,
    decode,
    gathered,
    no_backend_reads,
)

log = logging.getLogger(__name__)

START_SECONDS = 300.0  # for the process and its library: torch alone takes a minute on a busy machine


def read_frames(
    root: Path | MediaFolder, clip: Clip, sampling: Sampling, *, backends: Sequence[str] = tuple(BACKENDS)
) -> Frames[Image.Image]:
    """Decodes in this process: for files that are known to be sound. `VideoReader` is for all others.

    Raises:
        BadSample: no backend can read the file, or it has no such part; each backend's reason is named.
        UserError: no backend is installed.
    """
    request = Request(str(clip_path(root, clip)), clip, sampling)
    reasons: dict[str, Exception] = {}
    for backend in backends:
        try:
            return gathered(decode(request, backend), lambda picture: picture)
        except (BackendMissing, Unreadable) as error:
            reasons[backend] = error
    raise no_backend_reads(clip, reasons)


class VideoReader:
    """Reads videos in a process of its own, which is replaced when it hangs or dies. Use it from one thread.

    It can be sent to data workers; each starts its own process, at its first file.

    Args:
        backends: which libraries to try, in this order.
        limit_seconds: longest time for one file in one backend; then the process is killed and the file given up.
    """

    def __init__(self, *, backends: Sequence[str] = tuple(BACKENDS), limit_seconds: float = VIDEO_SECONDS) -> None:
        unknown = [name for name in backends if name not in BACKENDS]
        if unknown or not backends:
            raise UserError(f"video backends {list(backends)}: there are {', '.join(BACKENDS)}")
        self._backends = tuple(backends)
        self._limit = limit_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._missing: dict[str, Exception] = {}

    def read(self, root: Path | MediaFolder, clip: Clip, sampling: Sampling) -> Frames[Image.Image]:
        """The frames as RGB pictures; see `read_prepared`."""
        return self.read_prepared(root, clip, sampling, lambda picture: picture)

    def read_prepared(
        self,
        root: Path | MediaFolder,
        clip: Clip,
        sampling: Sampling,
        prepare: Callable[[Image.Image], Kept],
    ) -> Frames[Kept]:
        """The frames, each turned into something smaller as it comes, so that a long clip need not fit in memory.

        Args:
            root: the folder that the clip's path is relative to.
            clip: the file, or a part of it.
            sampling: which frames.
            prepare: what is kept of each frame.

        Raises:
            BadSample: no backend can read the file in time, or it has no such part.
            UserError: no backend is installed.
        """
        request = Request(str(clip_path(root, clip)), clip, sampling)
        reasons: dict[str, Exception] = dict(self._missing)
        for backend in self._backends:
            if backend in self._missing:
                continue
            try:
                return gathered(self._ask(request, backend), prepare)
            except BackendMissing as error:
                log.info("videos are read without %s: %s", backend, error)
                reasons[backend] = self._missing[backend] = error
            except Unreadable as error:
                reasons[backend] = error
            except TimeoutError:
                raise BadSample(
                    clip.path, f"video {clip.path} was not read within {self._limit:g} s ({backend}); it is left out"
                ) from None
        raise no_backend_reads(clip, reasons)

    def _ask(self, request: Request, backend: str) -> Iterator[Decoded]:
        """The frames as they come; the clock starts when the process has the backend's library."""
        connection = self._connected()
        deadline = time.monotonic() + START_SECONDS
        finished = False
        try:
            connection.send((request, backend, self._limit))
            while not finished:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                answer = connection.recv()
                finished = answer is None or isinstance(answer, Exception)
                if isinstance(answer, Exception):
                    raise answer
                if answer == READY:
                    deadline = time.monotonic() + self._limit
                elif answer is not None:
                    yield answer
        except TimeoutError:
            raise
        except (EOFError, OSError):
            raise Unreadable(self._last_words()) from None
        finally:
            if not finished:  # what is still in the pipe belongs to this file
                self.close()

    def _connected(self) -> Connection:
        if self._process is None or self._process.poll() is not None or self._connection is None:
            self.close()
            self._connection, theirs = Pipe()
            command = [sys.executable, "-m", "dora_vl.vision.video_worker", str(theirs.fileno())]
            packages = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # FFmpeg writes a line for every damaged block
                env={**os.environ, "PYTHONPATH": packages},
            )
            theirs.close()
        return self._connection

    def _last_words(self) -> str:
        """Why the process died, as far as its exit status tells; it is replaced at the next file."""
        if self._process is None:
            return "the decoder's process is gone"
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "the decoder's process no longer answers"
        return f"the decoder crashed (signal {-status})" if status < 0 else f"the decoder ended with status {status}"

    def close(self) -> None:
        """Ends the process; the next file starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.__dict__.get("_process") is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_connection": None}
