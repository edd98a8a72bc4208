"""Answers requests for several adapters together: batches of waiting requests, one after another, in one thread.

Whoever asks prepares a request in its own thread (prompt, pictures, checks), hands it in and receives its answer piece
by piece. A batch is formed of what waits when the one before is over, plus a few milliseconds; what comes later joins
it at its next token where the model allows that, else the next batch. Nothing here knows of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dora_vl.backbones.base import max_positions
from dora_vl.backbones.generation import end_tokens
from dora_vl.core.strength import checked_strength
from dora_vl.data.batches import ALIGNED
from dora_vl.data.samples import BOOKKEEPING
from dora_vl.data.turns import Turn, placeholder_first
from dora_vl.errors import BadSample, one_line
from dora_vl.evaluation.assistant import check_room, growing_answer, prompt_batch, prompt_sample
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving.decoding import (
    KVCacheBatch,
    Sampling,
    SequenceSampling,
    SequenceText,
    generate_options,
    may_join,
    next_tokens,
)
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.scheduler import (
    ENDING,
    Event,
    Failed,
    Finished,
    PreparedRequest,
    Scheduler,
    Stopped,
    SubmittedRequest,
    TextPiece,
)
from dora_vl.shapes import Float


@dataclass
class RunningRequest:
    """A request in a batch, and its text."""

    submitted: SubmittedRequest
    text: SequenceText

    @property
    def applied(self) -> tuple[str, float]:
        """Returns the key that a batch is sorted by, the base first: a layer then computes each adapter once."""
        return self.submitted.prepared.applied or ("", 0.0)


Running = Sequence[RunningRequest]
ReadPrompts = tuple[list[RunningRequest], KVCacheBatch, Float[Tensor, "batch vocab"]]
"""Holds requests whose prompts were read, their keys and values, and the logits of their first tokens."""


def can_join(logits_processor: Any, generation_config: Any) -> bool:
    """Tells whether each token is chosen by the request's own sampling; a penalty for tokens before is generate's."""
    own = all(isinstance(processor, SequenceSampling) for processor in logits_processor)
    return own and not generation_config.stop_strings and generation_config.prefill_chunk_size is None


class BatchDecoder:
    """Decodes requests together, each with its adapter, until `ending()`, and sends each its events."""

    def __init__(self, model: ServedModel, ending: Callable[[], bool]) -> None:
        self._model = model
        self._ending = ending
        self.ends = end_tokens(model.backbone.model)

    def answer(
        self, batch: Sequence[SubmittedRequest], joiners: Callable[[Running, int], Sequence[ReadPrompts]]
    ) -> None:
        """Answers a batch; `joiners` is asked at every token, with what runs and how many tokens its cache holds."""
        running, inputs = self.begin(batch)
        most = max(request.text.sampling.max_new_tokens for request in running)
        self._run(running, inputs, most, partial(self._decode, running, joiners))

    def read(self, arrived: Sequence[SubmittedRequest]) -> ReadPrompts:
        """Reads the prompts of requests that are to join a batch. Raises ValueError where they cannot."""
        running, inputs = self.begin(arrived)
        read: list[tuple[KVCacheBatch, Tensor]] = []
        self._run(running, inputs, 1, lambda _, cache, logits: read.append((cache, logits)), joins=True)
        ((cache, logits),) = read
        return running, cache, logits

    def _decode(
        self,
        running: list[RunningRequest],
        joiners: Callable[[Running, int], Sequence[ReadPrompts]],
        model: Any,
        cache: KVCacheBatch,
        logits: Float[Tensor, "batch vocab"],
    ) -> None:
        """Decodes token by token, until no request is left."""
        tokens = self._next(running, logits)
        while True:
            running, tokens = _without_finished(running, tokens, cache)
            if not running:
                return
            joined = joiners(running, cache.columns)
            for new, new_cache, new_logits in joined:
                cache.join(new_cache)
                running, tokens = [*running, *new], [*tokens, *self._next(new, new_logits)]
            if joined:  # their first token may have been their last
                continue
            with self._holding(running):
                logits = cache.step(model, torch.tensor(tokens, device=logits.device))
            tokens = self._next(running, logits)

    def _next(self, running: Running, logits: Float[Tensor, "batch vocab"]) -> list[int]:
        """Returns each request's next token, which its text has taken."""
        tokens = next_tokens(logits, [request.text for request in running])
        for request, token in zip(running, tokens, strict=True):
            request.text.take(token, self.ends)
        return tokens

    def begin(self, batch: Sequence[SubmittedRequest]) -> tuple[list[RunningRequest], Mapping[str, Any]]:
        """Returns the requests in a batch's order, the base first and then adapter by adapter, and their inputs."""
        running = [RunningRequest(request, self._text(request)) for request in batch]
        running.sort(key=lambda request: request.applied)
        samples = [request.submitted.prepared.sample for request in running]
        return running, prompt_batch(self._model.assistant.encoder, samples)

    def _run(
        self,
        running: Running,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        take: Callable[[Any, KVCacheBatch, Float[Tensor, "batch vocab"]], None],
        *,
        joins: bool = False,
    ) -> None:
        """Has transformers' generate prepare a batch; nobody reads the ids that it returns.

        Args:
            take: gets the model, the cache of the prompts that it has read, and the logits of their next tokens.
            joins: True refuses requests that cannot join others; else generate decodes them itself.
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
                take(model, *KVCacheBatch.read(model, input_ids, generation_config, arguments))
                return input_ids
            if joins:
                raise ValueError("a prompt that cannot join the running batch")
            named = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria, **arguments}
            return model._sample(input_ids, generation_config=generation_config, **named)

        options = generate_options([request.text for request in running], self.ends)
        pictures = [request.submitted.prepared.pictures for request in running]
        with self._holding(running, pictures):
            assistant.new_ids(inputs, max_new_tokens=max_new_tokens, options={**options, "custom_generate": decode})

    def _holding(self, running: Running, pictures: Sequence[int] = ()) -> AbstractContextManager[None]:
        """Gives the model's batch these requests inside the block; without `pictures`, none shows any."""
        prepared = [request.submitted.prepared for request in running]
        strengths = [item.strength for item in prepared]
        return self._model.holding([item.entry for item in prepared], pictures or [0] * len(prepared), strengths)

    def _text(self, request: SubmittedRequest) -> SequenceText:
        """Returns the text of a request's answer, which tells its end at once, whatever the others do."""
        prepared = request.prepared

        def done(answer: SequenceText) -> None:
            if answer.error is not None:
                request.send(Failed(answer.error))
            elif answer.reason != "ended":
                reason = answer.reason or "length"
                request.send(Finished(reason, answer.text, prepared.prompt_tokens, len(answer.ids)))
            elif self._ending():
                request.send(Failed(Stopped(ENDING)))
            else:
                request.fail()

        return SequenceText(
            prepared.sampling,
            growing_answer(prepared.entry.encoder),
            write=lambda text: request.send(TextPiece(text)),
            over=lambda: request.is_expired or self._ending(),
            done=done,
        )


def _without_finished(
    running: list[RunningRequest], tokens: list[int], cache: KVCacheBatch
) -> tuple[list[RunningRequest], list[int]]:
    """Returns the requests that go on, adapter by adapter, and their tokens; the cache keeps only those."""
    on = [index for index, request in enumerate(running) if request.text.reason is None]
    on.sort(key=lambda index: running[index].applied)
    if on and on != [*range(len(running))]:
        cache.keep(on)
    return [running[index] for index in on], [tokens[index] for index in on]


log = logging.getLogger(__name__)
NOTHING = PromptMedia()
CHARACTERS_OF_A_TOKEN = 32
"""No text has more characters a token, except for a few words among long runs of spaces."""


class Engine(AbstractContextManager["Engine"]):
    """Answers requests for a served model's adapters, many at once; `close` it, or use it in a `with`."""

    def __init__(self, model: ServedModel, settings: ServerSettings | None = None) -> None:
        self.model = model
        self.settings = settings or ServerSettings()
        self._scheduler = Scheduler(self.settings, lambda: model.assistant.encoder.cannot_mix_media)
        self._encoding = threading.Lock()
        """Lets one thread at a time use tokenizers and processors."""
        self._decoder = BatchDecoder(model, lambda: self._scheduler.closed)
        self._thread = threading.Thread(target=self._work, name="dora-vl engine", daemon=True)
        self._thread.start()

    def prepare(
        self,
        name: str,
        turns: Sequence[Turn],
        sampling: Sampling,
        media: PromptMedia = NOTHING,
        *,
        fill: bool = False,
        strength: float = 1.0,
    ) -> PreparedRequest:
        """Returns a request for the model of this name, its prompt built and checked.

        Args:
            name: an adapter's, or the base's.
            turns: the conversation, its last turn a question; `<image>` and `<video>` where the `media` go.
            fill: the answer may be shorter than `sampling` says where the model has too few positions left.
            strength: how much of the adapter is applied, 0 nothing (the base, asked as the adapter was trained to be)
                and 1 all; beyond 1 more of the same.
        """
        entry, strength = self.model.entry(name), checked_strength(strength)
        if len(media.pictures) == 1 and not media.videos:  # as in training
            turns = [replace(turn, text=placeholder_first(turn.text), input_characters=0) for turn in turns]
        positions, most = max_positions(self.model.backbone.config), self.settings.max_prompt_tokens
        allowed = min((limit for limit in (positions, most) if limit is not None), default=None)
        characters = sum(len(turn.text) for turn in turns)
        if allowed is not None and characters > allowed * CHARACTERS_OF_A_TOKEN:  # to tokenise them takes long
            reason = f"its {characters:,} characters are more than a prompt of {allowed:,} tokens can hold; shorten it"
            raise BadSample("request", reason)
        with self._encoding:
            sample = prompt_sample(entry.encoder, turns, media)
        tokens = len(sample.input_ids)
        if most is not None and tokens > most:
            raise BadSample("request", f"its prompt takes {tokens} tokens, and {most} are allowed here; shorten it")
        if fill and positions is not None:
            sampling = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, positions - tokens)))
        check_room(tokens, sampling.max_new_tokens, positions, "request")
        return PreparedRequest(entry, sample, sampling, strength)

    def submit(
        self, prepared: PreparedRequest, put: Callable[[Event], object], deadline: float | None = None
    ) -> SubmittedRequest:
        """Hands a request in; `put` receives its events in the engine's thread, and must not wait.

        An answer after `deadline`, by `time.monotonic`, is too late; None allows `answer_seconds` from now.
        """
        deadline = time.monotonic() + self.settings.answer_seconds if deadline is None else deadline
        request = SubmittedRequest(prepared, put, deadline)
        self._scheduler.add(request)
        return request

    @property
    def waiting(self) -> int:
        """Counts the requests that wait."""
        return len(self._scheduler)

    def close(self) -> None:
        """Ends the thread after the next token; open requests are told."""
        self._scheduler.close()
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._scheduler.next_batch()) is not None:
            if batch:  # else nobody waits any more for those that did
                self._answer(batch)

    def _answer(self, batch: Sequence[SubmittedRequest]) -> None:
        """Answers a batch; where it fails as a whole, its requests one by one, so that none suffers for another."""
        joined: list[SubmittedRequest] = []
        try:
            self._decoder.answer(batch, partial(self._joiners, joined))
            return
        except Exception as error:  # noqa: BLE001 - its requests are tried one by one
            failed = error
            _free_frames(error)
        requests = [*batch, *joined]
        if len(requests) == 1:
            log.error("a request failed", exc_info=failed)
            requests[0].send(Failed(failed))
            return
        log.warning("a batch of %d requests failed (%s); one by one", len(requests), one_line(str(failed), 200))
        for request in requests:
            if request.pieces or request.is_finished:  # what was said cannot be taken back
                request.send(Failed(failed))
            else:
                self._alone(request, lambda item: self._decoder.answer([item], lambda *_: ()))

    def _alone(self, request: SubmittedRequest, put: Callable[[SubmittedRequest], Any]) -> Any:
        """Returns the result of putting one request to the model; if that fails, only this request is told."""
        try:
            return put(request)
        except Exception as error:  # noqa: BLE001 - it is this request's only
            log.warning("a request failed: %s", one_line(str(error), 200))
            _free_frames(error)
            request.send(Failed(error))
            return None

    def _joiners(self, joined: list[SubmittedRequest], running: Running, columns: int) -> Sequence[ReadPrompts]:
        """Returns the requests that join a running batch, their prompts read, and adds them to `joined`."""
        if not self.settings.joining:
            return ()
        left = max(request.text.sampling.max_new_tokens - len(request.text.ids) for request in running)
        arrived = self._scheduler.next_joiners(len(running), columns, left)
        if not arrived:
            return ()
        try:
            read = [self._decoder.read(arrived)]
        except Exception as error:  # noqa: BLE001 - the batch at hand goes on
            log.warning("%d requests failed (%s); one by one", len(arrived), one_line(str(error), 200))
            _free_frames(error)
            alone = (self._alone(request, lambda item: self._decoder.read([item])) for request in arrived)
            read = [prompts for prompts in alone if prompts is not None]
        joined += [request.submitted for requests, _, _ in read for request in requests]
        return read


def _free_frames(error: BaseException | None) -> None:
    """Frees what failed calls held, such as a batch's keys and values: whoever tries again may need the memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
