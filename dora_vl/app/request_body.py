"""The JSON that a request brings: of its declared type, of at most so many bytes and values, and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from dora_vl.app.answering import Stopped, TooManyRequests
from dora_vl.app.request_media import BadRequest, TooLarge
from dora_vl.errors import UserError, one_line, shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)
JSON_TYPE = "application/json"
MOST_VALUES = 200_000
"""Commas and opening brackets of a request: each value has one before it, and may take a hundred times its bytes."""
BEFORE_A_VALUE = (b",", b"[", b"{")
TEXTS_OF_A_VALUE = 2
"""Of a comma or bracket at most, in JSON that is right: a name and a text."""
NO_MARKS = bytes(set(range(256)).difference(b'"', *BEFORE_A_VALUE))
LONGEST_PLACE, LONGEST_REASON = 80, 300
FORM = re.compile(r"str|list\[.*\]")
REASONS = {
    "missing": "it is missing",
    "extra_forbidden": "there is no such field here",
    "union_tag_invalid": "its type must be text, image_url or video_url",
    "union_tag_not_found": "it needs a type: text, image_url or video_url",
}
WORDS = {
    "Input should be": "it must be",
    "List should have": "it must have",
    " after validation": "",
    "a valid ": "a ",
    "a integer": "an integer",
    "a object": "an object",
    "Value error, ": "",
    "Invalid JSON": "it is no JSON",
}


class NotJson(UserError):
    """A request's content is not declared as JSON."""


@dataclass
class Intake:
    """The content of requests while it comes: a client that sends slowly has no more of it than it has sent.

    Attributes:
        each: most bytes of a request.
        together: of all that are on their way.
    """

    each: int
    together: int
    _coming: int = 0

    async def content(self, request: Request) -> bytes:
        """A request's content, whole.

        Raises:
            TooLarge: it has more bytes.
            TooManyRequests: too many bytes of requests are on their way.
            Stopped: the client has gone away.
        """
        stated = request.headers.get("content-length", "")
        too_large = TooLarge(f"the request is larger than the {self.each:,} bytes allowed here")
        if stated.isdecimal() and int(stated) > self.each:
            raise too_large
        content = bytearray()
        try:
            async for chunk in request.stream():
                content.extend(chunk)
                self._coming += len(chunk)
                if len(content) > self.each:
                    raise too_large
                if self._coming > self.together:
                    raise TooManyRequests("too many requests are being sent; try again later")
        except ClientDisconnect:
            raise Stopped("the client has gone away") from None
        finally:
            self._coming -= len(content)
        return bytes(content)


def check_json(request: Request) -> None:
    """Refuses what is not declared as JSON: a browser lets any web page post other types to this machine unasked.

    Raises:
        NotJson: it is not.
    """
    declared = request.headers.get("content-type", "")
    if declared.partition(";")[0].strip().lower() != JSON_TYPE:
        raise NotJson(f"the request's Content-Type must be {JSON_TYPE}, not {shown(declared)}")


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
        places = [_place(one) for one in errors]
        place, others = _place(first), {one for one in places if not _place(first).startswith(one)}
        more = f" (and {len(others)} more)" if others else ""
        raise BadRequest(one_line(place, LONGEST_PLACE), one_line(_reason(first), LONGEST_REASON) + more) from None


def _place(error: ErrorDetails) -> str:
    """Where it is, such as `messages[0].content[1].image_url`: without pydantic's names for the forms of a value."""
    place, form = "", False
    for number, piece in enumerate(error["loc"]):
        named = error["type"] == "extra_forbidden" and number == len(error["loc"]) - 1
        if isinstance(piece, int):
            place += f"[{piece}]"
        elif (form or FORM.fullmatch(piece)) and not named:
            form = not form and piece != "str"  # an item's form comes after its number
        else:
            place += f".{piece}"
    return place.removeprefix(".") or "the request"


def _reason(error: ErrorDetails) -> str:
    """What is wrong, to a person who knows OpenAI's fields and not pydantic's."""
    reason = REASONS.get(error["type"], error["msg"])
    for theirs, ours in WORDS.items():
        reason = reason.replace(theirs, ours)
    return reason


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
