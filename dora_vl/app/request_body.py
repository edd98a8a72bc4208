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
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise TooLarge(f"the request holds more than {MOST_VALUES:,} commas and opening brackets; none needs as many")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Of several forms of one place the one that came farthest: deepest, and beyond its type.
        first = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
        place = ".".join(map(str, first["loc"])) or "the request"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BadRequest(one_line(place, LONGEST_PLACE), one_line(first["msg"], LONGEST_REASON) + more) from None
