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
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dora_vl.backbones.generation import end_tokens
from dora_vl.backbones.video_inputs import Video
from dora_vl.core.strength import checked_strength
from dora_vl.data.batches import ALIGNED
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, one_line
from dora_vl.evaluation.ask import check_room
from dora_vl.evaluation.prompt_inputs import BOOKKEEPING, Shown
from dora_vl.serving.answering import (
    ENDING,
    Answering,
    EngineSettings,
    Event,
    Failed,
    Finished,
    Piece,
    Prepared,
    Stopped,
    WaitingRoom,
    unloaded,
)
from dora_vl.serving.decoding import (
    JoinedRows,
    RowSampling,
    RowText,
    Sampling,
    drawing,
    generate_options,
    likeliest,
    may_join,
)
from dora_vl.serving.model import Asked, ServedModel, UnknownModel, refuse_endless

# A batch that takes requests in while it is decoded: a decoding method for transformers' generate.
#
# A request that comes reads its prompt at the next token and goes on with the others; one that is over leaves. Models
# whose rows cannot come to others (`joined_rows.may_join`) are decoded as generate does it, from the first to the last.


@dataclass
class Member:
    """A request in a batch: its text, and where its draws come from (None: it takes the likeliest token)."""

    answering: Answering
    text: RowText
    draws: torch.Generator | None = None


Members = Sequence[Member]
Read = tuple[list[Member], JoinedRows, Float[Tensor, "rows vocab"]]


class JoinableDecoding(ABC):
    """What transformers' generate calls to decode a batch (`custom_generate`); nobody reads the ids that it returns."""

    media: Collection[str]
    """Names of the inputs that hold pictures and videos."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **arguments: Any,
    ) -> Tensor:
        """Reads the prompts and takes them from there, or does what is done with rows that cannot join others."""
        if not can_join(logits_processor, generation_config) or not may_join(arguments, self.media):
            named = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
            return self.alone(model, input_ids, generation_config=generation_config, **named, **arguments)
        self.take(model, *JoinedRows.read(model, input_ids, generation_config, arguments))
        return input_ids

    @abstractmethod
    def alone(self, model: Any, input_ids: Tensor, **named: Any) -> Tensor:
        """Rows that cannot join others, with all that generate gave by name."""

    @abstractmethod
    def take(self, model: Any, rows: JoinedRows, logits: Float[Tensor, "rows vocab"]) -> None:
        """Rows whose prompts have been read, and the scores of their next tokens."""


@dataclass(frozen=True, kw_only=True)
class JoinedDecoding(JoinableDecoding):
    """Decodes a batch, whatever joins it.

    Attributes:
        members: one for each row, in the rows' order.
        ends: tokens that end an answer.
        media: names of the inputs that hold pictures and videos.
        holding: a context in which the model's rows are these.
        newcomers: reads what may join so many columns of these, once a token; nothing where nothing may.
        order: by what rows are sorted.
    """

    members: list[Member]
    ends: Collection[int]
    media: Collection[str]
    holding: Callable[[Members], AbstractContextManager[None]]
    newcomers: Callable[[Members, int], Sequence[Read]]
    order: Callable[[Member], Any]

    def alone(self, model: Any, input_ids: Tensor, **named: Any) -> Tensor:
        """As generate does it."""
        return model._sample(input_ids, **named)

    def take(self, model: Any, rows: JoinedRows, logits: Float[Tensor, "rows vocab"]) -> None:
        """Token by token, until no member is left."""
        members, tokens = self.members, self._next(self.members, logits)
        while True:
            members, tokens = self._let_go(members, tokens, rows)
            if not members:
                return
            for new, read, first in self.newcomers(members, rows.columns):
                rows.join(read)
                members, tokens = [*members, *new], [*tokens, *self._next(new, first)]
                members, tokens = self._sorted(members, tokens, rows)
            members, tokens = self._let_go(members, tokens, rows)
            if not members:
                return
            with self.holding(members):
                logits = rows.step(model, torch.tensor(tokens, device=logits.device))
            tokens = self._next(members, logits)

    def _next(self, members: Members, logits: Float[Tensor, "rows vocab"]) -> list[int]:
        """Each row's next token, which it has taken."""
        tokens = [
            token if one.draws is None else one.text.draw(row, one.draws)
            for one, token, row in zip(members, likeliest(logits, [one.text for one in members]), logits, strict=True)
        ]
        for one, token in zip(members, tokens, strict=True):
            one.text.take(token, self.ends)
        return tokens

    def _let_go(self, members: list[Member], tokens: list[int], rows: JoinedRows) -> tuple[list[Member], list[int]]:
        """Without those that are over."""
        on = [place for place, one in enumerate(members) if one.text.reason is None]
        if on and len(on) < len(members):
            rows.keep(on)
        return [members[place] for place in on], [tokens[place] for place in on]

    def _sorted(self, members: list[Member], tokens: list[int], rows: JoinedRows) -> tuple[list[Member], list[int]]:
        """Adapter by adapter, so that the model's layers see few runs."""
        places = sorted(range(len(members)), key=lambda place: self.order(members[place]))
        if places != [*range(len(members))]:
            rows.keep(places)
        return [members[place] for place in places], [tokens[place] for place in places]


@dataclass
class Reading(JoinableDecoding):
    """Reads prompts and no more."""

    media: Collection[str]
    found: list[tuple[JoinedRows, Tensor]] = field(default_factory=list)

    def alone(self, model: Any, input_ids: Tensor, **named: Any) -> Tensor:
        """Raises ValueError: these cannot join, though the batch's first rows could."""
        raise ValueError("a prompt that cannot join the batch at hand")

    def take(self, model: Any, rows: JoinedRows, logits: Float[Tensor, "rows vocab"]) -> None:
        """Keeps them."""
        self.found.append((rows, logits))


def can_join(logits_processor: Any, generation_config: Any) -> bool:
    """Whether each token is chosen by the row's own sampling alone; what looks at the tokens before is generate's."""
    own = all(isinstance(one, RowSampling) for one in logits_processor)
    return own and not generation_config.stop_strings and generation_config.prefill_chunk_size is None


# Requests as rows of a served model: their inputs, their adapters, and how each tells what becomes of it.


BASE = ("", 0.0)
"""Before every share of an adapter."""
TOKENS = frozenset({"input_ids", *ALIGNED, *BOOKKEEPING})
"""Of a batch's inputs, those that are no pictures and videos."""


class ModelRows:
    """Puts requests to a model.

    Args:
        model: what is asked.
        ending: whether nobody waits for any answer any more.
    """

    def __init__(self, model: ServedModel, ending: Callable[[], bool]) -> None:
        self._model = model
        self._ending = ending
        self.ends = end_tokens(model.backbone.model)
        """Tokens that end an answer."""

    def answer(self, batch: Sequence[Answering], newcomers: Callable[[Members, int], Sequence[Read]]) -> None:
        """Answers a batch, and what `newcomers` reads meanwhile; see `JoinedDecoding`."""
        members, inputs, media = self.begin(batch)
        decoding = JoinedDecoding(
            members=members, ends=self.ends, media=media, holding=self._holding, newcomers=newcomers, order=_share
        )
        most = max(one.text.sampling.max_new_tokens for one in members)
        self._run(members, inputs, most, decoding)

    def read(self, come: Sequence[Answering]) -> Read:
        """Reads the prompts of requests that may join a batch.

        Raises:
            ValueError: they cannot.
        """
        members, inputs, media = self.begin(come)
        reading = Reading(media)
        self._run(members, inputs, 1, reading)
        ((rows, logits),) = reading.found
        return members, rows, logits

    def begin(self, batch: Sequence[Answering]) -> tuple[list[Member], Mapping[str, Any], frozenset[str]]:
        """The rows of requests, the base first and then adapter by adapter, their inputs, and which are media."""
        assistant = self._model.assistant
        made = (Member(one, self._text(one), drawing(one.prepared.sampling, assistant.device)) for one in batch)
        members = sorted(made, key=_share)
        inputs = assistant.prompts.collate([one.answering.prepared.sample for one in members], "left")
        return members, inputs, frozenset(inputs).difference(TOKENS)

    def _run(self, members: Members, inputs: Mapping[str, Any], most: int, decoding: JoinableDecoding) -> None:
        assistant = self._model.assistant
        options = generate_options([one.text for one in members], self.ends, assistant.device)
        pictures = [one.answering.prepared.pictures for one in members]
        with self._holding(members, pictures):
            assistant.new_ids(inputs, max_new_tokens=most, options={**options, "custom_generate": decoding})

    def _holding(self, members: Members, pictures: Sequence[int] = ()) -> AbstractContextManager[None]:
        """Meanwhile the model's rows are these; without `pictures`, none that shows any."""
        prepared = [one.answering.prepared for one in members]
        strengths = [one.strength for one in prepared]
        return self._model.rows([one.asked for one in prepared], pictures or [0] * len(prepared), strengths)

    def _text(self, one: Answering) -> RowText:
        """A row that tells its end at once, whatever the others do."""
        prepared = one.prepared

        def done(row: RowText) -> None:
            if row.error is not None:
                one.tell(Failed(row.error))
            elif row.reason != "ended":
                one.tell(Finished(row.reason or "length", row.text, len(prepared.sample.input_ids), len(row.ids)))
            elif self._ending():
                one.tell(Failed(Stopped(ENDING)))
            else:
                one.give_up()

        return RowText(
            prepared.sampling,
            prepared.asked.prompts.growing_text(),
            write=lambda text: one.tell(Piece(text)),
            over=lambda: one.unwanted or self._ending(),
            done=done,
        )


def _share(one: Member) -> tuple[str, float]:
    """By which rows are sorted."""
    return one.answering.prepared.share or BASE


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
        check_room(tokens, sampling.max_new_tokens, positions, "request")
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
