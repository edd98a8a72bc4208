"""The engine over HTTP, as OpenAI's clients speak it: chat completions, models, and adapters loaded and dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dora_vl.app.answering import Answering, Event, Failed, Finished, Prepared, Stopped, TooLate, TooManyRequests
from dora_vl.app.chat_answers import chunks, completion
from dora_vl.app.chat_request import ChatRequest, LoadRequest, UnloadRequest
from dora_vl.app.engine import Engine
from dora_vl.app.http_errors import error_response
from dora_vl.app.request_media import BadRequest, MediaLimits, RequestMedia, TooLarge
from dora_vl.app.row_decoding import Sampling
from dora_vl.errors import UserError, one_line, shown

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)
PREPARED_AT_ONCE = 8
"""Requests whose pictures are decoded at a time; the memory of all that may wait would be too much."""
LOOK_SECONDS = 0.5
"""How often it is looked whether a client that waits is still there."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What a client may ask for, and what it gets without asking.

    Attributes:
        media: what a request may show.
        body_bytes: largest request.
        body_seconds: longest time that a client may take to send it.
        held: most requests that are being read, wait or are answered.
        new_tokens: longest answer of a request that does not say.
        temperature: of a request that does not say.
        adapter_root: adapters below this folder may be loaded and dropped by clients; None: they may not.
    """

    media: MediaLimits = field(default_factory=MediaLimits)
    body_bytes: int = 64 * 2**20
    body_seconds: float = 30.0
    held: int = 128
    new_tokens: int = 256
    temperature: float = 0.0
    adapter_root: Path | None = None


class Server:
    """Answers HTTP requests through an engine; use it in a `with`, whose end ends the decoder of videos.

    Args:
        engine: what answers; the server does not close it.
        settings: what a client may ask for.
    """

    def __init__(self, engine: Engine, settings: ServerSettings | None = None) -> None:
        self.engine = engine
        self.settings = settings = settings or ServerSettings()
        self.media = RequestMedia(settings.media, engine.model.assistant.prompts.videos_of_one_length)
        self.started = int(time.time())
        self._held = 0
        self._preparing = CapacityLimiter(PREPARED_AT_ONCE)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.media.close()

    # -- what is served ----------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        with self._one_more():
            asked = await self._body(request, ChatRequest)
            self.engine.model.asked(asked.model)  # before any picture is decoded
            prepared = await run_sync(partial(self._prepared, asked), limiter=self._preparing)
            events: asyncio.Queue[Event] = asyncio.Queue()
            loop = asyncio.get_running_loop()

            def put(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(events.put_nowait, event)

            answering = self.engine.submit(prepared, put)
            if asked.stream:
                return await self._stream(request, asked, answering, events)
            return await self._whole(request, asked, answering, events)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the base, and its adapters."""
        base, *adapters = self.engine.model.names
        cards = [self._card(base), *({**self._card(name), "parent": base} for name in adapters)]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        name = str(request.path_params["name"])
        self.engine.model.asked(name)
        return JSONResponse(self._card(name))

    async def health(self, request: Request) -> Response:
        """`GET /health`: how much waits."""
        return JSONResponse({"status": "ok", "waiting": self.engine.waiting, "models": list(self.engine.model.names)})

    async def load(self, request: Request) -> Response:
        """`POST /v1/load_lora_adapter`, as vLLM has it."""
        with self._one_more():
            asked = await self._body(request, LoadRequest)
            folder = self._allowed(asked.lora_path)
            await run_sync(partial(self.engine.load, asked.lora_name, folder))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """`POST /v1/unload_lora_adapter`, as vLLM has it."""
        with self._one_more():
            asked = await self._body(request, UnloadRequest)
            self._adapter_root()
            await run_sync(partial(self.engine.unload, asked.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    # -- reading a request -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _one_more(self) -> Iterator[None]:
        """Counts a request as held meanwhile; a streamed one counts until its first piece."""
        if self._held >= self.settings.held:
            raise TooManyRequests(f"{self._held} requests are held already, and no more may; try again later")
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def _body(self, request: Request, kind: type[Model]) -> Model:
        """The request's content, of at most so many bytes, in at most so much time."""
        most = self.settings.body_bytes
        stated = request.headers.get("content-length", "")
        content = bytearray()
        too_large = TooLarge(f"the request is larger than the {most:,} bytes allowed here")
        if stated.isdecimal() and int(stated) > most:
            raise too_large

        async def read() -> None:
            async for chunk in request.stream():
                content.extend(chunk)
                if len(content) > most:
                    raise too_large

        try:
            await asyncio.wait_for(read(), self.settings.body_seconds)
        except ClientDisconnect:
            raise Stopped("the client has gone away") from None
        except asyncio.TimeoutError:
            raise TooLate(f"the request was not sent within {self.settings.body_seconds:g} s") from None
        return await run_sync(partial(_parsed, kind, bytes(content)))

    def _prepared(self, asked: ChatRequest) -> Prepared:
        """The request's prompt, its pictures and videos read; in a thread of its own."""
        settings, positions = self.settings, self.engine.model.max_positions
        talk = self.media.read(asked.messages)
        sampling = Sampling(
            max_new_tokens=asked.longest or settings.new_tokens,
            temperature=settings.temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            stop=asked.stops,
            seed=asked.seed,
        )
        shown_there = {"pictures": talk.pictures, "videos": talk.videos}
        roomy = asked.longest is not None or positions is None
        strength = 1.0 if asked.strength is None else asked.strength
        return self.engine.prepare(asked.model, talk.turns, sampling, fill=not roomy, strength=strength, **shown_there)

    def _adapter_root(self) -> Path:
        """The folder below which clients may load adapters."""
        root = self.settings.adapter_root
        if root is None:
            raise UserError("this server's clients load and drop no adapters; start it with --adapter-root FOLDER")
        return root

    def _allowed(self, path: str) -> Path:
        """An adapter's folder that a client may load."""
        root = self._adapter_root()
        try:
            folder = (root / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise BadRequest("lora_path", f"{shown(path)} is no path ({type(error).__name__})") from None
        if not folder.is_relative_to(root.resolve()) or not folder.is_dir():
            raise BadRequest(
                "lora_path", f"there is no folder {shown(path)} below the one that adapters are loaded from"
            )
        return folder

    # -- answering ---------------------------------------------------------------------------------------------

    async def _whole(
        self, request: Request, asked: ChatRequest, answering: Answering, events: asyncio.Queue[Event]
    ) -> Response:
        async with _watched(request, answering):
            while not isinstance(event := await events.get(), Finished):
                if isinstance(event, Failed):
                    raise event.error
        return JSONResponse(completion(asked, event))

    async def _stream(
        self, request: Request, asked: ChatRequest, answering: Answering, events: asyncio.Queue[Event]
    ) -> Response:
        """The answer as server-sent events; what goes wrong before the first piece still has its own status."""
        async with _watched(request, answering):
            first = await events.get()
        if isinstance(first, Failed):
            raise first.error
        return StreamingResponse(chunks(asked, first, answering, events), media_type="text/event-stream")

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "dora-vl"}


@contextlib.asynccontextmanager
async def _watched(request: Request, answering: Answering) -> AsyncIterator[None]:
    """Meanwhile the answer ends where the client goes away, or where waiting for it is broken off."""

    async def look() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(LOOK_SECONDS)
        answering.cancel()

    looking = asyncio.create_task(look())
    try:
        yield
    except BaseException:
        answering.cancel()
        raise
    finally:
        looking.cancel()


def _parsed(kind: type[Model], content: bytes) -> Model:
    """A request's JSON, checked.

    Raises:
        BadRequest: it names the first place that is wrong.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        first = max(errors, key=lambda one: len(one["loc"]))  # of several forms the one that came farthest
        place = ".".join(map(str, first["loc"])) or "the request"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BadRequest(one_line(place, 80), f"{first['msg']}{more}") from None


def build_app(server: Server) -> FastAPI:
    """The application: routes, and every error as OpenAI's JSON."""
    app = FastAPI(title="dora-vl serve", docs_url=None, redoc_url=None, openapi_url=None)
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", server.chat),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{name:path}", server.model),
        ("GET", "/health", server.health),
        ("POST", "/v1/load_lora_adapter", server.load),
        ("POST", "/v1/unload_lora_adapter", server.unload),
    ]
    for method, path, handler in routes:
        app.add_route(path, handler, methods=[method])

    async def refused(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def not_there(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        content = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": content}, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(HTTPException, not_there)
    app.add_exception_handler(Exception, refused)
    return app
