"""A worker process with limits of time and memory, for decoding untrusted media and trying chat templates.

A file of 171 KB can hold a decoder for minutes, and nothing interrupts a C library from inside. So a job has limits of
CPU seconds, memory and silence, and is killed at any of them, or once nobody waits for its answer; the next job starts
another process. It has the rights of the user who started it, so it is not a sandbox. What it sends is JSON and pixels:
nothing of it is unpickled.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeAlias

from dora_vl.errors import one_line

JOBS: Mapping[str, str] = {
    "read_picture": "dora_vl.data.pictures",
    "read_video": "dora_vl.data.video",
    "try_template": "dora_vl.backbones.template_trial",
}
"""Maps functions that may run there to their modules. Each yields parts; its errors reach the parent."""
Part: TypeAlias = tuple[dict[str, Any], bytes]
"""Pairs JSON with the bytes that belong to it."""

LARGEST_PART = 2**24
"""No part that the process sends may be larger, so that it cannot fill the parent's memory at once."""
SILENT_TIMES = 3
"""A job may be silent for this many times its CPU seconds: it may also hang without using the processor."""
START_SECONDS = 60.0
"""A job may be silent for this many seconds more, while its libraries are imported on a busy machine."""
LOOK_SECONDS = 0.1
QUICK_SECONDS = 0.25
"""After this many CPU seconds a job yields to all others, where its process was started to do so (Linux)."""


class JobFailed(ValueError):
    """A job gave no result. `kind` is the class of the error that was raised there, or `ENDED`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


ENDED = "Ended"
"""Names the failure of a job whose process was killed or died."""


@dataclass
class Budget:
    """Limits what the jobs for one request or file may cost together; each takes from it.

    Attributes:
        seconds: of the processor.
        memory: bytes that the process may have beyond those it starts a job with (Linux).
        pixels: of all pictures and frames that come back.
        go_on: is called while the process works, and raises where nobody waits for it any more.
    """

    seconds: float
    memory: int
    pixels: int = 2**40
    go_on: Callable[[], object] = lambda: None


class LimitedProcess:
    """One process for one job after another, from one thread; it is started at the first, and again after a failure.

    It imports the libraries of `job` at its start. Where it `yields`, long jobs give way to other processes, and it is
    not `reusable` afterwards.
    """

    def __init__(self, job: str, *, yields: bool = False) -> None:
        self._first_job, self._yields = job, yields
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._owner = 0
        self.reusable = True

    def run(
        self, job: str, arguments: Mapping[str, Any], content: bytes = b"", *, budget: Budget
    ) -> Generator[Part, None, None]:
        """Yields the parts that a job sends; whoever stops reading ends the process. A failure is a `JobFailed`."""
        is_over = False
        try:
            connection = self.start()
            if budget.seconds <= 0:
                raise JobFailed(ENDED, "comes after all of the time was used up")
            request = {"job": job, "arguments": arguments, "seconds": budget.seconds, "memory": budget.memory}
            connection.send_bytes(json.dumps(request).encode())
            connection.send_bytes(content)
            quick = self._spent() + QUICK_SECONDS
            silence = START_SECONDS
            while True:
                deadline = time.monotonic() + silence + SILENT_TIMES * budget.seconds
                while not connection.poll(LOOK_SECONDS):
                    budget.go_on()
                    if time.monotonic() > deadline:
                        raise JobFailed(ENDED, f"takes more than {budget.seconds:.3g} s to read")
                    if self._yields and self.reusable and self._process and self._spent() > quick:
                        self.reusable = False
                        os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))
                message, part = json.loads(connection.recv_bytes(LARGEST_PART)), connection.recv_bytes(LARGEST_PART)
                silence = 0.0
                if "spent" in message:
                    is_over = True
                    budget.seconds -= message["spent"]
                    if "kind" in message:
                        raise JobFailed(str(message["kind"]), one_line(str(message["reason"])))
                    return
                yield message, part
        except (EOFError, OSError):
            raise JobFailed(ENDED, self._last_words(budget)) from None
        finally:
            if not is_over:
                self.close()

    def start(self) -> Connection:
        """Starts the process where there is none, and does not wait for it."""
        if self._connection and self._owner == os.getpid() and self._process and self._process.poll() is None:
            return self._connection
        self.close()
        self._connection, theirs = Pipe()
        packages = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(theirs.fileno()), self._first_job],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # FFmpeg writes a line for every damaged block
            env={**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        self._owner, self.reusable = os.getpid(), True
        return self._connection

    def _spent(self) -> float:
        """Returns the seconds of the processor that the process has used; 0 where the system does not tell them."""
        if self._process is None:
            return 0.0
        with contextlib.suppress(OSError, ValueError, IndexError):
            nanoseconds = Path(f"/proc/{self._process.pid}/schedstat").read_text("ascii").split()[0]
            return int(nanoseconds) / 1e9
        return 0.0

    def _last_words(self, budget: Budget) -> str:
        """Says why the process died, as far as its exit status shows."""
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process and self._process.wait(timeout=5)
        if status == -signal.SIGXCPU:
            return f"takes more than {budget.seconds:.3g} s of the processor to read"
        return f"ended the process that reads it (status {status})"

    def close(self) -> None:
        """Ends the process; the next job starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def __enter__(self) -> LimitedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_connection": None}


@cache
def one_process() -> LimitedProcess:
    """Returns this program's own process, for files that are looked at one after another; it ends with the program."""
    return LimitedProcess("read_picture")


# -- what runs there. No file of the current folder, which may have come from elsewhere, is taken for a library.

CHILD = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # the parent's to hear, and to end this
    "sys.path[:] = [path for path in sys.path if path]; "
    "from dora_vl.limited_process import serve; serve(int(sys.argv[1]), sys.argv[2])"
)
STATM = Path("/proc/self/statm")
"""Its sixth number counts the process's pages of data (proc(5))."""


def serve(descriptor: int, first_job: str) -> None:
    """Does one job after another, until the parent is gone; the system ends it where a job takes too long."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where memory is short, this process goes first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    importlib.import_module(JOBS[first_job])
    with Connection(descriptor) as parent, contextlib.suppress(EOFError, BrokenPipeError, ConnectionError):
        while True:
            request, content = json.loads(parent.recv_bytes()), parent.recv_bytes()
            before, end = time.process_time(), {}
            try:
                limit(request["seconds"], request["memory"])
                job = getattr(importlib.import_module(JOBS[request["job"]]), request["job"])
                for message, part in job(content=content, **request["arguments"]):
                    parent.send_bytes(json.dumps(message).encode())
                    parent.send_bytes(part)
            except MemoryError:
                end = {"kind": ENDED, "reason": f"takes more than {request['memory'] / 2**20:,.0f} MiB to read"}
            except Exception as error:  # noqa: BLE001 - it is the parent's to tell
                end = {"kind": type(error).__name__, "reason": one_line(str(error))}
            del content
            parent.send_bytes(json.dumps({"spent": time.process_time() - before, **end}).encode())
            parent.send_bytes(b"")


def limit(seconds: float, memory: int) -> None:
    """Lets this process use `seconds` of the processor and `memory` bytes more than it has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {resource.RLIMIT_CPU: math.ceil(used.ru_utime + used.ru_stime + seconds)}
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(STATM.read_text(encoding="ascii").split()[5])
        limits[resource.RLIMIT_DATA] = pages * resource.getpagesize() + memory
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
