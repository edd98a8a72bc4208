"""One question put to several models side by side, turn after turn, for several people at once.

Everything goes through the engine: the models of one question are sequences of one batch, and so are other people's.
This module knows nothing of the page.
"""

from __future__ import annotations

import gc
import mimetypes
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, UserError, one_line
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving.decoding import Reason, Sampling
from dora_vl.serving.engine import NOTHING, Engine
from dora_vl.serving.media import RequestMedia, check_text
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.requests import TooLarge
from dora_vl.serving.scheduler import Event, Failed, Finished, Stopped, SubmittedRequest, TextPiece

PACE_SECONDS = 0.04
"""Pieces that come within this time are shown together."""
HALT = Failed(Stopped("stopped"))
"""This event ends a stopped answer for its reader; the engine ends it at the next token."""
FAILED = "the model failed to answer; what went wrong is in the terminal of dora-vl demo"


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The model that answers in a column, and how much of its adapter is applied."""

    name: str
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ColumnAnswer:
    """Holds what a model has said to a question so far.

    Attributes:
        reason: why it is over; None while it goes on.
        trouble: why there is no more of it, in a sentence; "" if all is well.
        prompt_tokens, new_tokens: known at its end.
    """

    choice: ModelChoice
    text: str = ""
    reason: Reason | None = None
    trouble: str = ""
    seconds: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def is_finished(self) -> bool:
        """Tells whether nothing more comes."""
        return self.reason is not None or bool(self.trouble)

    def with_event(self, event: Event, seconds: float) -> ColumnAnswer:
        """Returns this answer with an event added."""
        if isinstance(event, TextPiece):
            return replace(self, text=self.text + event.text, seconds=seconds)
        if isinstance(event, Finished):
            counts = {"prompt_tokens": event.prompt_tokens, "new_tokens": event.new_tokens}
            return replace(self, text=event.text, reason=event.reason, seconds=seconds, **counts)
        if event is HALT:
            return replace(self, reason="ended", seconds=seconds)
        return replace(self, trouble=error_text(event.error), seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class QuestionRound:
    """A question and its answers, one per column."""

    question: str
    answers: tuple[ColumnAnswer, ...]

    @property
    def is_finished(self) -> bool:
        """Tells whether all columns have answered."""
        return all(answer.is_finished for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Holds what one user has asked about some pictures or a video, which come in the first question."""

    shown: PromptMedia = NOTHING
    exchanges: tuple[QuestionRound, ...] = ()

    def ended(self) -> Conversation:
        """Returns the conversation with every unfinished answer ended."""

        def over(answer: ColumnAnswer) -> ColumnAnswer:
            return answer if answer.is_finished else answer.with_event(HALT, answer.seconds)

        ended = (replace(exchange, answers=tuple(map(over, exchange.answers))) for exchange in self.exchanges)
        return replace(self, exchanges=tuple(ended))

    def turns(self, column: int, question: str) -> list[Turn]:
        """Returns what a column's model is told: the conversation so far as it went there, then the question."""
        turns: list[Turn] = []
        for exchange in self.exchanges:
            message = exchange.answers[column].text
            if message:  # else that question was never answered
                turns += [Turn("user", exchange.question), Turn("assistant", message)]
        turns.append(Turn("user", question))
        media = f"{IMAGE_PLACEHOLDER}\n" * len(self.shown.pictures) + f"{VIDEO_PLACEHOLDER}\n" * len(self.shown.videos)
        return [Turn("user", media + turns[0].text), *turns[1:]]


def error_text(error: Exception) -> str:
    """Returns an error's message for the user; what went wrong inside the program is for its log."""
    if isinstance(error, BadSample):
        return error.reason
    return one_line(str(error)) if isinstance(error, UserError) else FAILED


class SideBySide:
    """Puts users' questions to an engine."""

    def __init__(self, engine: Engine) -> None:
        encoder = engine.model.assistant.encoder
        self.engine = engine
        self.media = RequestMedia(engine.settings, same_length=encoder.videos_of_one_length)
        self.frames_are_pictures = encoder.no_videos_reason is not None
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()

    def look(self, files: Sequence[Path]) -> PromptMedia:
        """Returns the pictures and videos in some files, as a model will see them."""
        # By their names; what a file really is shows when it is read.
        videos = [file for file in files if str(mimetypes.guess_type(file.name)[0]).startswith("video/")]
        pictures = [file for file in files if file not in videos]
        with self.media.reading() as reading:
            reading.refuse_many(len(pictures), len(videos), "you have chosen")
            return PromptMedia(
                pictures=tuple(reading.picture(self._content(file), file.name) for file in pictures),
                videos=tuple(reading.video(self._content(file), file.name) for file in videos),
            )

    def ask(
        self, person: str, conversation: Conversation, question: str, choices: Sequence[ModelChoice], sampling: Sampling
    ) -> Iterator[Conversation]:
        """Yields the conversation with the new question, again each time the answers grow.

        Whoever stops reading ends the answers, and so does `stop`.

        Args:
            person: who asks; a person's earlier questions that are still being answered are ended.
            choices: one per column; as many as the conversation has had.
        """
        self.stop(person)
        question = check_text(question.strip(), "the question", shows_videos=True)
        if not question and not (conversation.shown.pictures or conversation.shown.videos):
            raise UserError("type a question, or show a picture or a video")
        prepared = [
            self.engine.prepare(
                choice.name,
                conversation.turns(column, question),
                sampling,
                conversation.shown,
                fill=True,
                strength=choice.strength,
            )
            for column, choice in enumerate(choices)
        ]
        exchange = QuestionRound(question=question, answers=tuple(ColumnAnswer(choice=choice) for choice in choices))
        running, start = _Running(), time.monotonic()
        try:
            for column, request in enumerate(prepared):
                put = partial(lambda column, event: running.events.put((column, event)), column)
                running.submitted.append(self.engine.submit(request, put))
            with self._lock:
                self._running[person] = running
            while True:
                yield replace(conversation, exchanges=(*conversation.exchanges, exchange))
                if exchange.is_finished:
                    return
                exchange = _next_exchange(exchange, running.events, start)
        finally:
            running.halt()
            with self._lock:
                if self._running.get(person) is running:
                    del self._running[person]

    def stop(self, person: str) -> None:
        """Ends what is being answered for a person; what was said so far stays."""
        with self._lock:
            running = self._running.pop(person, None)
        if running is not None:
            running.halt()

    def _content(self, file: Path) -> bytes:
        most = self.engine.settings.media_bytes
        try:
            if file.stat().st_size > most:
                raise TooLarge(f"{file.name} is larger than the {most / 2**20:g} MiB that are allowed here")
            return file.read_bytes()
        except OSError as error:
            raise UserError(f"{file.name} cannot be read: {error.strerror}; choose it again") from None


class OpenModels:
    """The models that answer, which may be replaced while the page is open; none at first.

    Args:
        read: reads a base with these adapters, by name; None is the first adapter's own base.
    """

    def __init__(self, read: Callable[[str | None, Mapping[str, Path]], ServedModel], settings: ServerSettings) -> None:
        self.settings = settings
        self._read = read
        self._side: SideBySide | None = None
        self._opened: tuple[str | None, Mapping[str, Path]] | None = None
        self._lock = threading.Lock()

    @property
    def reading(self) -> bool:
        """Tells whether models are being read just now."""
        return self._lock.locked()

    @property
    def side(self) -> SideBySide:
        """Returns the models side by side. Raises UserError if none is open."""
        if self._side is None and self.reading:
            raise UserError("another model is being read; ask again in a moment")
        if self._side is None:
            raise UserError("no model is open: train one, or choose a run that was trained, and press Ask it")
        return self._side

    @property
    def names(self) -> tuple[str, ...]:
        """Names what answers, the base first; none where nothing is open."""
        return () if self._side is None else self._side.engine.model.names

    def open(self, adapters: Mapping[str, Path], base: str | None = None) -> None:
        """Opens adapters over their base, in place of what was open, which is opened again where reading them fails."""
        with self._lock:
            self.close()  # first: a GPU may not hold both
            try:
                self._side = SideBySide(Engine(self._read(base, adapters), self.settings))
            except Exception:
                if self._opened is not None:
                    self._side = SideBySide(Engine(self._read(*self._opened), self.settings))
                raise
            self._opened = base, adapters

    def stop(self, person: str) -> None:
        """Ends what is being answered for a person."""
        if self._side is not None:
            self._side.stop(person)

    def close(self) -> None:
        """Ends the engine and the decoders, and lets go of the weights."""
        side, self._side = self._side, None
        if side is not None:
            side.media.close()
            side.engine.close()
        del side
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU


Events = queue.SimpleQueue[tuple[int, Event]]


@dataclass(frozen=True)
class _Running:
    submitted: list[SubmittedRequest] = field(default_factory=list)
    events: Events = field(default_factory=queue.SimpleQueue)
    """Brings the events of all columns, each with its column's number."""

    def halt(self) -> None:
        """Ends all answers, and tells the reader at once."""
        for column, item in enumerate(self.submitted):
            item.cancel()
            self.events.put((column, HALT))


def _next_exchange(exchange: QuestionRound, events: Events, start: float) -> QuestionRound:
    """Returns the exchange once the next event has come, and those soon after it."""
    until = None
    while not exchange.is_finished:
        left = None if until is None else until - time.monotonic()
        try:
            column, event = events.get(timeout=left) if left is None or left > 0 else events.get_nowait()
        except queue.Empty:
            break
        answers = list(exchange.answers)
        if not answers[column].is_finished:
            answers[column] = answers[column].with_event(event, time.monotonic() - start)
        exchange = replace(exchange, answers=tuple(answers))
        until = time.monotonic() + PACE_SECONDS if until is None else until
    return exchange
