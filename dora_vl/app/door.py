"""The one door of the server and of the page: by which names, from where, with which key and how fast one comes in.

Any web page that somebody visits may send requests to this machine: from its own origin, or, where its name is made to
lead here (DNS rebinding), as if it were this one. So `Host` must be a name that this program was told it has, and
`Origin`, which browsers add by themselves, the same place.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dora_vl.app.answering import TooLate
from dora_vl.app.http_errors import NoKey, Refused, error_response
from dora_vl.errors import UserError, shown

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
