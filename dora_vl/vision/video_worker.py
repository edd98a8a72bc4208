"""The process behind `VideoReader`: decodes one file after the other and sends the frames back.

Started as `python -m dora_vl.vision.video_worker FD`; the descriptor is one end of a pipe. It ends with its parent, and
by itself when a file takes too long, even where the decoder's C code hangs and the parent is gone.
"""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from dora_vl.errors import BadSample
from dora_vl.vision.video_backends import BackendMissing, Unreadable, import_backend
from dora_vl.vision.video_decoding import READY, decode

SPARE_SECONDS = 5.0  # the parent's own clock comes first


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
            signal.setitimer(signal.ITIMER_REAL, seconds + SPARE_SECONDS)  # its default action ends the process
            for frame in decode(request, backend):
                connection.send(frame)
            answer = None
        except (BackendMissing, Unreadable, BadSample) as error:
            answer = error
        connection.send(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    try:
        serve(Connection(int(sys.argv[1])))
    except BrokenPipeError:
        sys.exit(0)
