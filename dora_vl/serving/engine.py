"""Requests for several adapters answered together: batches of what waits, one after another, in a thread of its own.

Whoever asks prepares a request in its own thread (prompt, pictures, checks), hands it in and receives its answer piece
by piece. A batch is formed of what waits when the one before is over, plus a few milliseconds; what comes later joins
it at its next token where the model allows that, else the next batch. Nothing here knows of HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
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
from dora_vl.data.samples import BOOKKEEPING
from dora_vl.data.turns import Turn, placeholder_first
from dora_vl.errors import BadSample, UserError, one_line
from dora_vl.evaluation.ask import Shown, check_room
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
from dora_vl.serving.model import Entry, ServedModel, UnknownModel
from dora_vl.serving.options import Settings
from dora_vl.serving.scheduler import (
    ENDING,
    Answering,
    Event,
    Failed,
    Finished,
    Piece,
    Prepared,
    Scheduler,
    Stopped,
    unloaded,
)


@dataclass
class Member:
    """A request in a batch: its text, and where its draws come from (None: it takes the likeliest token)."""

    answering: Answering
    text: RowText
    draws: torch.Generator | None = None

    @property
    def share(self) -> tuple[str, float]:
        """By which rows are sorted, so that the model's layers see few runs: the base before every adapter."""
        return self.answering.prepared.share or ("", 0.0)


Members = Sequence[Member]
Read = tuple[list[Member], JoinedRows, Float[Tensor, "rows vocab"]]


def can_join(logits_processor: Any, generation_config: Any) -> bool:
    """Whether each token is chosen by the row's own sampling alone; what looks at the tokens before is generate's."""
    by_row = all(isinstance(processor, RowSampling) for processor in logits_processor)
    return by_row and not generation_config.stop_strings and generation_config.prefill_chunk_size is None


class ModelRows:
    """Puts requests to a model, as rows with their adapters, and tells each what becomes of it.

    Args:
        ending: whether nobody waits for any answer any more.
    """

    def __init__(self, model: ServedModel, ending: Callable[[], bool]) -> None:
        self._model = model
        self._ending = ending
        self.ends = end_tokens(model.backbone.model)

    def answer(self, batch: Sequence[Answering], newcomers: Callable[[Members, int], Sequence[Read]]) -> None:
        """Answers a batch, and what comes meanwhile.

        Args:
            newcomers: reads what may join so many columns of these members, once a token; nothing where nothing may.
        """
        members, inputs = self.begin(batch)
        most = max(member.text.sampling.max_new_tokens for member in members)
        self._run(members, inputs, most, partial(self._decode, members, newcomers))

    def read(self, come: Sequence[Answering]) -> Read:
        """Reads the prompts of requests that may join a batch. Raises ValueError: they cannot."""
        members, inputs = self.begin(come)
        read: list[tuple[JoinedRows, Tensor]] = []
        self._run(members, inputs, 1, lambda _, rows, logits: read.append((rows, logits)), joins=True)
        ((rows, logits),) = read
        return members, rows, logits

    def _decode(
        self,
        members: list[Member],
        newcomers: Callable[[Members, int], Sequence[Read]],
        model: Any,
        rows: JoinedRows,
        logits: Float[Tensor, "rows vocab"],
    ) -> None:
        """Token by token, until no member is left."""
        tokens = self._next(members, logits)
        while True:
            members, tokens = _without_finished(members, tokens, rows)
            if not members:
                return
            come = newcomers(members, rows.columns)
            for new, read, first in come:
                rows.join(read)
                members, tokens = [*members, *new], [*tokens, *self._next(new, first)]
            if come:
                members, tokens = _without_finished(members, tokens, rows)
                if not members:
                    return
            with self._holding(members):
                logits = rows.step(model, torch.tensor(tokens, device=logits.device))
            tokens = self._next(members, logits)

    def _next(self, members: Members, logits: Float[Tensor, "rows vocab"]) -> list[int]:
        """Each row's next token, which it has taken."""
        best = likeliest(logits, [member.text for member in members])
        tokens = [
            token if member.draws is None else member.text.draw(row, member.draws)
            for member, token, row in zip(members, best, logits, strict=True)
        ]
        for member, token in zip(members, tokens, strict=True):
            member.text.take(token, self.ends)
        return tokens

    def begin(self, batch: Sequence[Answering]) -> tuple[list[Member], Mapping[str, Any]]:
        """The rows of requests, the base first and then adapter by adapter, and their inputs."""
        assistant = self._model.assistant
        members = sorted(
            (Member(item, self._text(item), drawing(item.prepared.sampling, assistant.device)) for item in batch),
            key=lambda member: member.share,
        )
        return members, assistant.prompts.collate([member.answering.prepared.sample for member in members], "left")

    def _run(
        self,
        members: Members,
        inputs: Mapping[str, Any],
        most: int,
        take: Callable[[Any, JoinedRows, Float[Tensor, "rows vocab"]], None],
        *,
        joins: bool = False,
    ) -> None:
        """Has transformers' generate prepare a batch; nobody reads the ids that it returns.

        Args:
            take: gets rows whose prompts have been read, and the scores of their next tokens.
            joins: whether rows that cannot join others are an error; else generate decodes them as it does.
        """
        assistant = self._model.assistant
        media = frozenset(inputs).difference({"input_ids", *ALIGNED, *BOOKKEEPING})

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **arguments: Any,
        ) -> Tensor:
            if can_join(logits_processor, generation_config) and may_join(arguments, media):
                take(model, *JoinedRows.read(model, input_ids, generation_config, arguments))
                return input_ids
            if joins:
                raise ValueError("a prompt that cannot join the running batch")
            named = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, **arguments}
            return model._sample(input_ids, generation_config=generation_config, **named)

        options = generate_options([member.text for member in members], self.ends, assistant.device)
        pictures = [member.answering.prepared.pictures for member in members]
        with self._holding(members, pictures):
            assistant.new_ids(inputs, max_new_tokens=most, options={**options, "custom_generate": decode})

    def _holding(self, members: Members, pictures: Sequence[int] = ()) -> AbstractContextManager[None]:
        """Meanwhile the model's rows are these; without `pictures`, none that shows any."""
        prepared = [member.answering.prepared for member in members]
        strengths = [item.strength for item in prepared]
        return self._model.rows([item.entry for item in prepared], pictures or [0] * len(prepared), strengths)

    def _text(self, request: Answering) -> RowText:
        """A row that tells its end at once, whatever the others do."""
        prepared = request.prepared

        def done(row: RowText) -> None:
            if row.error is not None:
                request.tell(Failed(row.error))
            elif row.reason != "ended":
                request.tell(Finished(row.reason or "length", row.text, prepared.prompt_tokens, len(row.ids)))
            elif self._ending():
                request.tell(Failed(Stopped(ENDING)))
            else:
                request.give_up()

        return RowText(
            prepared.sampling,
            prepared.entry.prompts.growing_text(),
            write=lambda text: request.tell(Piece(text)),
            over=lambda: request.unwanted or self._ending(),
            done=done,
        )


def _without_finished(members: list[Member], tokens: list[int], rows: JoinedRows) -> tuple[list[Member], list[int]]:
    """Those that go on, adapter by adapter."""
    on = [index for index, member in enumerate(members) if member.text.reason is None]
    on.sort(key=lambda index: members[index].share)
    if on and on != [*range(len(members))]:
        rows.keep(on)
    return [members[index] for index in on], [tokens[index] for index in on]


log = logging.getLogger(__name__)
CHARACTERS_OF_A_TOKEN = 32
"""No text has as many for each of its tokens, but for few words among long runs of spaces."""


class Engine:
    """Answers requests for a served model's adapters, many at once; `close` it, or use it in a `with`."""

    def __init__(self, model: ServedModel, settings: Settings | None = None) -> None:
        self.model = model
        self.settings = settings or Settings()
        self._scheduler = Scheduler(self.settings, lambda: model.assistant.prompts.encoder.one_kind_in_a_batch)
        self._encoding = threading.Lock()
        """Tokenizers and processors are for one thread at a time."""
        self._loading = threading.Lock()
        self._rows = ModelRows(model, lambda: self._scheduler.closed)
        self._thread = threading.Thread(target=self._work, name="dora-vl engine", daemon=True)
        self._thread.start()

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
            fill: the answer may be shorter than `sampling` says where the model has not so many positions left.
            strength: how much of the adapter is applied, 0 nothing (the base, asked as the adapter was trained to be)
                and 1 all; beyond 1 more of the same.
        """
        entry, strength = self.model.entry(name), checked_strength(strength)
        if len(pictures) == 1 and not videos:  # as in training
            turns = [Turn(turn.role, placeholder_first(turn.text)) for turn in turns]
        positions, most = self.model.max_positions, self.settings.max_prompt_tokens
        allowed = min((limit for limit in (positions, most) if limit is not None), default=None)
        characters = sum(len(turn.text) for turn in turns)
        if allowed is not None and characters > allowed * CHARACTERS_OF_A_TOKEN:  # to tokenise them takes long
            reason = f"its {characters:,} characters are more than a prompt of {allowed:,} tokens can hold; shorten it"
            raise BadSample("request", reason)
        with self._encoding:
            sample = entry.prompts.sample(turns, Shown(pictures=tuple(pictures), videos=tuple(videos)))
        tokens = len(sample.input_ids)
        if most is not None and tokens > most:
            raise BadSample("request", f"its prompt takes {tokens} tokens, and {most} are allowed here; shorten it")
        if fill and positions is not None:
            sampling = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, positions - tokens)))
        check_room(tokens, sampling.max_new_tokens, positions, "request")
        return Prepared(entry, sample, sampling, strength)

    def submit(self, prepared: Prepared, put: Callable[[Event], object], deadline: float | None = None) -> Answering:
        """Hands a request in; `put` receives its events in the engine's thread, and must not wait.

        Args:
            deadline: when its answer comes too late, by `time.monotonic`; None: its time begins now.
        """
        deadline = time.monotonic() + self.settings.answer_seconds if deadline is None else deadline
        answering = Answering(prepared, put, deadline)
        self._scheduler.add(answering, partial(self._check_served, prepared.entry))
        return answering

    def ask(self, prepared: Prepared) -> Iterator[Piece | Finished]:
        """Hands a request in and gives its events as they come; whoever stops reading ends it."""
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
        return len(self._scheduler)

    def load(self, name: str, folder: Path) -> None:
        """Serves an adapter from now on; it is read beside the batches, and put in between two."""
        with self._loading:
            if (served := len(self.model.names) - 1) >= self.settings.max_adapters:
                raise UserError(f"{served} adapters are served, and no more may be loaded; unload one first")
            read = self.model.read(name, folder)
            self._scheduler.between_batches(lambda: self.model.put(*read))

    def unload(self, name: str) -> None:
        """Serves an adapter no longer; the batch at hand is finished, and requests that wait for it are told."""

        def drop() -> None:
            self.model.drop(name)
            for request in self._scheduler.remove(name):
                request.tell(Failed(unloaded(name)))

        with self._loading:
            self._scheduler.between_batches(drop)

    def close(self) -> None:
        """Ends the thread after the next token; requests at hand are told."""
        self._scheduler.close()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_served(self, entry: Entry) -> None:
        """Raises Stopped where an adapter is no longer the one that a request was prepared for."""
        if entry.name is None:
            return
        try:
            served = self.model.entry(entry.name)
        except UnknownModel:
            raise unloaded(entry.name) from None
        if served is not entry:
            raise Stopped(f"adapter {entry.name} was loaded anew meanwhile; ask again")

    # -- the thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._scheduler.next_batch()) is not None:
            if batch:  # else nobody waits any more for those that did
                self._answer(batch)

    def _answer(self, batch: Sequence[Answering]) -> None:
        """Answers a batch; where it fails as a whole, its rows one by one, so that none suffers for another."""
        joined: list[Answering] = []
        try:
            self._rows.answer(batch, partial(self._newcomers, joined))
            return
        except Exception as error:  # noqa: BLE001 - its rows are tried one by one
            failed = error
            _let_go(error)
        requests = [*batch, *joined]
        if len(requests) == 1:
            log.error("a request failed", exc_info=failed)
            requests[0].tell(Failed(failed))
            return
        log.warning("a batch of %d requests failed (%s); one by one", len(requests), one_line(str(failed), 200))
        for request in requests:
            if request.pieces or request.over:  # what was said cannot be taken back
                request.tell(Failed(failed))
            else:
                self._alone(request, lambda item: self._rows.answer([item], lambda *_: ()))

    def _alone(self, request: Answering, put: Callable[[Answering], Any]) -> Any:
        """What comes of putting one request to the model; where that fails it is told, and nobody else."""
        try:
            return put(request)
        except Exception as error:  # noqa: BLE001 - it is this request's alone
            log.warning("a request failed: %s", one_line(str(error), 200))
            _let_go(error)
            request.tell(Failed(error))
            return None

    def _newcomers(self, joined: list[Answering], running: Members, columns: int) -> Sequence[Read]:
        """What has come meanwhile, its prompts read; what cannot be read is told, and disturbs nobody."""
        if not self.settings.joining:
            return ()
        left = max(member.text.sampling.max_new_tokens - len(member.text.ids) for member in running)
        come = self._scheduler.next_joiners(len(running), columns, left)
        if not come:
            return ()
        try:
            read = [self._rows.read(come)]
        except Exception as error:  # noqa: BLE001 - the rows at hand go on
            log.warning("%d requests failed (%s); one by one", len(come), one_line(str(error), 200))
            _let_go(error)
            alone = (self._alone(request, lambda item: self._rows.read([item])) for request in come)
            read = [rows for rows in alone if rows is not None]
        joined += [member.answering for members, _, _ in read for member in members]
        return read


def _let_go(error: BaseException | None) -> None:
    """Frees what the calls that failed held, such as a batch's keys and values, which an error keeps as long as it is.

    Where memory was short, whoever tries again needs it.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
