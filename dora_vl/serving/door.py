"""The one door of the server and of the page: by which names, from where, with which key and how fast one comes in.

Any web page that somebody visits may send requests to this machine: from its own origin, or, where its name is made to
lead here (DNS rebinding), as if it were this one. So `Host` must be a name that this program was told it has, and
`Origin`, which browsers add by themselves, the same place.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dora_vl.errors import BadSample, UserError, positive, shown
from dora_vl.serving.answering import Stopped, TooLate, TooManyRequests
from dora_vl.serving.model import UnknownModel
from dora_vl.serving.requests import BadRequest, NotJson, TooLarge

if TYPE_CHECKING:
    from dora_vl.serving.answering import EngineSettings
    from dora_vl.serving.requests import MediaLimits


# How each error is told over HTTP: status, and OpenAI's error object.


class Refused(UserError):
    """Whoever asks may not, or not for this."""


class NoKey(UserError):
    """The program was started with a key, and the request lacks it."""


@dataclass(frozen=True)
class Problem:
    """How an error is told: its HTTP status and OpenAI's type and code."""

    status: int
    type: str
    code: str | None = None


INVALID = Problem(400, "invalid_request_error")
PROBLEMS: Mapping[type[Exception], Problem] = {
    NoKey: Problem(401, "invalid_request_error", "invalid_api_key"),
    Refused: Problem(403, "invalid_request_error", "refused"),
    UnknownModel: Problem(404, "invalid_request_error", "model_not_found"),
    TooLarge: Problem(413, "invalid_request_error", "too_large"),
    NotJson: Problem(415, "invalid_request_error", "not_json"),
    TooManyRequests: Problem(429, "rate_limit_error", "too_many_requests"),
    Stopped: Problem(503, "server_error", "stopped"),
    TooLate: Problem(504, "server_error", "timeout"),
    BadRequest: INVALID,
    BadSample: INVALID,
    UserError: INVALID,
}
"""The first class that an error is of counts, from the top."""
HEADERS: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": 'Basic realm="dora-vl"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
"""What an answer of a status has besides; a browser asks for the key where this scheme stands alone."""
INTERNAL = Problem(500, "server_error", "internal_error")


def error_response(error: Exception, param: str | None = None) -> JSONResponse:
    """An error as OpenAI's JSON."""
    problem = problem_of(error)
    return JSONResponse(error_content(error, param), status_code=problem.status, headers=HEADERS.get(problem.status))


def problem_of(error: Exception) -> Problem:
    """How an error is told."""
    return next((problem for kind, problem in PROBLEMS.items() if isinstance(error, kind)), INTERNAL)


def error_content(error: Exception, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; what went wrong inside is in the log alone."""
    problem = problem_of(error)
    message = "the server failed to answer this request" if problem is INTERNAL else str(error)
    if isinstance(error, BadSample):
        message = error.reason
    place = error.place if isinstance(error, BadRequest) else param
    return {"error": {"message": message, "type": problem.type, "param": place, "code": problem.code}}


LOCAL = ("localhost", "127.0.0.1", "::1")
HEAD_SECONDS, HEAD_BYTES = 10.0, 64 * 1024
"""For a request's line and headers, from the moment that the connection stands or the first of them comes."""
MOST_CONNECTIONS = 512
_PLACE = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\[\]:/?#@\\\s]+))(?::\d*)?")


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Who may come in.

    Attributes:
        hosts: names and addresses that requests may be sent to, in lower case.
        origins: those of them whose pages may send requests here whatever their port, such as a proxy's.
        key: what a client must know; None: nothing.
    """

    hosts: frozenset[str] = frozenset(LOCAL)
    origins: frozenset[str] = frozenset()
    key: str | None = None

    def check(self, headers: Headers) -> None:
        """Lets a request in.

        Raises:
            Refused: it was sent to another name, or by a page of another origin.
            NoKey: it lacks the key.
        """
        hosts = [one.lower() for one in headers.getlist("host")]
        if len(hosts) != 1 or name_of(hosts[0]) not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            raise Refused(f"this answers to {names}, not to {shown(', '.join(hosts))}; --allow-host adds a name")
        for origin in headers.getlist("origin"):
            place = origin.lower().partition("://")[2]
            if place != hosts[0] and name_of(place) not in self.origins:
                raise Refused(f"pages of {shown(origin)} send nothing here; --allow-host adds a name")
        if self.key is not None and not secrets.compare_digest(_given_key(headers), self.key.encode()):
            raise NoKey("this needs the key that it was started with (Authorization: Bearer KEY, or as a password)")


def name_of(place: str) -> str | None:
    """The host of `host[:port]`; None where it is none."""
    found = _PLACE.fullmatch(place)
    return found and (found["v6"] or found["name"].removesuffix("."))


def _given_key(headers: Headers) -> bytes:
    """A client's key: a bearer's token, or the password that a browser has asked its person for."""
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return given.strip().encode()
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2] if kind.lower() == "basic" else b""
    except binascii.Error:
        return b""


class Door:
    """Stands before an application.

    Args:
        app: the application.
        admission: who may come in.
        body_seconds: longest time that a request's content may take to come.
    """

    def __init__(self, app: ASGIApp, admission: Admission, body_seconds: float) -> None:
        self._app = app
        self._admission = admission
        self._body_seconds = body_seconds

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
            self._admission.check(Headers(scope=scope))
            await self._app(scope, _in_time(receive, self._body_seconds), noted)
        except UserError as error:
            if not begun:
                await error_response(error)(scope, receive, send)


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Messages of a request, whose content must come within so many seconds; what comes after it has all the time.

    Receiving raises TooLate where it does not.
    """
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


class _HeadInTime(H11Protocol):
    """Closes a connection on which a request's head has begun, or should have, and does not end."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self._close_without_head)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _close_without_head(self) -> None:
        self._waiting = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


def http_config(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """How an application is served: few connections at a time, whose heads are short and come soon.

    Args:
        settings: others of uvicorn's.
    """
    return uvicorn.Config(
        app,
        http=_HeadInTime,
        h11_max_incomplete_event_size=HEAD_BYTES,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        **{"log_level": "warning", **settings},
    )


# What the command lines of the server and of the page share: where they listen, to whom, batches, limits.


MIB = 2**20
KEY_VARIABLE = "DORA_VL_API_KEY"
EVERY_ADDRESS = frozenset({"", "0.0.0.0", "::"})


def add_address(to: argparse.ArgumentParser, *, port: int) -> None:
    """Where it listens, and to whom."""
    to.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    to.add_argument("--port", type=_port, default=port, help=f"0 takes a free one (default: {port})")
    to.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that it is reached by, beside localhost and --host; may be given several times",
    )
    to.add_argument("--api-key", metavar="KEY", help=f"what clients must know (default: {KEY_VARIABLE}; else nothing)")


def add_answers(to: argparse._ArgumentGroup) -> None:
    """How questions are answered, where they do not say it themselves, and how they become batches."""
    to.add_argument("--max-new-tokens", type=positive, default=256, help="longest answer where none is asked for (256)")
    to.add_argument("--temperature", type=_temperature, default=0.0, help="likewise (0: the likeliest token)")
    to.add_argument("--batch", type=positive, default=16, help="most requests answered together (16)")
    to.add_argument("--batch-tokens", type=positive, default=32768, help="most tokens of a batch, answers too (32768)")
    to.add_argument("--window-ms", type=seconds, default=5.0, help="how long a batch waits for more requests (5)")
    to.add_argument("--waiting", type=positive, default=64, help="most requests that wait; more are refused (64)")
    to.add_argument("--answer-seconds", type=seconds, default=300.0, help="from request to end of its answer (300)")
    to.add_argument("--max-prompt-tokens", type=positive, help="longest prompt (what the model has positions for)")


def add_media(to: argparse._ArgumentGroup) -> None:
    """What a request may show."""
    to.add_argument("--max-pictures", type=_count, default=8, help="of a request (8)")
    to.add_argument("--max-picture-mpx", type=positive, default=40, help="megapixels of a picture (40)")
    to.add_argument("--max-videos", type=_count, default=1, help="of a request (1)")
    to.add_argument("--max-media-mib", type=positive, default=32, help="of one picture or video (32)")
    to.add_argument("--frames", type=positive, default=8, help="frames of a video that the model sees (8)")
    to.add_argument("--video-seconds", type=seconds, default=20.0, help="longest time to decode a video (20)")


def admission(options: argparse.Namespace) -> Admission:
    """The options about who may come in.

    Raises:
        UserError: a name or the key is none.
    """

    names = {given: name_of(given.lower()) for given in options.allow_host}
    for given, name in names.items():
        if name is None:
            raise UserError(f"--allow-host {shown(given)}: give a name or an address, such as gpu.example.org")
    key = os.environ.get(KEY_VARIABLE) if options.api_key is None else options.api_key
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        raise UserError(f"--api-key or {KEY_VARIABLE}: a key is one or more ASCII characters without spaces")
    allowed = frozenset(name for name in names.values() if name)
    own = frozenset({options.host.lower()}) - EVERY_ADDRESS
    return Admission(hosts=allowed | own | {*LOCAL}, origins=allowed, key=key)


def engine_settings(options: argparse.Namespace) -> EngineSettings:
    """The options about batches."""
    from dora_vl.serving.answering import EngineSettings

    return EngineSettings(
        batch_rows=options.batch,
        batch_tokens=options.batch_tokens,
        window_seconds=options.window_ms / 1000,
        waiting=options.waiting,
        answer_seconds=options.answer_seconds,
        prompt_tokens=options.max_prompt_tokens,
    )


def media_limits(options: argparse.Namespace) -> MediaLimits:
    """The options about what is shown; nothing is fetched from the web."""
    from dora_vl.serving.requests import MediaLimits

    return MediaLimits(
        pictures=options.max_pictures,
        videos=options.max_videos,
        picture_pixels=options.max_picture_mpx * 1_000_000,
        bytes=options.max_media_mib * MIB,
        frames=options.frames,
        video_seconds=options.video_seconds,
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket on this address, taken before the weights are read.

    Raises:
        UserError: there is no such address here, or another program has it.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; choose others") from error


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{number} is no port")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def seconds(text: str) -> float:
    """A time above 0, as a type of argparse.

    Raises:
        ArgumentTypeError: it is none; argparse names the option.
    """
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2")
    return number
