"""Requests for several adapters answered together: batches of what waits, one after another, in a thread of its own.

Whoever asks prepares a request in its own thread (prompt, pictures, checks), hands it in and receives its answer piece
by piece. A batch is formed of what waits when the one before is over, plus a few milliseconds; later requests join the
next. Nothing here knows of HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from dora_vl.app.row_decoding import Reason, RowText, Sampling, generate_options
from dora_vl.app.served_model import Asked, ServedModel
from dora_vl.backbones.families import ALIGNED
from dora_vl.backbones.video_inputs import Video
from dora_vl.data.dataset import Sample
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError, one_line
from dora_vl.evaluation.asker import Shown
from dora_vl.evaluation.predict import Decoding

log = logging.getLogger(__name__)


class TooManyRequests(UserError):
    """As many requests wait as may."""


class TooLate(UserError):
    """The answer was not there in the time that a request has."""


class Stopped(UserError):
    """The server is ending, or the adapter was taken away meanwhile."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How requests become batches.

    Attributes:
        batch_rows: most requests in a batch.
        batch_tokens: most tokens of a batch, prompts padded and answers at their longest; a single request may have
            more.
        window_seconds: how long the first request of a batch waits for others.
        waiting: most requests that wait.
        answer_seconds: longest time from handing a request in to the end of its answer.
        prompt_tokens: longest prompt; None: as the model takes.
    """

    batch_rows: int = 16
    batch_tokens: int = 32768
    window_seconds: float = 0.005
    waiting: int = 64
    answer_seconds: float = 300.0
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class Piece:
    """The next of an answer's text."""

    text: str


@dataclass(frozen=True)
class Finished:
    """An answer is over: why, its whole text, and how many tokens prompt and answer have."""

    reason: Reason
    text: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Piece | Finished | Failed
"""What becomes of a request: pieces, then one of the other two."""


@dataclass(frozen=True)
class Prepared:
    """A request whose prompt stands."""

    asked: Asked
    sample: Sample
    sampling: Sampling

    @property
    def tokens(self) -> int:
        """Prompt and longest answer."""
        return len(self.sample.input_ids) + self.sampling.max_new_tokens

    @property
    def media(self) -> frozenset[str]:
        """Names of the inputs that hold its pictures and videos."""
        own = frozenset(self.sample.inputs).difference(ALIGNED)
        return own | {"pictures"} if self.sample.pictures else own

    @property
    def pictures(self) -> int:
        """How many pictures it shows; at most 1 of a model with its own processor, where they are not told apart."""
        return len(self.sample.pictures) or bool(self.media)


@dataclass
class Answering:
    """A request that was handed in."""

    prepared: Prepared
    put: Callable[[Event], object]
    deadline: float
    over: bool = False
    """Whether it got its last event."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    pieces: int = 0

    def cancel(self) -> None:
        """Nobody waits for the answer any more; its row ends at the next token."""
        self.cancelled.set()

    @property
    def unwanted(self) -> bool:
        """Whether the answer comes too late, or for nobody."""
        return self.cancelled.is_set() or time.monotonic() > self.deadline

    def tell(self, event: Event) -> None:
        """Hands an event on; none after the last."""
        if self.over:
            return
        self.over = not isinstance(event, Piece)
        self.pieces += not self.over
        self.put(event)


class Engine:
    """Answers requests for a served model's adapters, many at once; `close` it, or use it in a `with`.

    Args:
        model: what is asked.
        settings: how requests become batches.
    """

    def __init__(self, model: ServedModel, settings: EngineSettings | None = None) -> None:
        self.model = model
        self.settings = settings or EngineSettings()
        self._waiting: deque[Answering] = deque()
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        """Tokenizers and processors are for one thread at a time."""
        self._running = threading.Lock()
        """Held by a batch, and by whoever changes the adapters."""
        self._loading = threading.Lock()
        self._closed = False
        generation = model.backbone.model.generation_config
        ends = None if generation is None else generation.eos_token_id
        self._ends = frozenset([] if ends is None else ends if isinstance(ends, list) else [ends])
        self._thread = threading.Thread(target=self._work, name="dora-vl engine", daemon=True)
        self._thread.start()

    # -- asking ------------------------------------------------------------------------------------------------

    def prepare(
        self,
        name: str,
        turns: Sequence[Turn],
        sampling: Sampling,
        *,
        pictures: Sequence[Image.Image] = (),
        videos: Sequence[Video] = (),
        fill: bool = False,
    ) -> Prepared:
        """A request for the model of this name, its prompt built and checked.

        Args:
            name: an adapter's, or the base's.
            turns: the talk so far, its last turn a question; `<image>` and `<video>` where pictures and videos go.
            sampling: how its answer is chosen.
            pictures: RGB.
            videos: frames with their times.
            fill: the answer may be shorter than `sampling` says where the model has not so many positions left.

        Raises:
            UnknownModel: there is none of this name.
            BadSample: it cannot be put to the model; the reason says why.
        """
        asked = self.model.asked(name)
        with self._encoding:
            sample = asked.prompts.sample(turns, Shown(pictures=tuple(pictures), videos=tuple(videos)))
        tokens, most = len(sample.input_ids), self.settings.prompt_tokens
        if most is not None and tokens > most:
            raise BadSample("request", f"its prompt takes {tokens} tokens, and {most} are allowed here; shorten it")
        positions = self.model.max_positions
        if fill and positions is not None:
            sampling = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, positions - tokens)))
        Decoding(max_new_tokens=sampling.max_new_tokens, max_positions=positions).check_room(tokens, "request")
        return Prepared(asked, sample, sampling)

    def submit(self, prepared: Prepared, put: Callable[[Event], object]) -> Answering:
        """Hands a request in; `put` receives its events in the engine's thread, and must not wait.

        Raises:
            TooManyRequests: as many wait as may.
            Stopped: the engine is closed, or the adapter is gone.
        """
        answering = Answering(prepared, put, time.monotonic() + self.settings.answer_seconds)
        with self._changed:
            if self._closed:
                raise Stopped("the server is ending")
            if len(self._waiting) >= self.settings.waiting:
                self._let_go()
            if len(self._waiting) >= self.settings.waiting:
                raise TooManyRequests(f"{len(self._waiting)} requests wait already, and no more may; try again later")
            self._refuse_gone(prepared.asked)
            self._waiting.append(answering)
            self._changed.notify()
        return answering

    def ask(self, prepared: Prepared) -> Iterator[Piece | Finished]:
        """Hands a request in and gives its events as they come; whoever stops reading ends it.

        Raises:
            UserError: it could not be answered.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        answering = self.submit(prepared, events.put)
        try:
            while not isinstance(event := events.get(), Finished):
                if isinstance(event, Failed):
                    raise event.error
                yield event
            yield event
        finally:
            answering.cancel()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def load(self, name: str, folder: Path) -> None:
        """Serves an adapter from now on; it is read beside the batches, and put in between two.

        Raises:
            UserError: as `ServedModel.read`.
        """
        with self._loading:
            read = self.model.read(name, folder)
            with self._running:
                self.model.put(*read)

    def unload(self, name: str) -> None:
        """Serves an adapter no longer; the batch at hand is finished, and requests that wait for it are told.

        Raises:
            UnknownModel: there is none of this name.
            UserError: it is the base.
        """
        with self._loading, self._running:
            self.model.drop(name)
            with self._changed:
                gone = [one for one in self._waiting if one.prepared.asked.name == name]
                self._waiting = deque(one for one in self._waiting if one.prepared.asked.name != name)
        for one in gone:
            one.tell(Failed(Stopped(f"adapter {name} was unloaded before its answer began")))

    def close(self) -> None:
        """Ends the thread after the next token; requests at hand are told."""
        with self._changed:
            self._closed = True
            left, self._waiting = list(self._waiting), deque()
            self._changed.notify()
        for one in left:
            one.tell(Failed(Stopped("the server is ending")))
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------------

    def _refuse_gone(self, asked: Asked) -> None:
        served = self.model.asked(asked.name) if asked.name is not None else asked
        if served is not asked:
            raise Stopped(f"adapter {asked.name} was loaded anew meanwhile; ask again")

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                with self._running:
                    self._answer([one for one in batch if self._is_served(one)])
            except Exception as error:
                log.exception("a batch of %d requests failed", len(batch))
                for one in batch:
                    one.tell(Failed(error))

    def _is_served(self, one: Answering) -> bool:
        """Whether its adapter is still there now that nobody can take it away; else it is told."""
        try:
            self._refuse_gone(one.prepared.asked)
        except UserError as error:
            one.tell(Failed(error))
        return not one.over

    def _next_batch(self) -> list[Answering] | None:
        """What is answered next; None when the engine is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            until = time.monotonic() + self.settings.window_seconds
            while len(self._waiting) < self.settings.batch_rows and not self._closed:
                left = until - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            if self._closed:
                return None
            return self._taken()

    def _let_go(self) -> None:
        """Gives those up that nobody waits for."""
        for one in self._waiting:
            if one.unwanted:
                _give_up(one)
        self._waiting = deque(one for one in self._waiting if not one.over)

    def _taken(self) -> list[Answering]:
        """Of those that wait the first, and those after it that fit beside it, in order."""
        batch: list[Answering] = []
        left: deque[Answering] = deque()
        self._let_go()
        for one in self._waiting:
            if len(batch) < self.settings.batch_rows and self._fits([*(b.prepared for b in batch), one.prepared]):
                batch.append(one)
            else:
                left.append(one)
        self._waiting = left
        return batch

    def _fits(self, rows: Sequence[Prepared]) -> bool:
        """Whether these can be one batch."""
        if len(rows) == 1:
            return True
        if len(rows) * max(row.tokens for row in rows) > self.settings.batch_tokens:
            return False
        shown = [row for row in rows if row.media]
        eyes = {row.asked.name if row.asked.alone else None for row in shown}
        encoder = self.model.encoder
        one_kind = encoder is not None and len({row.media for row in shown}) > 1 and encoder.one_kind_in_a_batch
        return len(eyes) <= 1 and not one_kind

    def _answer(self, batch: Sequence[Answering]) -> None:
        """Answers a batch; where it fails as a whole, its rows one by one, so that none suffers for another."""
        if not batch:
            return
        try:
            self._generate(batch)
        except Exception as error:
            if len(batch) <= 1:
                raise
            log.warning("a batch of %d requests failed (%s); one by one", len(batch), one_line(str(error), 200))
            for one in batch:
                self._answer_again(one, error)

    def _answer_again(self, one: Answering, error: Exception) -> None:
        if one.pieces or one.over:
            one.tell(Failed(error))
            return
        try:
            self._generate([one])
        except Exception as again:  # noqa: BLE001 - it is this request's alone
            log.warning("a request failed: %s", one_line(str(again), 200))
            one.tell(Failed(again))

    def _generate(self, batch: Sequence[Answering]) -> None:
        ordered = sorted(batch, key=lambda one: str(one.prepared.asked.name or ""))  # the base, then adapter by adapter
        rows = [self._row(one) for one in ordered]
        prepared = [one.prepared for one in ordered]
        assistant = self.model.assistant
        inputs = assistant.prompts.collate([one.sample for one in prepared], "left")
        most = max(one.sampling.max_new_tokens for one in prepared)
        options = generate_options(rows, self._ends, assistant.device)
        with self.model.rows([one.asked for one in prepared], [one.pictures for one in prepared]):
            assistant.new_ids(inputs, max_new_tokens=most, options=options)

    def _row(self, one: Answering) -> RowText:
        """A row that tells its end at once, whatever the others do."""
        prepared = one.prepared

        def done(row: RowText) -> None:
            if row.reason == "ended":
                _give_up(one, ending=self._closed)
                return
            one.tell(Finished(row.reason or "length", row.text, len(prepared.sample.input_ids), len(row.ids)))

        return RowText(
            prepared.sampling,
            prepared.asked.prompts.decode,
            write=lambda text: one.tell(Piece(text)),
            over=lambda: one.unwanted or self._closed,
            done=done,
        )


def _give_up(one: Answering, *, ending: bool = False) -> None:
    """Tells a request that there is no answer, or no more of it."""
    late = time.monotonic() > one.deadline
    reason = "the server is ending" if ending else "nobody waits for it" if not late else "it took too long"
    one.tell(Failed(TooLate(f"{reason}; ask for a shorter answer, or try again later") if late else Stopped(reason)))
