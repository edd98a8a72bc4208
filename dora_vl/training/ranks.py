"""The ranks of a launch watch each other: one that dies, or does not come, ends the others with one line.

Left alone, a rank that waits for another learns of its end from a traceback of the communication library, after half an
hour, or never. So each rank keeps one thread that needs no collective: it exchanges signs of life through the store of
the rendezvous, looks at the processes of its machine, and reads what other ranks announce.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import psutil
from torch.distributed import PrefixStore, Store, TCPStore
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_vl.errors import USER_ERROR_STATUS, UserError, is_communication, one_line
from dora_vl.run.launch import rank_and_ranks, several_ranks, wait_for_everyone

logger = logging.getLogger(__name__)

LOOK_SECONDS, FIRST_LOOK_SECONDS, STORE_SECONDS = 2.0, 0.1, 5.0
NEWS_SECONDS = 10.0
"""How long a rank whose connection broke waits to read why, and after which a rank gives no sign of life."""
SUSPENDED_SECONDS = 20.0
"""A look this late means that this process was suspended."""
STATUS = 1
NEWS, STUCK = "news", "stuck"
RESUME = "--resume last goes on from the last checkpoint"
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")
"""Code that a thread is in while it waits for other ranks."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life: where it runs, how many signs it gave, its step, and whether it waits for others.

    `namespace` is that of process numbers, which mean nothing in another one.
    """

    rank: int
    host: str
    process: int
    namespace: str = ""
    count: int = 0
    step: int = 0
    waits: bool = False
    left: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def is_gone(self) -> bool:
        """Whether the process has ended; for one of this machine."""
        try:
            return psutil.Process(self.process).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True


def is_timeout(error: Exception) -> bool:
    """Whether an error of communication is that others did not come in time, which only its words tell."""
    return any(words in str(error).lower() for words in ("timed out", "timeout"))


def waits_for_others() -> bool:
    """Whether another thread of this process is inside a collective, as far as Python sees it."""
    own = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        while frame is not None and thread != own:
            if any(part in frame.f_code.co_filename for part in COLLECTIVES):
                return True
            frame = frame.f_back
    return False


def who_did_not_come(signs: Sequence[Sign], silent: Sequence[Sign]) -> str:
    """The ranks that give no sign of life, else those that are behind, else those that wait for nobody."""
    step = max(sign.step for sign in signs)
    for missing, why in (
        (silent, "no sign of life"),
        ([sign for sign in signs if sign.step < step], f"behind step {step}"),
        ([sign for sign in signs if not sign.waits], "in no collective, as its stack says"),
    ):
        if 0 < len(missing) < len(signs):
            names = ", ".join(map(str, missing[:4])) + (", ..." if len(missing) > 4 else "")
            return f"{names} did not come ({why})"
    return "all ranks wait for each other, as their stacks say"


def answer_within(seconds: float, work: Callable[[], Answer]) -> Answer | None:
    """What the store answers; None where it does not in time: a connection whose link is gone waits for ever."""
    answers: list[Answer] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(work())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


class RankWatch(TrainerCallback):
    """One rank's share of the watch, from `start` to `close`, where the run ends well.

    After `limit` seconds without a step the ranks give up; counted from the first step on, to the last.
    """

    def __init__(self, store: Store, rank: int, ranks: int, *, limit: int) -> None:
        self._store, self._ranks, self._limit = store, ranks, limit
        namespace = Path("/proc/self/ns/pid")
        inside = str(namespace.readlink()) if namespace.exists() else ""
        self._own = Sign(rank, socket.gethostname(), os.getpid(), inside)
        self._count = self._step = 0
        self._signs: dict[int, Sign] = {}
        self._heard: dict[int, float] = {}
        """When each rank's count last grew, by this process's clock."""
        self._answered = time.monotonic()
        self._progress: float | None = None
        self._closed, self._giving, self._ending = threading.Event(), threading.Lock(), threading.RLock()
        self._gives_up = False
        self._sigterm_before: Any = signal.SIG_DFL

    def start(self) -> None:
        """Begins to give signs and to look."""
        self._sigterm_before = signal.signal(signal.SIGTERM, self._on_sigterm)
        threading.Thread(target=self._watch, daemon=True, name="rank watch").start()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The run moves: a step, or a part of one, is done."""
        self._step, self._progress = state.global_step, time.monotonic()

    on_substep_end = on_step_end = on_prediction_step = on_save = on_evaluate = on_step_begin

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What follows takes as long as it takes."""
        self._progress = None

    def close(self) -> None:
        """This rank needs the others no more."""
        self._closed.set()
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, self._sigterm_before)
        answer_within(STORE_SECONDS, self._give_sign)

    def announce(self, message: str, status: int = STATUS, *, rank: int | None = None) -> None:
        """Tells all ranks that `rank`, by default this one, ends; the first announcement counts."""
        news = {"rank": self._own.rank if rank is None else rank, "message": message, "status": status}
        answer_within(STORE_SECONDS, lambda: self._store.compare_set(NEWS, "", json.dumps(news)))

    def end(self, error: Exception) -> NoReturn:
        """Ends this rank after an error: its own with the traceback first, another's with one line."""
        if not is_communication(error):
            traceback.print_exception(error)
            self.announce(f"{self._own} ended with {type(error).__name__}: {one_line(str(error), 200)}; {RESUME}")
            self._let_others_read()
            self._leave("", speaks=False)
        if is_timeout(error):
            self._give_up()
        time.sleep(NEWS_SECONDS)  # the watch ends all this where it reads why
        with self._ending:  # or is about to, and this error is what it tells of
            traceback.print_exception(error)
            broken = f"the connection to another rank broke ({one_line(str(error), 200)}); {RESUME}"
            self._leave(broken, speaks=self._is_first_here())

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """A launcher ends the others of a rank that is gone: what they have to say comes first."""
        if self._gives_up:
            return
        if any(sign.is_gone() for sign in self._neighbours()):
            time.sleep(NEWS_SECONDS)  # the watch ends this rank before
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    # ---- the thread

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(LOOK_SECONDS if len(self._signs) == self._ranks else FIRST_LOOK_SECONDS):
            news = answer_within(STORE_SECONDS, self._exchange) or {}
            if news.get("rank", self._own.rank) != self._own.rank:
                self._end_after(news)
            for sign in self._neighbours():
                if sign.is_gone() and not sign.left and not news:
                    message = f"{sign} is gone without a word, as after kill -9 or where memory ran out; {RESUME}"
                    self.announce(message, rank=sign.rank)
                    self._end_after({"rank": sign.rank, "message": message, "status": STATUS})
            now = time.monotonic()
            if self._progress is not None and now - looked > SUSPENDED_SECONDS:
                self._progress = now
            looked = now
            if STUCK in news or (self._progress is not None and now - self._progress > self._limit):
                self._give_up()

    def _exchange(self) -> Mapping[str, Any]:
        """Gives a sign, reads those of the others; returns the news of a rank that ended, or that some are stuck."""
        self._give_sign()
        for rank in range(self._ranks):
            if (sign := self._read(f"sign/{rank}")) is not None:
                if rank not in self._signs or self._signs[rank].count != sign["count"]:
                    self._heard[rank] = time.monotonic()
                self._signs[rank] = Sign(**sign)
        self._answered = time.monotonic()
        return self._read(NEWS) or ({STUCK: True} if self._store.check([STUCK]) else {})

    def _give_sign(self) -> None:
        with self._giving:  # or the last sign of a rank that leaves could come before another
            self._count += 1
            left = self._closed.is_set()
            sign = replace(self._own, count=self._count, step=self._step, waits=waits_for_others(), left=left)
            self._store.set(f"sign/{self._own.rank}", json.dumps(asdict(sign)))

    def _read(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _end_after(self, news: Mapping[str, Any]) -> None:
        """Ends this rank after another, whose last words go first; not where the run ends meanwhile by itself."""
        if not self._closed.wait(LOOK_SECONDS):
            printed_already = news["rank"] == 0 and news["status"] == USER_ERROR_STATUS
            speaks = not printed_already and self._is_first_here(gone=news["rank"])
            self._leave(news["message"], speaks=speaks, status=news["status"])

    def _neighbours(self) -> list[Sign]:
        """The other ranks of this machine, as far as they are known."""
        here = (self._own.host, self._own.namespace)
        others = (sign for sign in self._signs.values() if sign.rank != self._own.rank)
        return [sign for sign in others if (sign.host, sign.namespace) == here]

    def _is_first_here(self, gone: object = None) -> bool:
        """Whether this rank speaks for its machine, where several have the same to say."""
        others = [sign.rank for sign in self._neighbours() if sign.rank != gone and not sign.is_gone()]
        return self._own.rank < min(others, default=self._ranks)

    def _give_up(self) -> NoReturn:
        """Every rank prints its stacks; the first that is there says which did not come."""
        self._ending.acquire()  # never released: another thread of this rank has nothing to add
        self._gives_up = True
        with tempfile.TemporaryFile() as file:  # all in one piece: the ranks write at the same time
            file.write(f"{self._own} waits at step {self._step}; its stack:\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            sys.stderr.flush()
            os.write(sys.stderr.fileno(), file.read())
        answer_within(STORE_SECONDS, lambda: self._store.set(STUCK, "1"))
        now = time.monotonic()
        silent = [
            sign for rank, sign in self._signs.items() if now - self._heard[rank] > NEWS_SECONDS and not sign.left
        ]
        if now - self._answered > NEWS_SECONDS:
            who, speaks = "the first rank's machine does not answer: is its link there?", self._is_first_here()
        else:
            who = who_did_not_come([*self._signs.values()], silent)
            speaks = self._own.rank == min(self._signs.keys() - {sign.rank for sign in silent}, default=0)
        self._let_others_read()
        self._leave(f"no step for {self._limit} s (training.ddp_timeout): {who}; {RESUME}", speaks=speaks)

    def _let_others_read(self) -> None:
        """The store ends with the first rank's process."""
        if self._own.rank == 0:
            time.sleep(2 * LOOK_SECONDS + 1)

    def _leave(self, line: str, *, speaks: bool, status: int = STATUS) -> NoReturn:
        """Without the interpreter's own end, which would wait for threads that wait for a rank that is gone."""
        with self._ending:
            if speaks:
                sys.stderr.write(f"error: {one_line(line)}\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def watch_ranks(*, limit: int) -> RankWatch | None:
    """The watch of a launch of several ranks, begun; None where there is none. The process group must be there."""
    rank, ranks = rank_and_ranks()
    if not several_ranks() or ranks == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=STORE_SECONDS)
    try:
        store = TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)
    except RuntimeError as error:
        logger.warning("the ranks do not watch each other, their store is out of reach: %s", one_line(str(error)))
        return None
    watch = RankWatch(PrefixStore("dora_vl", store), rank, ranks, limit=limit)
    watch.start()
    return watch


@contextlib.contextmanager
def ranks_end_together(*, limit: int) -> Iterator[RankWatch | None]:
    """An error in here ends all ranks: the one that has it says what it is, the others that it is gone.

    One in the input (`UserError`) is raised here as ever, and announced to those who would wait. `limit` is
    training.ddp_timeout.
    """
    watch = watch_ranks(limit=limit)
    if watch is None:
        yield None
        return
    try:
        yield watch
        wait_for_everyone()  # one that left now would leave the others without the store, and in doubt
    except UserError as error:
        watch.announce(str(error), USER_ERROR_STATUS)
        raise
    except Exception as error:
        watch.end(error)
        raise  # not reached: it ends the process
    finally:
        watch.close()
