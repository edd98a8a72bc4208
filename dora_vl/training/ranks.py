"""The ranks of a launch look after each other: one that dies, or does not come, ends the others with one line.

Left alone, a rank that waits for another learns of its end by a traceback of the library that moves the bytes, or after
half an hour, or never. So each rank keeps a thread beside its work, which needs no collective: it writes a sign of life
to the store of the rendezvous, looks whether the processes of its machine are there, and reads what others announce.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore

from dora_vl.errors import USER_ERROR_STATUS, UserError, is_communication, one_line
from dora_vl.training.launch import rank_and_ranks, several_ranks, wait_for_everyone

# What ranks know of each other: where each runs, its signs of life, and which of them did not come.


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


logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_FIRST_LOOKS = 2.0, 0.1
SECONDS_FOR_THE_NEWS = 10.0
"""How long a rank whose connection broke waits to hear why, and the main thread may take to end by itself."""
SECONDS_ASLEEP = 20.0
"""A look that comes so late says that this process did not run."""
STORE_SECONDS = 5.0
STATUS = 1
ENDED, STUCK = "ended", "stuck"
RESUME = "--resume last goes on from the last checkpoint"


class RankWatch:
    """One rank's share of the watch; `start` begins it, `close` ends it where the run ends well.

    Args:
        limit: seconds without a step after which the ranks give up.
    """

    def __init__(self, store: Store, rank: int, ranks: int, *, limit: int) -> None:
        self._store, self._rank, self._ranks, self._limit = store, rank, ranks, limit
        self._lock, self._ending, self._over = threading.RLock(), threading.RLock(), threading.Event()
        self._places: dict[int, Place] = {}
        self._count = self._step = 0
        self._noted: float | None = None
        self._before: Any = signal.SIG_DFL
        namespace = Path("/proc/self/ns/pid")
        inside = str(namespace.readlink()) if namespace.exists() else ""
        self.place = Place(rank, socket.gethostname(), os.getpid(), inside)

    def start(self) -> None:
        """Says where this rank is, and begins to look.

        One thread asks the store, and stands still where its machine is gone; the other keeps the limit.
        """
        self._write(f"place/{self._rank}", asdict(self.place))
        self._before = signal.signal(signal.SIGTERM, self._told_to_end)
        for work in (self._give_signs, self._keep_limit):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()

    def note(self, step: int) -> None:
        """The run moves: a step, or a part of one, is done."""
        self._step, self._noted = step, time.monotonic()

    def rest(self) -> None:
        """What follows takes as long as it takes."""
        self._noted = None

    def close(self) -> None:
        """This rank needs the others no more."""
        self._over.set()
        if signal.getsignal(signal.SIGTERM) == self._told_to_end:
            signal.signal(signal.SIGTERM, self._before)
        last = Sign(self._count, self._step, waits=False, left=True)
        answer_within(STORE_SECONDS, lambda: self._write(f"sign/{self._rank}", asdict(last)))

    def announce(self, said: str, status: int = STATUS) -> None:
        """Tells all ranks that this one ends; the first announcement counts."""
        news = {"rank": self._rank, "said": said, "status": status}
        answer_within(STORE_SECONDS, lambda: self._announce(ENDED, news))

    def end(self, error: Exception) -> NoReturn:
        """Ends this rank after an error: its own with the traceback first, another's with one line."""
        own = not is_communication(error)
        if own:
            traceback.print_exception(error)
            self.announce(f"{self.place} ended with {type(error).__name__}: {one_line(str(error), 200)}; {RESUME}")
            self._let_others_read()
            self._leave("", speaks=False)
        if is_timeout(error):
            self._give_up()
        time.sleep(SECONDS_FOR_THE_NEWS)  # the thread ends all this where it hears why
        with self._ending:  # or is about to, and this error is what it tells of
            traceback.print_exception(error)
            broken = f"the connection to another rank broke ({one_line(str(error), 200)}); {RESUME}"
            self._leave(broken, speaks=self._is_first_here())

    def _told_to_end(self, number: int, frame: FrameType | None) -> None:
        """A launcher ends the others of a rank that is gone: what they have to say comes first."""
        if any(place.is_gone() for place in self._neighbours()):
            time.sleep(SECONDS_FOR_THE_NEWS)  # a thread of this rank ends all this before
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # ---- the threads

    def _give_signs(self) -> None:
        while not self._over.wait(self._pause()):
            with contextlib.suppress(RuntimeError):  # the store does not answer: its machine is gone, or its link
                self._look()

    def _pause(self) -> float:
        """Short until all ranks have said where they are: one may die in its first seconds."""
        return SECONDS_BETWEEN_LOOKS if len(self._places) == self._ranks else SECONDS_BETWEEN_FIRST_LOOKS

    def _keep_limit(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self._look_at_neighbours()
            now = time.monotonic()
            if self._noted is not None and now - looked > SECONDS_ASLEEP:
                self._noted = now  # all of it was suspended, as a scheduler does
            looked = now
            if self._noted is not None and now - self._noted > self._limit:
                self._give_up()

    def _look(self) -> None:
        self._count += 1
        self._write(f"sign/{self._rank}", asdict(Sign(self._count, self._step, waits=waits_for_others())))
        for rank in set(range(self._ranks)) - self._places.keys():
            if (found := self._read(f"place/{rank}")) is not None:
                self._places[rank] = Place(**found)
        if (news := self._read(ENDED)) is not None and news["rank"] != self._rank:
            self._end_after(news["rank"], news["said"], news["status"])
        if self._read(STUCK) is not None:
            self._give_up()

    def _look_at_neighbours(self) -> None:
        """Ends this rank where the process of another one of this machine is gone that did not say that it leaves."""
        for place in self._neighbours():
            if not place.is_gone():
                continue
            known = answer_within(STORE_SECONDS, lambda place=place: self._sign(place.rank).left or self._read(ENDED))
            if known:  # it has left, or has said why: the other thread ends this
                return
            said = f"{place} is gone without a word, as after kill -9 or where memory ran out; {RESUME}"
            news = {"rank": place.rank, "said": said, "status": STATUS}
            answer_within(STORE_SECONDS, lambda news=news: self._announce(ENDED, news))
            self._end_after(place.rank, said, STATUS)

    def _end_after(self, gone: int, said: str, status: int) -> None:
        """Ends this rank after another, whose last words go first; not where the run ends meanwhile by itself."""
        if not self._over.wait(SECONDS_BETWEEN_LOOKS):
            said_already = gone == 0 and status == USER_ERROR_STATUS
            self._leave(said, speaks=not said_already and self._is_first_here(gone), status=status)

    def _neighbours(self) -> list[Place]:
        """The other ranks of this machine, as far as they are known."""
        own = self.place.host, self.place.namespace
        return [one for one in self._places.values() if (one.host, one.namespace) == own and one.rank != self._rank]

    def _is_first_here(self, gone: int | None = None) -> bool:
        """Whether this rank speaks for its machine, where several have the same to say."""
        others = [one.rank for one in self._neighbours() if one.rank != gone and not one.is_gone()]
        return self._rank < min(others, default=self._ranks)

    def _give_up(self) -> NoReturn:
        """Every rank prints its stack; the first that is there says which did not come."""
        self._ending.acquire()  # never released: another thread of this rank has nothing to add
        _write_stacks(f"{self.place} waits at step {self._step}; its stack:\n")
        found = answer_within(4 * STORE_SECONDS, self._who_is_missing)
        self._let_others_read()
        who, speaks = found or ("the first rank's machine does not answer: is its link there?", self._is_first_here())
        self._leave(f"no step for {self._limit} s (training.ddp_timeout): {who}; {RESUME}", speaks=speaks)

    def _who_is_missing(self) -> tuple[str, bool]:
        """What can be said of the others after two further signs, and whether this rank is the first that is there."""
        self._announce(STUCK, {"rank": self._rank})
        before, until = self._signs(), time.monotonic() + 2 * SECONDS_BETWEEN_LOOKS + 1
        while time.monotonic() < until:  # those who are here go on giving signs
            self._count += 1
            self._write(f"sign/{self._rank}", asdict(Sign(self._count, self._step, waits=waits_for_others())))
            time.sleep(SECONDS_BETWEEN_LOOKS / 2)
        after = self._signs()
        first = min(rank for rank, sign in enumerate(after) if sign.count > before[rank].count)
        return who_did_not_come(before, after, self._names()), first == self._rank

    def _let_others_read(self) -> None:
        """The store ends with the first rank's process."""
        if self._rank == 0:
            time.sleep(2 * SECONDS_BETWEEN_LOOKS + 1)

    def _leave(self, line: str, *, speaks: bool, status: int = STATUS) -> NoReturn:
        """Without the interpreter's own end, which would wait for threads that wait for a rank that is gone."""
        with self._ending:
            if speaks:
                sys.stderr.write(f"error: {one_line(line)}\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    # ---- the store

    def _write(self, key: str, value: object) -> None:
        with self._lock:
            self._store.set(key, json.dumps(value))

    def _read(self, key: str) -> dict[str, Any] | None:
        with self._lock:
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _announce(self, key: str, value: object) -> None:
        with self._lock:
            self._store.compare_set(key, "", json.dumps(value))

    def _sign(self, rank: int) -> Sign:
        found = self._read(f"sign/{rank}")
        return Sign(0, 0, waits=False) if found is None else Sign(**found)

    def _signs(self) -> list[Sign]:
        return [self._sign(rank) for rank in range(self._ranks)]

    def _names(self) -> list[str]:
        return [str(self._places.get(rank, f"rank {rank}")) for rank in range(self._ranks)]


def _write_stacks(title: str) -> None:
    """All threads' stacks to stderr, in one piece: the ranks write at the same time."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), title.encode() + file.read())


_WATCHES: list[RankWatch] = []
"""That of this process, while it runs."""


def watch_ranks(*, limit: int) -> None:
    """Begins the watch of a launch of several ranks; the process group must be there.

    Args:
        limit: seconds without a step after which the ranks give up (`training.ddp_timeout`).
    """
    rank, ranks = rank_and_ranks()
    if not several_ranks() or ranks == 1 or _WATCHES:
        return
    where, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=STORE_SECONDS)
    try:
        store = TCPStore(where, port, is_master=False, timeout=wait, wait_for_workers=False)
    except RuntimeError as error:
        logger.warning("the ranks do not look after each other, their store is out of reach: %s", one_line(str(error)))
        return
    _WATCHES.append(RankWatch(PrefixStore("dora_vl", store), rank, ranks, limit=limit))
    _WATCHES[0].start()


def note_progress(step: int) -> None:
    """The run moves; nothing where there is no watch."""
    for watch in _WATCHES:
        watch.note(step)


def rest_from_steps() -> None:
    """No step is taken for a while."""
    for watch in _WATCHES:
        watch.rest()


@contextlib.contextmanager
def ranks_end_together() -> Iterator[None]:
    """An error in here ends all ranks: the one that has it says what it is, the others that it is gone.

    One in the input (`UserError`) is raised here as ever, and announced to those who would wait.
    """
    try:
        yield
        if _WATCHES:  # one that went now would leave the others without the store, and in doubt
            wait_for_everyone()
    except UserError as error:
        for watch in _WATCHES:
            watch.announce(str(error), USER_ERROR_STATUS)
        raise
    except Exception as error:
        for watch in _WATCHES:
            watch.end(error)
        raise
    finally:
        while _WATCHES:
            _WATCHES.pop().close()


# Ends a rank whose launcher is gone: nobody would stop it, read its output or restart it.


ORPHANED_SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_SAVE = 120.0
"""After the polite signal, which finishes the step and saves; then the process ends whatever it does."""
DEEPSPEED_PARENT = "deepspeed.launcher.launch"
"""What the deepspeed launcher puts between itself and the ranks; it outlives a launcher that is killed."""
ORPHANED_STATUS = 128 + signal.SIGTERM


def end_with_launcher(*, every: float = ORPHANED_SECONDS_BETWEEN_LOOKS, patience: float = SECONDS_TO_SAVE) -> None:
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
    os._exit(ORPHANED_STATUS)


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
