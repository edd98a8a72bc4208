"""A request's JSON: of whatever size and however wrong, it is refused in little time and memory, in one line."""

from __future__ import annotations

import copy
import http.client
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import Settings
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
from tests.fuzz.damage import damage
from tests.serving.tiny_served import RED, data_url, running

MANY = 80_000
TURN = {"role": "user", "content": "a"}
TEXT = {"type": "text", "text": "a"}


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "one", "messages": [TURN], **fields}


def with_parts(*parts: Any) -> dict[str, Any]:
    return request(messages=[{"role": "user", "content": list(parts)}])


def read(body: Any) -> ChatRequest:
    return parsed(ChatRequest, json.dumps(body).encode())


def names(count: int) -> dict[str, Any]:
    return {f"a{number}": 0 for number in range(count)}


WRONG: dict[str, Callable[[int], Any]] = {
    "messages": lambda count: request(messages=[0] * count),
    "good messages": lambda count: request(messages=[TURN] * (count // 2)),
    "parts": lambda count: with_parts(*[0] * count),
    "good parts": lambda count: with_parts(*[TEXT] * (count // 2)),
    "stop": lambda count: request(stop=[0] * count),
    "fields": lambda count: request(**names(count)),
    "fields of a message": lambda count: request(messages=[{**TURN, **names(count)}]),
    "fields of a part": lambda count: with_parts({**TEXT, **names(count)}),
    "fields of a picture": lambda count: with_parts({"type": "image_url", "image_url": {"url": "a", **names(count)}}),
    "metadata": lambda count: request(metadata=names(count)),
    "no object": lambda count: [0] * count,
}
"""What a request may hold too many of."""


@pytest.mark.parametrize("what", WRONG)
def test_however_much_is_wrong_few_errors_are_collected(what: str) -> None:
    """Pydantic keeps a kilobyte for each, and by itself one for each item and each field that is unknown."""
    body = WRONG[what](MANY)
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate_json(json.dumps(body).encode())
    assert refused.value.error_count() <= 40
    with pytest.raises(BadRequest) as error:
        read(body)
    assert len(str(error.value)) < 500


ENDLESS: dict[str, tuple[bytes, bytes, bytes]] = {
    "items": (b'{"messages":[', b"0,", b"0]}"),
    "fields": (b"{", b'"a":0,', b'"a":0}'),
    "brackets": (b"", b"[", b""),
    "a text": (b'{"model": "', b",", b""),
    "escaped quotes": (b'{"model": "', rb"\",", b""),
    "a backslash": (b'{"model": "', b",", b"\\"),
    "texts without a comma": (b"", b'"",', b'"'),
    "backslashes outside of a text": (b"[", rb"\",", b""),
    "nothing but quotes": (b",,", b'""', b","),
}
"""How a request begins, what is in it until it has ten megabytes, and how it ends; some are never closed."""


@pytest.mark.parametrize("what", ENDLESS)
def test_ten_megabytes_of_values_or_of_what_is_never_closed_are_refused_soon(what: str) -> None:
    """Before they become objects: of those the first would have 16 bytes and more for each of its own."""
    begin, middle, end = ENDLESS[what]
    body = begin + middle * (10_000_000 // len(middle)) + end
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises((BadRequest, TooLarge)):
        parsed(ChatRequest, body)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(body)
    assert seconds < 5


def test_what_is_allowed_passes() -> None:
    """The most of everything, a long text of commas and brackets, a large picture, what clients send along."""
    fits = request(
        messages=[TURN] * (MOST_MESSAGES - 1) + [{"role": "user", "content": [TEXT] * MOST_PARTS}],
        metadata=dict.fromkeys(map(str, range(MOST_FIELDS)), "a"),
    )
    assert len(read(fits).messages) == MOST_MESSAGES
    assert read(request(messages=[{**TURN, "content": "[1, {2" * (MOST_VALUES // 3 - 20)}]))
    assert read(with_parts({"type": "image_url", "image_url": "data:image/png;base64," + "A" * 10_000_000}))
    along = {"service_tier": "auto", "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "user": "me"}
    along |= {"prompt_cache_key": "a", "safety_identifier": "b", "metadata": {"run": "1"}}
    assert read(request(**along)).model == "one"
    assert read(request(stop="a")).stop == ["a"]


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
    message = {**TURN, "content": TEXTS[what]}
    assert read(request(messages=[message])).model == "one"
    with pytest.raises(TooLarge):
        read(request(messages=[message], metadata=[0] * MOST_VALUES))


@pytest.mark.parametrize("value", ["0", '""', '"a,b"', '"\\\\"', '"\\\\\\""', "[]", '{"a":"b"}'])
def test_a_value_of_any_kind_is_counted(value: str) -> None:
    for count, error in ((MOST_VALUES // 3, BadRequest), (MOST_VALUES + 1, TooLarge)):
        with pytest.raises(error):
            parsed(ChatRequest, f"[{','.join([value] * count)}]".encode())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (request(best_of=2), "best_of"),
        (request(temperature="hot"), "temperature"),
        (request(temperature=3), "temperature"),
        (request(messages=None), "messages"),
        (request(messages=[{"role": "tool", "content": "a"}]), "messages[0].role"),
        (request(messages=[TURN, {"role": "user", "content": 5}]), "messages[1].content"),
        (with_parts(TEXT, {"type": "audio"}), "messages[0].content[1]"),
        (with_parts({"type": "text"}), "messages[0].content[0].text"),
        (with_parts({**TEXT, "str": 1}), "messages[0].content[0].str"),
        (request(tool_choice="required"), "tool_choice"),
        (request(stop=[1]), "stop[0]"),
        (request(stop=[""]), "stop[0]"),
        (request(messages=[TURN] * (MOST_MESSAGES + 1)), "messages"),
        (request(metadata=names(MOST_FIELDS + 1)), "metadata"),
        (request(**names(MOST_FIELDS)), "the request"),
        (with_parts(*[TEXT] * (MOST_PARTS + 1)), "messages[0].content"),
        (with_parts({"type": "x" * 100_000}), "messages[0].content[0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_place_is_as_the_client_wrote_it(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(body)
    assert refused.value.param == param
    assert len(str(refused.value)) < 500


# -- requests that are nearly right, to a server ---------------------------------------------------------------

VALID = request(
    messages=[
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "name": "me",
            "content": [
                TEXT,
                {"type": "image_url", "image_url": {"url": data_url(RED), "detail": "low"}},
                {"type": "image_url", "image_url": "http://127.0.0.1/"},
                {"type": "video_url", "video_url": {"url": "data:;base64,AAAA"}},
            ],
        },
        {"role": "assistant", "content": "red", "refusal": None},
        {"role": "user", "content": "And the shape?"},
    ],
    **{"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 3, "n": 1, "logprobs": False},
    **{"stream": False, "response_format": {"type": "text"}, "metadata": {"a": "b"}, "strength": 0.5},
)
"""With something of everything; the last of its pictures and videos are left out."""


@pytest.fixture(scope="module")
def address(model: ServedModel) -> Iterator[str]:
    limits = {"max_pictures": 3, "max_mpx": 0.001, "max_media_mib": 0.1, "max_body_mib": 0.2}
    settings = Settings(**limits, allow_remote_media=True, fetch_seconds=1.0, max_new_tokens=3)
    with running(model, settings) as address:
        yield address.removeprefix("http://")


def post(address: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_requests_get_an_answer_and_leave_memory_and_disk_as_they_were(address: str, count: int) -> None:
    """An answer, or OpenAI's error in one line."""
    memory: list[float] = []
    answered = 0
    for number in range(count):
        draw, body = Random(number), copy.deepcopy(VALID)
        parts = body["messages"][1]["content"]
        del parts[draw.randrange(1, 5) :]
        body = json.dumps(body).encode()
        for _ in range(draw.choice((0, 1, 1, 2))):
            body, _ = damage(body, "request.json", draw)
        status, content = post(address, body)
        assert status in (200, 400, 404, 413), (status, content[:300])
        answered += status == 200
        if status != 200:
            error = json.loads(content)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "\n" not in error["message"]
            assert len(error["message"]) < 500
        memory.append(resident_mib())
    assert answered
    assert memory[-1] - memory[len(memory) // 5] < 60  # a leak of a picture each would pass that by far
    left = [path.name for path in Path(tempfile.gettempdir()).glob("dora-vl-*")]
    assert [name for name in left if not name.startswith("dora-vl-page-")] == []
