"""Requests for several adapters answered together: batches of what waits, one after another, in a thread of its own.

Whoever asks prepares a request in its own thread (prompt, pictures, checks), hands it in and receives its answer piece
by piece. A batch is formed of what waits when the one before is over, plus a few milliseconds; what comes later joins
it at its next token where the model allows that, else the next batch. Nothing here knows of HTTP.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from dora_vl.app.answering import Answering, Event, Failed, Finished, Piece, Prepared, Stopped, unloaded
from dora_vl.app.joined_decoding import Members, Read
from dora_vl.app.model_rows import ModelRows
from dora_vl.app.prompt_limits import refuse_endless
from dora_vl.app.row_decoding import Sampling
from dora_vl.app.served_model import Asked, ServedModel, UnknownModel
from dora_vl.app.waiting_room import EngineSettings, WaitingRoom
from dora_vl.backbones.video_inputs import Video
from dora_vl.core.strength import checked_strength
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, one_line
from dora_vl.evaluation.asker import Shown
from dora_vl.evaluation.predict import Decoding

log = logging.getLogger(__name__)

GIVE_WAY_SECONDS = 0.001


class Engine:
    """Answers requests for a served model's adapters, many at once; `close` it, or use it in a `with`.

    Args:
        model: what is asked.
        settings: how requests become batches.
    """

    def __init__(self, model: ServedModel, settings: EngineSettings | None = None) -> None:
        self.model = model
        self.settings = settings or EngineSettings()
        self._room = WaitingRoom(self.settings, self._one_kind)
        self._encoding = threading.Lock()
        """Tokenizers and processors are for one thread at a time."""
        self._running = threading.Lock()
        """Held by a batch, and by whoever changes the adapters."""
        self._loading = threading.Lock()
        self._changing = False
        self._rows = ModelRows(model, lambda: self._room.closed)
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
        strength: float = 1.0,
    ) -> Prepared:
        """A request for the model of this name, its prompt built and checked.

        Args:
            name: an adapter's, or the base's.
            turns: the talk so far, its last turn a question; `<image>` and `<video>` where pictures and videos go.
            sampling: how its answer is chosen.
            pictures: RGB.
            videos: frames with their times.
            fill: the answer may be shorter than `sampling` says where the model has not so many positions left.
            strength: how much of the adapter is applied, 0 nothing (the base, asked as the adapter was trained to be)
                and 1 all; beyond 1 more of the same.

        Raises:
            UnknownModel: there is none of this name.
            BadSample: it cannot be put to the model; the reason says why.
            UserError: the strength is none.
        """
        asked, strength = self.model.asked(name), checked_strength(strength)
        positions, most = self.model.max_positions, self.settings.prompt_tokens
        allowed = min((one for one in (positions, most) if one is not None), default=None)
        refuse_endless(turns, allowed, asked.longest_token)
        with self._encoding:
            sample = asked.prompts.sample(turns, Shown(pictures=tuple(pictures), videos=tuple(videos)))
        tokens = len(sample.input_ids)
        if most is not None and tokens > most:
            raise BadSample("request", f"its prompt takes {tokens} tokens, and {most} are allowed here; shorten it")
        if fill and positions is not None:
            sampling = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, positions - tokens)))
        Decoding(max_new_tokens=sampling.max_new_tokens, max_positions=positions).check_room(tokens, "request")
        return Prepared(asked, sample, sampling, strength)

    def submit(self, prepared: Prepared, put: Callable[[Event], object], deadline: float | None = None) -> Answering:
        """Hands a request in; `put` receives its events in the engine's thread, and must not wait.

        Args:
            deadline: when its answer comes too late, by `time.monotonic`; None: its time begins now.

        Raises:
            TooManyRequests: as many wait as may.
            Stopped: the engine is closed, or the adapter is gone.
        """
        deadline = time.monotonic() + self.settings.answer_seconds if deadline is None else deadline
        answering = Answering(prepared, put, deadline)
        self._room.add(answering, partial(self._refuse_gone, prepared.asked))
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
        return len(self._room)

    def load(self, name: str, folder: Path) -> None:
        """Serves an adapter from now on; it is read beside the batches, and put in between two.

        Raises:
            UserError: as `ServedModel.read`.
        """
        with self._loading:
            read = self.model.read(name, folder)
            with self._between_batches():
                self.model.put(*read)

    def unload(self, name: str) -> None:
        """Serves an adapter no longer; the batch at hand is finished, and requests that wait for it are told.

        Raises:
            UnknownModel: there is none of this name.
            UserError: it is the base.
        """
        with self._loading, self._between_batches():
            self.model.drop(name)
            gone = self._room.remove(name)
        for one in gone:
            one.tell(Failed(unloaded(name)))

    def close(self) -> None:
        """Ends the thread after the next token; requests at hand are told."""
        self._room.close()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------------

    def _refuse_gone(self, asked: Asked) -> None:
        if asked.name is None:
            return
        try:
            served = self.model.asked(asked.name)
        except UnknownModel:
            raise unloaded(asked.name) from None
        if served is not asked:
            raise Stopped(f"adapter {asked.name} was loaded anew meanwhile; ask again")

    @contextlib.contextmanager
    def _between_batches(self) -> Iterator[None]:
        """No batch runs meanwhile, and the next waits, however many requests do."""
        self._changing = True
        with self._running:
            self._changing = False
            yield

    def _work(self) -> None:
        while (batch := self._room.next_batch()) is not None:
            while self._changing:  # a lock alone would come back to this thread at once
                time.sleep(GIVE_WAY_SECONDS)
            try:
                with self._running:
                    self._answer([one for one in batch if self._is_served(one)])
            except Exception as error:
                log.exception("a batch of %d requests failed", len(batch))
                _let_go(error)
                for one in batch:
                    one.tell(Failed(error))

    def _is_served(self, one: Answering) -> bool:
        """Whether its adapter is still there now that nobody can take it away; else it is told."""
        try:
            self._refuse_gone(one.prepared.asked)
        except Stopped as error:
            one.tell(Failed(error))
        return not one.over

    def _one_kind(self) -> bool:
        """Whether the model cannot tell pictures from videos of one batch."""
        encoder = self.model.encoder
        return encoder is not None and encoder.one_kind_in_a_batch

    def _answer(self, batch: Sequence[Answering]) -> None:
        """Answers a batch; where it fails as a whole, its rows one by one, so that none suffers for another."""
        if not batch:
            return
        joined: list[Answering] = []
        try:
            self._generate(batch, joined if self.settings.joining else None)
        except Exception as error:
            if len(batch) + len(joined) <= 1:
                raise
            whole = [*batch, *joined]
            log.warning("a batch of %d requests failed (%s); one by one", len(whole), one_line(str(error), 200))
            _let_go(error)
            for one in whole:
                self._answer_again(one, error)

    def _answer_again(self, one: Answering, error: Exception) -> None:
        if one.pieces or one.over:
            one.tell(Failed(error))
            return
        try:
            self._generate([one], None)
        except Exception as again:  # noqa: BLE001 - it is this request's alone
            log.warning("a request failed: %s", one_line(str(again), 200))
            _let_go(again)
            one.tell(Failed(again))

    def _generate(self, batch: Sequence[Answering], joined: list[Answering] | None) -> None:
        """Answers a batch, and what comes meanwhile.

        Args:
            joined: receives those that came; None: nobody may.
        """

        def newcomers(running: Members, columns: int) -> Sequence[Read]:
            return () if joined is None else self._newcomers(running, columns, joined)

        self._rows.answer(batch, newcomers)

    def _newcomers(self, running: Members, columns: int, joined: list[Answering]) -> Sequence[Read]:
        """What has come meanwhile, its prompts read; what cannot be read is told, and disturbs nobody."""
        if self._changing:  # whoever changes the adapters waits for this batch's end
            return ()
        left = max(one.text.sampling.max_new_tokens - len(one.text.ids) for one in running)
        taken = self._room.next_joiners(len(running), columns, left)
        come = [one for one in taken if self._is_served(one)]
        if not come:
            return ()
        try:
            found = [self._rows.read(come)]
        except Exception as error:  # noqa: BLE001 - the rows at hand go on
            log.warning("%d requests failed (%s); one by one", len(come), one_line(str(error), 200))
            _let_go(error)
            found = [one for each in come if (one := self._read_alone(each)) is not None]
        joined += [one.answering for members, _, _ in found for one in members]
        return found

    def _read_alone(self, one: Answering) -> Read | None:
        try:
            return self._rows.read([one])
        except Exception as error:  # noqa: BLE001 - it is this request's alone
            log.warning("a request failed: %s", one_line(str(error), 200))
            _let_go(error)
            one.tell(Failed(error))
            return None


def _let_go(error: BaseException | None) -> None:
    """Frees what the calls that failed held, such as a batch's keys and values, which an error keeps as long as it is.

    Where memory was short, whoever tries again needs it.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
