"""The one door of the server and of the page: by which names, from where, with which key and how fast one comes in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import h11
import uvicorn
from anyio.to_thread import run_sync
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dora_vl.errors import BadSample, UserError, shown
from dora_vl.serving.answering import Stopped, TooLate, TooManyRequests
from dora_vl.serving.model import UnknownModel
from dora_vl.serving.options import Admission, NoKey, Refused
from dora_vl.serving.requests import BadRequest, TooLarge


class NotJson(UserError):
    """A request's content is not declared as JSON."""


PROBLEMS: Mapping[type[Exception], tuple[int, str, str | None]] = {
    NoKey: (401, "invalid_request_error", "invalid_api_key"),
    Refused: (403, "invalid_request_error", "refused"),
    UnknownModel: (404, "invalid_request_error", "model_not_found"),
    TooLarge: (413, "invalid_request_error", "too_large"),
    NotJson: (415, "invalid_request_error", "not_json"),
    TooManyRequests: (429, "rate_limit_error", "too_many_requests"),
    Stopped: (503, "server_error", "stopped"),
    TooLate: (504, "server_error", "timeout"),
    UserError: (400, "invalid_request_error", None),
    Exception: (500, "server_error", "internal_error"),
}
"""HTTP status, OpenAI's type and code; the first class that an error is of counts, from the top."""
HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": 'Basic realm="dora-vl"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
"""What an answer of a status has besides; a browser asks for the key where this scheme stands alone."""


def error_response(error: Exception) -> JSONResponse:
    """An error as OpenAI's JSON."""
    status = next(problem for kind, problem in PROBLEMS.items() if isinstance(error, kind))[0]
    return JSONResponse(error_content(error), status_code=status, headers=HEADERS.get(status))


def error_content(error: Exception) -> dict[str, Any]:
    """OpenAI's error object; what went wrong inside is in the log alone."""
    _, kind, code = next(problem for kind, problem in PROBLEMS.items() if isinstance(error, kind))
    message = str(error) if isinstance(error, UserError) else "the server failed to answer this request"
    if isinstance(error, BadSample):
        message = error.reason
    param = error.param if isinstance(error, BadRequest) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


HEAD_SECONDS, HEAD_BYTES = 10.0, 64 * 1024
"""For a request's line and headers, from the moment that the connection stands or the first of them comes."""
MOST_CONNECTIONS = 512


class Door:
    """Stands before an application: who may come in, with how much, in what time.

    Args:
        body_seconds: longest time that a request's content may take to come.
        largest: most bytes of a request's content.
        at_once: so many times as many bytes may be on their way, of all clients.
        streamed: paths whose content is the application's to read and to limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        admission: Admission,
        body_seconds: float,
        *,
        largest: int,
        at_once: int,
        streamed: Container[str] = (),
    ) -> None:
        self._app = app
        self._admission = admission
        self._body_seconds = body_seconds
        self._largest, self._together = largest, at_once * largest
        self._streamed = streamed
        self._coming = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._admission.check(headers)
            receive = _in_time(receive, self._body_seconds)
            if scope["method"] == "POST" and scope["path"] not in self._streamed:
                scope["content"] = await self._content(headers, receive)
                receive = _again(scope["content"], receive)
            await self._app(scope, receive, noted)
        except UserError as error:
            if not begun:
                await error_response(error)(scope, receive, send)

    async def _content(self, headers: Headers, receive: Receive) -> bytes:
        """A request's JSON, whole; a client that sends slowly has no more memory of it than it has sent.

        What is not declared as JSON is refused: a browser lets any web page post other types to this machine unasked.
        """
        declared, stated = headers.get("content-type", ""), headers.get("content-length", "")
        if declared.partition(";")[0].strip().lower() != "application/json":
            raise NotJson(f"the request's Content-Type must be application/json, not {shown(declared)}")
        too_large = TooLarge(f"the request is larger than the {self._largest:,} bytes allowed here")
        if stated.isdecimal() and int(stated) > self._largest:
            raise too_large
        content, more = bytearray(), True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Stopped("the client has gone away")
                chunk, more = message.get("body", b""), bool(message.get("more_body"))
                content.extend(chunk)
                self._coming += len(chunk)
                if len(content) > self._largest:
                    raise too_large
                if self._coming > self._together:
                    raise TooManyRequests("too many requests are being sent; try again later")
        finally:
            self._coming -= len(content)
        return bytes(content)


def _again(content: bytes, receive: Receive) -> Receive:
    """The messages of a request whose content was read already."""
    left = [{"type": "http.request", "body": content, "more_body": False}]

    async def next_message() -> Message:
        return left.pop() if left else await receive()

    return next_message


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Messages of a request, whose content must come within so many seconds (else TooLate); not what comes after it."""
    deadline, coming = time.monotonic() + seconds, True

    async def next_message() -> Message:
        nonlocal coming
        if not coming:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise TooLate(f"the request was not sent within {seconds:g} s") from None
        coming = bool(message.get("more_body"))
        return message

    return next_message


class _Connection(H11Protocol):
    """Is closed where a request's head has begun, or should have, and does not end, or to make room for others."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_timer()
        if len(self.connections) >= MOST_CONNECTIONS:
            self._make_room()

    def _make_room(self) -> None:
        """Closes a connection whose request has not come whole, of the address that holds most of those."""
        connections: set[Any] = self.connections
        unfinished = [other for other in connections if other.conn.their_state in (h11.IDLE, h11.SEND_BODY)]
        held = Counter(other.client and other.client[0] for other in unfinished)
        for other in unfinished:
            if other is not self and held[other.client and other.client[0]] == max(held.values()):
                other.transport.abort()
                connections.discard(other)
                return

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _set_timer(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def http_config(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """How an application is served: few connections at a time, whose heads are short and come soon."""
    return uvicorn.Config(
        app,
        http=_Connection,
        h11_max_incomplete_event_size=HEAD_BYTES,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        **{"log_level": "warning", **settings},
    )


# -- the page's: Gradio has many more addresses than it needs, some of which give files, fetch from the web or run other
# programs. Only those are there that the page itself asks for, and a file that a request names must have been uploaded.

UPLOAD = "/gradio_api/upload"
ADDRESSES = {
    "GET": re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json)|/(assets|static|svelte)/.+"
        r"|/gradio_api/(queue/data|upload_progress|startup-events|heartbeat/\w+)"
    ),
    "HEAD": re.compile("/"),
    "POST": re.compile(rf"{UPLOAD}|/gradio_api/(queue/join|run/predict|cancel|reset)"),
}
"""What the page asks for, by method."""
EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/predict")
UPLOAD_SECONDS = 300.0
FORGET_SECONDS, LOOK_SECONDS = UPLOAD_SECONDS + 60, 20.0
"""How old uploads are that go unread, older than those that come with them; and how often that is looked for."""
MOST_UPLOADS = 1000
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; frame-ancestors 'self'"
)
"""A visitor's browser loads nothing from another host, whatever a page of Gradio's asks for."""


class Uploads:
    """What visitors have sent and the page has not read yet: so many files and bytes at most, and not for long.

    Args:
        folder: Gradio keeps them here, each in a folder of its own.
        most_bytes: of all of them.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder.resolve()
        self._most_bytes = most_bytes
        self._coming = 0

    def holds(self, path: str) -> bool:
        """Whether a path is a file that was uploaded."""
        try:
            file = Path(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return False
        return file.is_file() and file.parent.parent == self.folder

    def delete(self, file: Path) -> None:
        """Deletes an uploaded file, and nothing else."""
        if self.holds(str(file)):
            self._remove(file)

    @contextlib.contextmanager
    def coming(self, stated: str) -> Iterator[Callable[[int], None]]:
        """Meanwhile an upload is on its way; gives what counts its bytes as they come, whatever size it states."""
        held, arrived = self.forget(), 0

        def count(size: int, more: int = 0) -> None:
            nonlocal arrived
            arrived += size
            self._coming += size
            if len(held) >= MOST_UPLOADS or sum(held) + self._coming + more > self._most_bytes:
                raise TooManyRequests("too much is being uploaded; try again in a few minutes")

        count(0, int(stated) if stated.isdecimal() else 0)
        try:
            yield count
        finally:
            self._coming -= arrived

    def forget(self) -> list[int]:
        """Deletes what is too old; the sizes of the files that are left."""
        sizes, oldest = [], time.time() - FORGET_SECONDS
        for file in [path for path in self.folder.rglob("*") if not path.is_dir()]:
            with contextlib.suppress(FileNotFoundError):  # it was read just now
                status = file.lstat()
                if status.st_mtime >= oldest:
                    sizes.append(status.st_size)
                else:
                    self._remove(file)
        return sizes

    def _remove(self, file: Path) -> None:
        """A file, and its folder where nothing else is in it, such as the same content under another name."""
        with contextlib.suppress(OSError):
            file.unlink()
            if file.parent != self.folder:
                file.parent.rmdir()

    @contextlib.asynccontextmanager
    async def forgetting(self, _: FastAPI) -> AsyncIterator[None]:
        """Meanwhile old uploads are deleted again and again."""

        async def again() -> None:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                await run_sync(self.forget)

        task = asyncio.create_task(again())
        try:
            yield
        finally:
            task.cancel()


class OwnAlone:
    """Lets through what the page asks for, where it names no file but uploaded ones; `POLICY` is on every answer.

    Args:
        check_event: refuses an event that no part of the page sends.
    """

    def __init__(self, app: ASGIApp, uploads: Uploads, check_event: Callable[[Any], object]) -> None:
        self._app = app
        self._uploads = uploads
        self._check_event = check_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request. Raises UserError: it is refused."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        addresses = ADDRESSES.get(scope["method"])
        if addresses is None or not addresses.fullmatch(scope["path"]):
            raise Refused("the page has no such address")

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        if scope["path"] == UPLOAD:
            with self._uploads.coming(Headers(scope=scope).get("content-length", "")) as count:

                async def counted() -> Message:
                    message = await receive()
                    count(len(message.get("body", b"")))
                    return message

                await self._app(scope, counted, with_policy)
            return
        if scope["method"] == "POST":
            self._check(scope["content"], is_event=scope["path"] in EVENTS)
        await self._app(scope, receive, with_policy)

    def _check(self, content: bytes, *, is_event: bool) -> None:
        try:
            values = [json.loads(content)]
        except (ValueError, RecursionError):
            raise Refused("the request is no JSON") from None
        if is_event:
            self._check_event(values[0])
        while values:
            value = values.pop()
            if isinstance(value, dict):
                if "path" in value and not (isinstance(value["path"], str) and self._uploads.holds(value["path"])):
                    raise Refused("the request names a file that was not uploaded, or is here no longer")
                values += value.values()
            elif isinstance(value, list):
                values += value
