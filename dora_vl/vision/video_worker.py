"""The process behind `VideoReader`: decodes one file after the other and sends the frames back.

Started as `python -m dora_vl.vision.video_worker FD`; the descriptor is one end of a pipe. It ends with its parent, and
by itself when a file takes too long, even where the decoder's C code hangs and the parent is gone.
"""

from __future__ import annotations

import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from dora_vl.data.media_limits import VIDEO_MEMORY
from dora_vl.errors import BadSample
from dora_vl.vision.video_backends import BackendMissing, Unreadable, import_backend
from dora_vl.vision.video_decoding import READY, decode

SPARE_SECONDS = 5.0  # the parent's own clock comes first
STATM = Path("/proc/self/statm")  # its sixth number: pages of data (proc(5))


def serve(connection: Connection) -> None:
    """Answers requests until the other end is closed."""
    while True:
        try:
            request, backend, seconds = connection.recv()
        except EOFError:
            return
        try:
            import_backend(backend)
            connection.send(READY)
            limit_memory(VIDEO_MEMORY)
            signal.setitimer(signal.ITIMER_REAL, seconds + SPARE_SECONDS)  # its default action ends the process
            for frame in decode(request, backend):
                connection.send(frame)
            answer = None
        except (BackendMissing, Unreadable, BadSample) as error:
            answer = error
        except MemoryError:
            answer = Unreadable(f"it takes more than {VIDEO_MEMORY / 2**30:.0f} GiB to decode")
        connection.send(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit_memory(more: int) -> None:
    """Lets this process take so many bytes more than it has; only where the system tells how many that are."""
    try:
        pages = int(STATM.read_text(encoding="ascii").split()[5])
    except (OSError, ValueError, IndexError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])))
    except BrokenPipeError:
        sys.exit(0)
