"""A request's JSON and what it shows: refused in little time and memory; of addresses on the web only public ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from dora_vl.serving import media
from dora_vl.serving.media import RequestMedia
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.requests import (
    MOST_FIELDS,
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_VALUES,
    BadRequest,
    ChatRequest,
    TooLarge,
    parse_request,
)
from dora_vl.serving.scheduler import TooManyRequests
from tests.data.hostile import jpeg_of_scans
from tests.serving.tiny_served import RED, picture_part

MANY = 80_000
TURN = {"role": "user", "content": "a"}
TEXT = {"type": "text", "text": "a"}


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "one", "messages": [TURN], **fields}


def with_parts(*parts: Any) -> dict[str, Any]:
    return request(messages=[{"role": "user", "content": list(parts)}])


def read(body: Any) -> ChatRequest:
    return parse_request(json.dumps(body).encode())


def names(count: int) -> dict[str, Any]:
    return {f"a{number}": 0 for number in range(count)}


WRONG: dict[str, Callable[[int], Any]] = {
    "good messages": lambda count: request(messages=[TURN] * (count // 2)),
    "parts": lambda count: with_parts(*[0] * count),
    "stop": lambda count: request(stop=[0] * count),
    "fields": lambda count: request(**names(count)),
    "fields of a picture": lambda count: with_parts({"type": "image_url", "image_url": {"url": "a", **names(count)}}),
    "metadata": lambda count: request(metadata=names(count)),
    "no object": lambda count: [0] * count,
}
"""What a request may hold too many of."""


@pytest.mark.parametrize("what", WRONG)
def test_however_much_is_wrong_few_errors_are_collected(what: str) -> None:
    body = WRONG[what](MANY)
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate_json(json.dumps(body).encode())
    assert refused.value.error_count() <= 40
    with pytest.raises(BadRequest) as error:
        read(body)
    assert len(str(error.value)) < 500


ENDLESS: dict[str, tuple[bytes, bytes, bytes]] = {
    "items": (b'{"messages":[', b"0,", b"0]}"),
    "a text": (b'{"model": "', b",", b""),
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
        parse_request(body)
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
    with pytest.raises(TooLarge):
        read(request(metadata=[0] * MOST_VALUES))
    assert read(with_parts({"type": "image_url", "image_url": "data:image/png;base64," + "A" * 10_000_000}))
    along = {"service_tier": "auto", "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "user": "me"}
    along |= {"prompt_cache_key": "a", "safety_identifier": "b", "metadata": {"run": "1"}}
    assert read(request(**along)).model == "one"
    assert read(request(stop="a")).stop == ["a"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (request(best_of=2), "best_of"),
        (request(temperature=3), "temperature"),
        (request(messages=[{"role": "tool", "content": "a"}]), "messages[0].role"),
        (request(messages=[TURN, {"role": "user", "content": 5}]), "messages[1].content"),
        (with_parts(TEXT, {"type": "audio"}), "messages[0].content[1]"),
        (with_parts({**TEXT, "str": 1}), "messages[0].content[0].str"),
        (request(tool_choice="required"), "tool_choice"),
        (request(stop=[""]), "stop[0]"),
        (request(messages=[TURN] * (MOST_MESSAGES + 1)), "messages"),
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


# What a request shows: long decoding gives way to others.


def test_a_picture_that_takes_long_yields_and_goes_where_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JPEG of thousands of scans, read for seconds: at the lowest priority, and no longer than others wait for it."""
    monkeypatch.setattr(media, "READING_AT_ONCE", 1)
    monkeypatch.setattr(media, "PATIENT_SECONDS", 1.0)
    quick = io.BytesIO()
    RED.save(quick, "PNG")
    with contextlib.closing(RequestMedia(ServerSettings())) as requests, ThreadPoolExecutor(1) as threads:

        def read(content: bytes) -> Any:
            with requests.reading() as reading:
                return reading.picture(content, "its place")

        slow = threads.submit(read, jpeg_of_scans(4_000, 20_000))
        until = time.monotonic() + 60
        while not any(os.sched_getscheduler(child.pid) == os.SCHED_IDLE for child in psutil.Process().children()):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert read(quick.getvalue()).size == RED.size
        assert isinstance(slow.exception(), TooManyRequests)


def test_a_file_beyond_its_bytes_is_not_decoded() -> None:
    content = [picture_part(RED), {"type": "text", "text": "What is it?"}]
    body = ChatRequest.model_validate({"model": "one", "messages": [{"role": "user", "content": content}]})
    with (
        contextlib.closing(RequestMedia(ServerSettings(max_media_mib=50 / 2**20))) as requests,
        requests.reading() as reading,
        pytest.raises(TooLarge),
    ):
        reading.read(body.messages)
