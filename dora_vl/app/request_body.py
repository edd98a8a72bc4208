"""The JSON that a request brings: of its declared type, of at most so many bytes, values and seconds, and checked."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TypeVar

from anyio.to_thread import run_sync
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from dora_vl.app.answering import Stopped, TooLate
from dora_vl.app.request_media import BadRequest, TooLarge
from dora_vl.errors import UserError, one_line, shown

Model = TypeVar("Model", bound=BaseModel)
JSON_TYPE = "application/json"
MOST_VALUES = 200_000
"""Commas and opening brackets of a request: each value has one before it, and may take a hundred times its bytes."""
BEFORE_A_VALUE = (b",", b"[", b"{")
TEXTS_OF_A_VALUE = 2
"""Of a comma or bracket at most, in JSON that is right: a name and a text."""
NO_MARKS = bytes(set(range(256)).difference(b'"', *BEFORE_A_VALUE))
LONGEST_PLACE, LONGEST_REASON = 80, 300


class NotJson(UserError):
    """A request's content is not declared as JSON."""


async def read_body(request: Request, kind: type[Model], *, most: int, seconds: float) -> Model:
    """A request's content.

    Args:
        most: bytes.
        seconds: longest time that the client may take to send it.

    Raises:
        NotJson: it is not declared as JSON. A browser lets any web page post other types to this machine unasked.
        TooLarge: it has more bytes, or more values than any request needs.
        TooLate: it took longer.
        Stopped: the client has gone away.
        BadRequest: it is wrong; the first place that is.
    """
    declared = request.headers.get("content-type", "")
    if declared.partition(";")[0].strip().lower() != JSON_TYPE:
        raise NotJson(f"the request's Content-Type must be {JSON_TYPE}, not {shown(declared)}")
    try:
        content = await asyncio.wait_for(_received(request, most), seconds)
    except ClientDisconnect:
        raise Stopped("the client has gone away") from None
    except asyncio.TimeoutError:
        raise TooLate(f"the request was not sent within {seconds:g} s") from None
    return await run_sync(partial(parsed, kind, content))


async def _received(request: Request, most: int) -> bytes:
    stated = request.headers.get("content-length", "")
    too_large = TooLarge(f"the request is larger than the {most:,} bytes allowed here")
    if stated.isdecimal() and int(stated) > most:
        raise too_large
    content = bytearray()
    async for chunk in request.stream():
        content.extend(chunk)
        if len(content) > most:
            raise too_large
    return bytes(content)


def parsed(kind: type[Model], content: bytes) -> Model:
    """A request's JSON, checked.

    Raises:
        TooLarge: it holds more values than any request needs.
        BadRequest: it names the first place that is wrong.
    """
    if _holds_too_many(content):
        beyond = f"the request holds more than {MOST_VALUES:,} commas and opening brackets outside of its texts"
        raise TooLarge(f"{beyond}; none needs as many")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Of several forms of one place the one that came farthest: deepest, and beyond its type.
        first = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
        place = ".".join(map(str, first["loc"])) or "the request"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BadRequest(one_line(place, LONGEST_PLACE), one_line(first["msg"], LONGEST_REASON) + more) from None


def _holds_too_many(content: bytes) -> bool:
    """Whether it holds too many values, before any is made: each step is one pass, in C, whatever a client wrote.

    Past the first place where it is no JSON the count may be wrong; the parser reads no further either.
    """
    if _values(content) <= MOST_VALUES:  # nearly always, and its texts need not be told apart
        return False
    unescaped = content.replace(rb"\\", b"").replace(rb"\"", b"")
    marks = unescaped.translate(None, NO_MARKS)
    if marks.count(b'"') > 2 * TEXTS_OF_A_VALUE * (MOST_VALUES + 1):  # or there would be as many pieces
        return True
    return _values(b"".join(marks.split(b'"')[::2])) > MOST_VALUES


def _values(content: bytes) -> int:
    return sum(map(content.count, BEFORE_A_VALUE))
