"""A request's JSON and what it shows: refused in little time and memory; of addresses on the web only public ones."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from dora_vl.serving import media
from dora_vl.serving.media import NotFetched, RequestMedia, fetch, is_public, public_address
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
    return parsed(ChatRequest, json.dumps(body).encode())


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
    with contextlib.closing(RequestMedia(Settings())) as requests, ThreadPoolExecutor(1) as threads:

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
        contextlib.closing(RequestMedia(Settings(max_media_mib=50 / 2**20))) as requests,
        requests.reading() as reading,
        pytest.raises(TooLarge),
    ):
        reading.read(body.messages)


# -- addresses on the web ----------------------------------------------------------------------------------------

LIMITS = 1000, 2.0


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1",
        "::127.0.0.1", "::10.0.0.1", "fec0::1", "feff::1", "64:ff9b:1::a00:1", "64:ff9b::10.0.0.1", "4000::1",
        "::ffff:0:127.0.0.1", "2001:0:1:1:1:1:80ff:fffe", "2002:a00:1::", "240.0.0.1",
        "192.88.99.1", "3fff::1", "5f00::1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public(address: str) -> None:
    assert not is_public(address)
    assert all(map(is_public, ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1")))


@pytest.mark.parametrize("host", ["localhost", "2130706433", "0x7f.1", "0", "::1"])
def test_a_name_of_this_machine_or_of_its_network_is_refused(host: str, monkeypatch: Any) -> None:
    with pytest.raises(NotFetched):
        public_address(host)
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: entries)
    with pytest.raises(NotFetched):  # one private address among public ones
        public_address("example.com")


def test_a_name_that_takes_too_long_is_left(monkeypatch: Any) -> None:
    resolved = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: resolved.wait(20))
    before = time.monotonic()
    with pytest.raises(NotFetched):
        fetch("http://example.com/a.png", 1000, 0.3)
    assert time.monotonic() - before < 5
    resolved.set()


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a", "file:///etc/passwd", "http://", "https:///a", "http://user:word@example.com/",
        "http://example.com/\r\nX: y", "http://[::1", "http://example.com:99999/", "gopher:a", "http://exämple.com/",
    ],
)  # fmt: skip
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(NotFetched):
        fetch(url, *LIMITS)


def test_this_machine_is_refused_before_anything_is_sent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.3)
        with pytest.raises(NotFetched):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/a.png", *LIMITS)
        with pytest.raises(TimeoutError):
            listening.accept()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        else:
            self.send_response(200 if self.path != "/none" else 404)
            self.end_headers()
            for _ in range(100 if self.path == "/slow" else 1):
                self.wfile.write(b"b" * (2000 if self.path == "/large" else 20))
                time.sleep(0.1)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: Any) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    resolve = media.public_address
    monkeypatch.setattr(media, "public_address", lambda host: "127.0.0.1" if host == "site.example" else resolve(host))
    yield f"http://site.example:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "path",
    ["/to/http://127.0.0.1/", "/to/http://localhost:1/", "/to/file:///etc/passwd", "/to//to//to//to//a", "/large",
     "/none", "/slow"],
)  # fmt: skip
def test_what_is_not_fetched(site: str, path: str) -> None:
    for there in ("/a.png", "/to//a.png"):  # a relative redirect
        assert fetch(f"{site}{there}", *LIMITS) == b"b" * 20
    with pytest.raises(NotFetched):
        fetch(f"{site}{path}", 1000, 1.0)


def test_a_site_that_dribbles_its_handshake_is_left(site: str) -> None:
    """The connection goes to the checked address, and asks there for the name that the certificate must have."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def dribble() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                received.append(connection.recv(10_000))
                connection.sendall(b"\x16\x03\x03\x40\x00")
                for _ in range(100):
                    connection.sendall(b"\x02")
                    time.sleep(0.1)

        threading.Thread(target=dribble, daemon=True).start()
        with pytest.raises(NotFetched):
            fetch(f"https://site.example:{listening.getsockname()[1]}/", 1000, 1.0)
    assert b"site.example" in received[0]
