"""The engine over HTTP, as OpenAI's clients speak it: chat completions and models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dora_vl.errors import UserError
from dora_vl.serving.access import AccessMiddleware, AccessRules, ByteBudget, error_content, error_response
from dora_vl.serving.decoding import Sampling
from dora_vl.serving.engine import Engine
from dora_vl.serving.media import RequestMedia
from dora_vl.serving.options import MIB
from dora_vl.serving.requests import ChatRequest, parse_request
from dora_vl.serving.scheduler import (
    Event,
    Failed,
    Finished,
    PreparedRequest,
    Stopped,
    SubmittedRequest,
    TextPiece,
    TooLate,
    TooManyRequests,
)


async def stream_chunks(
    request: ChatRequest, event: Event, submitted: SubmittedRequest, events: asyncio.Queue[Event]
) -> AsyncIterator[str]:
    """Yields an answer's first event and the others as OpenAI's chunks, server-sent; whoever closes this ends it."""
    head = _head(request, "chat.completion.chunk")
    with_usage = request.stream_options is not None and request.stream_options.include_usage

    def sent(content: Mapping[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    def chunk(delta: Mapping[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return sent({**head, "choices": [choice], **({"usage": None} if with_usage else {})})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while isinstance(event, TextPiece):
            yield chunk({"content": event.text})
            event = await events.get()
        if isinstance(event, Failed):
            yield sent(error_content(event.error))
            return
        yield chunk({}, event.reason)
        if with_usage:
            yield sent({**head, "choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"
    finally:
        submitted.cancel()


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    name = f"chatcmpl-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": request.model}


def _usage(finished: Finished) -> dict[str, int]:
    prompt, new = finished.prompt_tokens, finished.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class WaitingClient:
    """Tracks whether a request's client is still connected, and how much time its answer has left."""

    def __init__(self, request: Request, seconds: float) -> None:
        self._request = request
        self.deadline = time.monotonic() + seconds
        self._gone = False

    def check(self) -> None:
        """Raises Stopped or TooLate if nobody waits any more; may be called from any thread."""
        if self._gone:
            raise Stopped("the client has gone away")
        if time.monotonic() > self.deadline:
            raise TooLate()

    @contextlib.asynccontextmanager
    async def while_connected(self, leave: Callable[[], object] = lambda: None) -> AsyncIterator[None]:
        """Calls `leave` if the client disconnects, or the wait is cancelled, inside the block."""

        def disconnect() -> None:
            self._gone = True
            leave()

        async def wait() -> None:
            while (await self._request.receive())["type"] != "http.disconnect":
                pass
            disconnect()

        waiting = asyncio.create_task(wait())
        try:
            yield
        except BaseException:
            disconnect()
            raise
        finally:
            waiting.cancel()


class Server(contextlib.AbstractContextManager["Server"]):
    """Answers HTTP requests through an engine, which stays open; use it in a `with`, whose end ends the decoders."""

    def __init__(self, engine: Engine, *, rules: AccessRules | None = None) -> None:
        self.engine, self.settings = engine, engine.settings
        self.rules = rules or AccessRules()
        same_length = engine.model.assistant.encoder.videos_of_one_length
        self.media = RequestMedia(engine.settings, same_length=same_length)
        self.started = int(time.time())
        self._held, self._most_held = 0, engine.settings.waiting + engine.settings.batch
        self._preparing = CapacityLimiter(self._most_held)

    def __exit__(self, *_: object) -> None:
        self.media.close()

    async def chat(self, request: Request) -> Response:
        """Serves `POST /v1/chat/completions`."""
        client = WaitingClient(request, self.settings.answer_seconds)
        if self._held >= self._most_held:
            raise TooManyRequests(f"{self._held} requests are in progress, the most allowed; try again later")
        self._held += 1
        try:
            body = await run_sync(partial(parse_request, await request.body()))
            self.engine.model.entry(body.model)  # before any picture is decoded
            return await self._answer(client, body)
        finally:
            self._held -= 1

    async def models(self, request: Request) -> Response:
        """Serves `GET /v1/models`: the base, and its adapters."""
        base, *adapters = self.engine.model.names
        cards = [self._card(base), *({**self._card(name), "parent": base} for name in adapters)]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """Serves `GET /v1/models/NAME`."""
        name = str(request.path_params["name"])
        self.engine.model.entry(name)
        return JSONResponse(self._card(name))

    async def health(self, request: Request) -> Response:
        """Serves `GET /health`: how many requests wait."""
        return JSONResponse({"status": "ok", "waiting": self.engine.waiting, "models": list(self.engine.model.names)})

    def _prepared(self, body: ChatRequest, go_on: Callable[[], object]) -> PreparedRequest:
        """Prepares a request, its pictures and videos read, in a thread of its own, where `go_on` may end it."""
        go_on()
        settings = self.settings
        sampling = Sampling(
            max_new_tokens=body.max_new_tokens or settings.max_new_tokens,
            temperature=settings.temperature if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            stop=tuple(body.stop or ()),
            seed=body.seed,
        )
        with self.media.reading(go_on) as reading:
            turns, seen = reading.read(body.messages)
            go_on()
            return self.engine.prepare(
                body.model,
                turns,
                sampling,
                seen,
                fill=body.max_new_tokens is None,
                strength=1.0 if body.strength is None else body.strength,
            )

    async def _answer(self, client: WaitingClient, body: ChatRequest) -> Response:
        """Returns the answer while the client waits; an error before a stream's first piece has its own status."""
        async with client.while_connected():
            prepared = await run_sync(partial(self._prepared, body, client.check), limiter=self._preparing)
        client.check()
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        submitted = self.engine.submit(prepared, put, deadline=client.deadline)  # reading the request was of its time
        async with client.while_connected(submitted.cancel):
            event = await events.get()
            while isinstance(event, TextPiece) and not body.stream:
                event = await events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished) and not body.stream:
            message = {"role": "assistant", "content": event.text, "refusal": None}
            choice = {"index": 0, "message": message, "finish_reason": event.reason, "logprobs": None}
            return JSONResponse({**_head(body, "chat.completion"), "choices": [choice], "usage": _usage(event)})
        return StreamingResponse(stream_chunks(body, event, submitted, events), media_type="text/event-stream")

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "dora-vl"}


def build_app(server: Server) -> FastAPI:
    """Returns the application: routes, and every error as OpenAI's JSON."""
    app = FastAPI(title="dora-vl serve", docs_url=None, redoc_url=None, openapi_url=None)
    largest = int(server.settings.max_body_mib * MIB)
    app.add_middleware(
        AccessMiddleware,
        rules=server.rules,
        content_seconds=server.settings.body_seconds,
        budget=ByteBudget(largest, 8 * largest),
    )
    app.add_route("/v1/chat/completions", server.chat, methods=["POST"])
    app.add_route("/v1/models", server.models)
    app.add_route("/v1/models/{name:path}", server.model)
    app.add_route("/health", server.health)

    async def refused(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def not_found(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        content = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": content}, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(HTTPException, not_found)
    app.add_exception_handler(Exception, refused)
    return app
