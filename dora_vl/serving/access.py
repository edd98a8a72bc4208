"""Who may send requests to the server and the page, how large and how slowly, and which files the page may read.

uvicorn limits connections and the bytes of a head, Starlette nothing of what is needed here: the middleware counts
bytes and time as they come. Any web page that somebody visits may send requests to this machine: from its own origin
or, where its name is made to lead here (DNS rebinding), as if it were this one. So `Host` must be a name that this
program was told it has, and `Origin`, which browsers add by themselves, the same host.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dora_vl.errors import BadSample, UserError, short_repr
from dora_vl.serving.model import UnknownModel
from dora_vl.serving.options import EVERY_ADDRESS, KEY_VARIABLE, LOCAL, host_name
from dora_vl.serving.requests import BadRequest, TooLarge
from dora_vl.serving.scheduler import Stopped, TooLate, TooManyRequests


class Refused(UserError):
    """The client may not send this request."""


class NoKey(UserError):
    """The program was started with a key, and the request lacks it."""


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
"""Maps errors to the HTTP status, and OpenAI's type and code; the first class that fits counts."""
HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": 'Basic realm="dora-vl"'},  # a browser asks for the key if this is the only scheme
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


def error_response(error: Exception) -> JSONResponse:
    """Returns an error as OpenAI's JSON."""
    status = next(problem for kind, problem in PROBLEMS.items() if isinstance(error, kind))[0]
    return JSONResponse(error_content(error), status_code=status, headers=HEADERS.get(status))


def error_content(error: Exception) -> dict[str, Any]:
    """Returns OpenAI's error object; what went wrong inside the program is only in its log."""
    _, kind, code = next(problem for kind, problem in PROBLEMS.items() if isinstance(error, kind))
    message = str(error) if isinstance(error, UserError) else "the server failed to answer this request"
    if isinstance(error, BadSample):
        message = error.reason
    param = error.param if isinstance(error, BadRequest) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, kw_only=True)
class AccessRules:
    """Says which requests are let in.

    Attributes:
        hosts: the names and addresses, in lower case, that requests may be sent to.
        origins: the hosts whose pages may send requests here from any port, such as a proxy's.
        key: what every request must carry; None asks for nothing.
    """

    hosts: frozenset[str] = frozenset(LOCAL)
    origins: frozenset[str] = frozenset()
    key: str | None = None

    def check(self, headers: Headers) -> None:
        """Raises Refused or NoKey if a request may not come in."""
        hosts = [host.lower() for host in headers.getlist("host")]
        if len(hosts) != 1 or host_name(hosts[0]) not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            raise Refused(f"this answers to {names}, not to {short_repr(', '.join(hosts))}; --allow-host adds a name")
        for origin in headers.getlist("origin"):
            host = origin.lower().partition("://")[2]
            if host != hosts[0] and host_name(host) not in self.origins:
                raise Refused(f"pages of {short_repr(origin)} send nothing here; --allow-host adds a name")
        if self.key is None:
            return
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        key = credentials.strip().encode() if scheme.lower() == "bearer" else b""
        if scheme.lower() == "basic":  # the password that a browser has asked its user for
            with contextlib.suppress(ValueError):  # no base64, or not even ASCII
                key = base64.b64decode(credentials, validate=True).partition(b":")[2]
        if not secrets.compare_digest(key, self.key.encode()):
            raise NoKey("this needs the key that it was started with (Authorization: Bearer KEY, or as a password)")


def access_rules(options: argparse.Namespace) -> AccessRules:
    """Returns the rules that the command line states. Raises UserError if a name or the key is invalid."""
    names = {host: host_name(host.lower()) for host in options.allow_host}
    for host, name in names.items():
        if name is None:
            raise UserError(f"--allow-host {short_repr(host)}: give a name or an address, such as gpu.example.org")
    key = os.environ.get(KEY_VARIABLE) if options.api_key is None else options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise UserError(f"--api-key or {KEY_VARIABLE}: a key is one or more ASCII characters without spaces")
    allowed = frozenset(name for name in names.values() if name)
    listening_on = frozenset({options.host.lower()}).difference(EVERY_ADDRESS)
    return AccessRules(hosts=allowed | listening_on | {*LOCAL}, origins=allowed, key=key)


MOST_CONNECTIONS = 512
MOST_OF_A_CLIENT = 128
"""At most this many requests of one address are answered at a time; every open page holds one or two."""
HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10.0


class TimedHeads(H11Protocol):
    """Closes a connection whose next head has not come whole in time, for which uvicorn would wait for ever."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] - as uvicorn's
        """Waits for the first head."""
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        """Waits for the rest of a head, or no more."""
        super().data_received(data)
        self._time_head()

    def _time_head(self) -> None:
        is_whole = self.conn.their_state is not h11.IDLE
        if self._head_timer is not None and is_whole:
            self._head_timer.cancel()
            self._head_timer = None
        elif self._head_timer is None and not is_whole:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def http_config(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """Tells how uvicorn serves an application: its own limits, no websockets, and few words in its log."""
    limits: dict[str, Any] = {"limit_concurrency": MOST_CONNECTIONS, "h11_max_incomplete_event_size": HEAD_BYTES}
    return uvicorn.Config(app, http=TimedHeads, ws="none", **limits, **{"log_level": "warning", **settings})


class ByteBudget:
    """Bounds the bytes that are on their way at a time.

    Args:
        largest: bytes of one request's content.
        together: bytes of all requests, of all clients, whose content has not come whole.
    """

    def __init__(self, largest: int, together: int) -> None:
        self._largest, self._together = largest, together
        self._arriving = 0

    @contextlib.contextmanager
    def arriving(self, headers: Headers, stored: int = 0) -> Iterator[Callable[[int], None]]:
        """Gives a function that counts one request's bytes as they come, whatever size it states.

        `stored` bytes count beside those on their way.
        """
        length, arrived = headers.get("content-length", ""), 0

        def count(size: int, expected: int = 0) -> None:
            nonlocal arrived
            arrived += size
            self._arriving += size
            if arrived + expected > self._largest:
                raise TooLarge(f"the request is larger than the {self._largest:,} bytes allowed here")
            if stored + self._arriving + expected > self._together:
                raise TooManyRequests("too much is being sent by all clients together; try again later")

        try:
            count(0, int(length) if length.isdecimal() else 0)
            yield count
        finally:
            self._arriving -= arrived


class AccessMiddleware:
    """Lets a request in and reads its JSON whole, within limits of bytes, seconds and requests at a time."""

    def __init__(self, app: ASGIApp, rules: AccessRules, *, content_seconds: float, budget: ByteBudget) -> None:
        self._app, self._rules = app, rules
        self._content_seconds, self._budget = content_seconds, budget
        self._of_client: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        with contextlib.ExitStack() as until_answered:
            try:
                self._check(scope, headers)
                until_answered.enter_context(self._one_more_of((scope.get("client") or ("", 0))[0]))
                if scope["method"] == "POST":
                    receive = await self._content(scope, headers, receive, until_answered)
            except UserError as error:
                await error_response(error)(scope, receive, send)
                return
            with contextlib.suppress(UserError):  # an upload was broken off, which Gradio has answered
                await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        self._rules.check(headers)

    @contextlib.contextmanager
    def _one_more_of(self, client: str) -> Iterator[None]:
        if self._of_client[client] >= MOST_OF_A_CLIENT:
            raise TooManyRequests(f"{MOST_OF_A_CLIENT} requests from your address are being answered; try again later")
        self._of_client[client] += 1
        try:
            yield
        finally:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    async def _content(
        self, scope: Scope, headers: Headers, receive: Receive, until_answered: contextlib.ExitStack
    ) -> Receive:
        """Reads a request's JSON; gives its messages anew."""
        # A browser lets any web page post other types to this machine unasked.
        declared = headers.get("content-type", "")
        if declared.partition(";")[0].strip().lower() != "application/json":
            raise NotJson(f"the request's Content-Type must be application/json, not {short_repr(declared)}")
        with self._budget.arriving(headers) as count:
            try:
                content = await Request(scope, limited(receive, self._content_seconds, count)).body()
            except ClientDisconnect:
                raise Stopped("the client has gone away") from None
        self._check_content(content)
        left: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

        async def next_message() -> Message:
            return left.pop() if left else await receive()

        return next_message

    def _check_content(self, content: bytes) -> None:
        """Raises UserError where the content may not come in; the page's middleware looks at it."""


def limited(receive: Receive, seconds: float, count: Callable[[int], None]) -> Receive:
    """Counts a request's bytes as they come; all of them must come in time (else TooLate)."""
    deadline, coming = time.monotonic() + seconds, True

    async def next_message() -> Message:
        nonlocal coming
        if not coming:  # what comes after the content, such as that the client leaves, may take any time
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise TooLate(f"the request was not sent within {seconds:g} s") from None
        coming = bool(message.get("more_body"))
        count(len(message.get("body", b"")))
        return message

    return next_message


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
"""The page asks for these addresses, by method."""
UPLOAD_SECONDS = 300.0
MOST_UPLOADS = 1000
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; frame-ancestors 'self'"
)
"""A visitor's browser loads nothing from another host, whatever a page of Gradio's asks for."""


class Uploads:
    """Holds files that visitors have sent until the page reads them, within limits of number, bytes and time.

    Args:
        folder: where Gradio keeps them, each in a folder of its own.
        most_bytes: bytes of all of them, those on their way too.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder.resolve()
        self._budget = ByteBudget(most_bytes, most_bytes)
        self._coming = 0

    def holds(self, path: str) -> bool:
        """Tells whether a path is a file that was uploaded."""
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
    def arriving(self, headers: Headers) -> Iterator[Callable[[int], None]]:
        """Gives what counts an upload's bytes as they come; old uploads that nobody has read are deleted first."""
        sizes = self.delete_old()
        if len(sizes) >= MOST_UPLOADS:
            raise TooManyRequests("too many uploads wait to be read; try again in a few minutes")
        self._coming += 1
        try:
            with self._budget.arriving(headers, stored=sum(sizes)) as count:
                yield count
        finally:
            self._coming -= 1
            if not self._coming:  # Gradio has moved whole ones into folders of their own: the rest was broken off
                for file in [path for path in self.folder.iterdir() if path.is_file()]:
                    self._remove(file)

    def delete_old(self) -> list[int]:
        """Deletes what is older than any upload that may still be on its way; the sizes of what is left."""
        sizes, oldest = [], time.time() - UPLOAD_SECONDS - 60
        for file in [path for path in self.folder.rglob("*") if not path.is_dir()]:
            with contextlib.suppress(FileNotFoundError):  # it was read just now
                status = file.lstat()
                if status.st_mtime >= oldest:
                    sizes.append(status.st_size)
                else:
                    self._remove(file)
        return sizes

    def _remove(self, file: Path) -> None:
        """Deletes a file, and its folder where nothing else is in it, such as the same content under another name."""
        with contextlib.suppress(OSError):
            file.unlink()
            if file.parent != self.folder:
                file.parent.rmdir()


class PageMiddleware(AccessMiddleware):
    """Lets through what the page asks for, where it names no file but uploaded ones; `POLICY` is on every answer."""

    def __init__(self, app: ASGIApp, rules: AccessRules, *, budget: ByteBudget, uploads: Uploads) -> None:
        super().__init__(app, rules, content_seconds=UPLOAD_SECONDS, budget=budget)
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or refuses it."""

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await super().__call__(scope, receive, with_policy)

    def _check(self, scope: Scope, headers: Headers) -> None:
        super()._check(scope, headers)
        addresses = ADDRESSES.get(scope["method"])
        if addresses is None or not addresses.fullmatch(scope["path"]):
            raise Refused("the page has no such address")

    async def _content(
        self, scope: Scope, headers: Headers, receive: Receive, until_answered: contextlib.ExitStack
    ) -> Receive:
        if scope["path"] != UPLOAD:
            return await super()._content(scope, headers, receive, until_answered)
        count = until_answered.enter_context(self._uploads.arriving(headers))
        return limited(receive, self._content_seconds, count)

    def _check_content(self, content: bytes) -> None:
        try:
            values = [json.loads(content)]
        except (ValueError, RecursionError):
            raise Refused("the request is not JSON") from None
        while values:
            value = values.pop()
            if isinstance(value, dict):
                if "path" in value and not (isinstance(value["path"], str) and self._uploads.holds(value["path"])):
                    raise Refused("the request names a file that was not uploaded, or is gone")
                values += value.values()
            elif isinstance(value, list):
                values += value
