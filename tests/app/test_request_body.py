"""A request's JSON: of whatever size and however wrong, it is refused in little time and memory, in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from dora_vl.serving.requests import (
    MOST_FIELDS,
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_VALUES,
    BadRequest,
    ChatRequest,
    TooLarge,
    parsed,
)

MANY = 80_000
MOST_ERRORS = 40
SAID = {"role": "user", "content": "a"}
TEXT = {"type": "text", "text": "a"}


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "one", "messages": [SAID], **fields}


def names(count: int) -> dict[str, Any]:
    return {f"a{number}": 0 for number in range(count)}


WRONG: dict[str, Callable[[int], Any]] = {
    "messages": lambda count: request(messages=[0] * count),
    "good messages": lambda count: request(messages=[SAID] * (count // 2)),
    "parts": lambda count: request(messages=[{"role": "user", "content": [0] * count}]),
    "good parts": lambda count: request(messages=[{"role": "user", "content": [TEXT] * (count // 2)}]),
    "stop": lambda count: request(stop=[0] * count),
    "fields": lambda count: request(**names(count)),
    "fields of a message": lambda count: request(messages=[{**SAID, **names(count)}]),
    "fields of a part": lambda count: request(messages=[{"role": "user", "content": [{**TEXT, **names(count)}]}]),
    "fields of a picture": lambda count: request(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a", **names(count)}}]}]
    ),
    "metadata": lambda count: request(metadata=names(count)),
    "no object": lambda count: [0] * count,
}
"""What a request may hold too many of."""


@pytest.mark.parametrize("what", WRONG)
def test_however_much_is_wrong_few_errors_are_collected(what: str) -> None:
    """Pydantic keeps a kilobyte for each, and by itself one for each item and each field that is unknown."""
    body = json.dumps(WRONG[what](MANY)).encode()
    with pytest.raises(ValidationError) as found:
        ChatRequest.model_validate_json(body)
    assert found.value.error_count() <= MOST_ERRORS
    with pytest.raises(BadRequest) as refused:
        parsed(ChatRequest, body)
    assert len(str(refused.value)) < 500


MEASURE = """
import json, resource, sys, time
from dora_vl.serving.requests import ChatRequest
from dora_vl.serving.requests import parsed
from dora_vl.errors import UserError

for body in (b'{"messages":[' + b"0," * COUNT + b"0]}", b"{" + b'"a":0,' * COUNT + b'"a":0}', b"[" * COUNT):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        parsed(ChatRequest, body)
    except UserError as error:
        name = type(error).__name__
    after, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time() - began
    print(json.dumps([name, (after - before) / 1024, seconds]))
"""


def test_two_million_values_are_refused_in_little_time_and_memory() -> None:
    """Before they become objects: in a process of its own, whose largest memory is looked at."""
    script = MEASURE.replace("COUNT", "2_000_000")
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == 3
    for name, mib, seconds in found:
        assert name == "TooLarge"
        assert mib < 40, mib  # the bodies themselves have 12 MB at most
        assert seconds < 2, seconds


def test_what_is_allowed_passes() -> None:
    """The most of everything, and a long text of commas and brackets."""
    fits = request(
        messages=[SAID] * (MOST_MESSAGES - 1) + [{"role": "user", "content": [TEXT] * MOST_PARTS}],
        metadata=dict.fromkeys(map(str, range(MOST_FIELDS)), "a"),
    )
    assert len(parsed(ChatRequest, json.dumps(fits).encode()).messages) == MOST_MESSAGES
    text = "[1, {2" * (MOST_VALUES // 3 - 20)
    assert parsed(ChatRequest, json.dumps(request(messages=[{**SAID, "content": text}])).encode()).model == "one"
    url = "data:image/png;base64," + "A" * 10_000_000
    picture = {"type": "image_url", "image_url": url}
    assert parsed(ChatRequest, json.dumps(request(messages=[{"role": "user", "content": [picture]}])).encode())


TEXTS = {
    "commas": "," * 300_000,
    "brackets": "[{" * 150_000,
    "quotes": '",' * 300_000,
    "backslashes": "\\," * 300_000,
    "both": '\\",\\\\"[' * 150_000,
    "a backslash at its end": "," * 300_000 + "\\",
    "a quote at its end": "," * 300_000 + '"',
}


@pytest.mark.parametrize("what", TEXTS)
def test_what_stands_in_a_text_is_no_value(what: str) -> None:
    said = {**SAID, "content": TEXTS[what]}
    assert parsed(ChatRequest, json.dumps(request(messages=[said])).encode()).model == "one"
    with pytest.raises(TooLarge):
        parsed(ChatRequest, json.dumps(request(messages=[said], metadata=[0] * 300_000)).encode())


@pytest.mark.parametrize("value", ["0", '""', '"a,b"', '"\\\\"', '"\\\\\\""', "[]", '{"a":"b"}'])
def test_a_value_of_any_kind_is_counted(value: str) -> None:
    for count, error in ((MOST_VALUES // 3, BadRequest), (MOST_VALUES + 1, TooLarge)):
        with pytest.raises(error):
            parsed(ChatRequest, f"[{','.join([value] * count)}]".encode())


UNCLOSED = {
    "a text": (b'{"model": "', b",", b""),
    "escaped quotes": (b'{"model": "', rb"\",", b""),
    "a backslash": (b'{"model": "', b",", b"\\"),
    "texts without a comma": (b"", b'"",', b'"'),
    "backslashes outside of a text": (b"[", rb"\",", b""),
    "nothing but quotes": (b",,", b'""', b","),
}


@pytest.mark.parametrize("what", UNCLOSED)
def test_what_is_never_closed_is_refused_in_little_time(what: str) -> None:
    begin, middle, end = UNCLOSED[what]
    body = begin + middle * (20_000_000 // len(middle)) + end
    began = time.process_time()
    with pytest.raises((BadRequest, TooLarge)):
        parsed(ChatRequest, body)
    assert time.process_time() - began < 5


PART = {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"best_of": 2}, "best_of"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        ({"messages": [SAID, {"role": "user", "content": 5}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": [PART, {"type": "audio"}]}]}, "messages[0].content[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{**PART, "str": 1}]}]}, "messages[0].content[0].str"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stop": [1]}, "stop[0]"),
    ],
)
def test_a_place_is_as_the_client_wrote_it(wrong: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parsed(ChatRequest, json.dumps(request(**wrong)).encode())
    assert refused.value.place == place


def test_what_clients_send_along_is_taken() -> None:
    along = {"service_tier": "auto", "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "user": "me"}
    along |= {"prompt_cache_key": "a", "safety_identifier": "b", "metadata": {"run": "1"}}
    assert parsed(ChatRequest, json.dumps(request(**along)).encode()).model == "one"


def test_one_more_is_refused() -> None:
    many_parts = [{"role": "user", "content": [TEXT] * (MOST_PARTS + 1)}]
    for body, place in (
        (request(messages=[SAID] * (MOST_MESSAGES + 1)), "messages"),
        (request(metadata=names(MOST_FIELDS + 1)), "metadata"),
        (request(**names(MOST_FIELDS)), "the request"),
        (request(messages=many_parts), "messages[0].content"),
        (request(messages=[{"role": "user", "content": [{"type": "x" * 100_000}]}]), "messages[0].content[0]"),
    ):
        with pytest.raises(BadRequest) as refused:
            parsed(ChatRequest, json.dumps(body).encode())
        assert refused.value.place == place
        assert len(str(refused.value)) < 500
