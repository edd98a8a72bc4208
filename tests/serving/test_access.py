"""Who may come in, and how slowly; a request's JSON and what it shows; the page gives and reads no file of the disk."""

import argparse
import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from dora_vl.errors import UserError
from dora_vl.serving import access, media
from dora_vl.serving.access import AccessRules, NoKey, Refused, Uploads, access_rules
from dora_vl.serving.demo_command import keep_gradio_quiet
from dora_vl.serving.engine import Engine
from dora_vl.serving.media import RequestMedia
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import KEY_VARIABLE, LOCAL, ServerSettings, add_address, address_of, listening
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
from dora_vl.serving.server import Server, build_app
from dora_vl.serving.side_by_side import Conversation, OpenModels, SideBySide
from tests.data.hostile import jpeg_of_scans
from tests.serving.tiny_served import RED, picture_part, running

HERE = "http://localhost:7860"
FOREIGN = {"a foreign host": {"Host": "evil.example"}, "a foreign origin": {"Origin": "http://evil.example"}}
ENDLESS = {"{session_hash}", "data", "upload_progress"}
SECRET = "0123456789 never shown"


# -- who may come in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "admitted"),
    [
        ("localhost", None, True),
        *((host, f"http://{host.lower()}", True) for host in ("LOCALHOST:7860", "[::1]:7860", "10.1.2.3:7860")),
        ("127.0.0.1:7860", "https://gpu.example:8443", True),  # a proxy that was named
        *((host, None, False) for host in (None, "evil.example", "localhost.evil.example", "localhost@evil.example")),
        *((host, f"http://{host}", False) for host in ("evil.example:7860", "192.168.0.7:7860")),
        *(("localhost:7860", origin, False) for origin in ("http://evil.example", "http://localhost:3000", "null", "")),
    ],
)
def test_a_name_and_an_origin(host: str | None, origin: str | None, admitted: bool) -> None:
    rules = AccessRules(hosts=frozenset({*LOCAL, "gpu.example", "10.1.2.3"}), origins=frozenset({"gpu.example"}))
    fields = {"host": host, "origin": origin}
    headers = Headers({name: value for name, value in fields.items() if value is not None})
    with contextlib.nullcontext() if admitted else pytest.raises(Refused):
        rules.check(headers)


def test_options_name_hosts_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def rules(*args: str) -> AccessRules:
        parser = argparse.ArgumentParser()
        add_address(parser, port=0)
        return access_rules(parser.parse_args(args))

    assert rules() == AccessRules()
    assert rules("--host", "0.0.0.0").hosts == frozenset(LOCAL)
    named = rules("--host", "10.1.2.3", "--allow-host", "GPU.example", "--allow-host", "[fd00::1]")
    assert named.hosts == frozenset({*LOCAL, "10.1.2.3", "gpu.example", "fd00::1"})
    assert named.origins == frozenset({"gpu.example", "fd00::1"})
    monkeypatch.setenv(KEY_VARIABLE, "of-the-environment")
    assert rules().key == "of-the-environment"
    assert rules("--api-key", "stated").key == "stated"
    for wrong in (("--api-key", ""), ("--api-key", "two words"), ("--allow-host", "http://gpu.example/")):
        with pytest.raises(UserError):
            rules(*wrong)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "localhost"])
def test_the_address_that_is_printed_is_let_in(host: str) -> None:
    parser = argparse.ArgumentParser()
    add_address(parser, port=0)
    rules = access_rules(parser.parse_args(["--host", host]))
    with listening(LOCAL[1], 0) as listener:  # not every machine has IPv6
        url = urlsplit(address_of(host, listener))
        assert url.port == listener.getsockname()[1]
    rules.check(Headers({"host": url.netloc}))


@pytest.mark.parametrize(
    ("authorization", "admitted"),
    [
        ("Bearer open-sesame", True),
        ("bearer open-sesame", True),
        (f"Basic {base64.b64encode(b'anybody:open-sesame').decode()}", True),  # as a browser asks its person
        (f"Basic {base64.b64encode(b'open-sesame:').decode()}", False),
        *(
            (wrong, False)
            for wrong in (None, "Bearer ", "Bearer open-sesame2", "Basic open-sesame", "Basic é", "open-sesame")
        ),
    ],
)
def test_a_key(authorization: str | None, admitted: bool) -> None:
    headers = Headers({"host": "localhost", **({"authorization": authorization} if authorization is not None else {})})
    with contextlib.nullcontext() if admitted else pytest.raises(NoKey):
        AccessRules(key="open-sesame").check(headers)


def test_every_address_of_the_server_asks_for_name_origin_and_key(model: ServedModel) -> None:
    key = {"Authorization": "Bearer open-sesame"}
    with Engine(model) as engine, Server(engine, rules=AccessRules(key="open-sesame")) as server:
        client = TestClient(build_app(server), base_url=HERE)
        for path in ("models", "chat/completions"):
            request = partial(client.request, "GET" if path == "models" else "POST", f"/v1/{path}", json={})
            for headers in FOREIGN.values():
                answer = request(headers={**headers, **key})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "refused")
            answer = request()
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "Basic" in answer.headers["WWW-Authenticate"]
        assert client.get("/v1/models", headers=key).status_code == 200


# -- how much, how slowly and how often -----------------------------------------------------------------------------

CHAT = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connection(address: str, client: str = "127.0.0.1") -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30, source_address=(client, 0))


def half_sent(address: str, sent: int, *, stated: int = 900) -> socket.socket:
    slow = connection(address)
    slow.sendall(f"{CHAT}Content-Length: {stated}\r\n\r\n".encode() + b"a" * sent)
    return slow


def statuses(senders: list[socket.socket]) -> list[bytes]:
    told = []
    for sender in senders:
        sender.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            told.append(sender.recv(12)[-3:])
    return told


def test_a_long_head_is_refused_and_a_slow_body_not_waited_for(model: ServedModel) -> None:
    with running(model, ServerSettings(body_seconds=0.5, max_body_mib=1)) as address:
        with connection(address) as long:
            long.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * access.HEAD_BYTES)
            assert long.recv(100).startswith(b"HTTP/1.1 400")
        with half_sent(address, 1) as slow:
            assert slow.recv(100).startswith(b"HTTP/1.1 504")
        with half_sent(address, 0, stated=2**20 + 1) as large:
            assert large.recv(100).startswith(b"HTTP/1.1 413")
        with connection(address) as chunked:  # states no size
            chunked.sendall(f"{CHAT}Transfer-Encoding: chunked\r\n\r\n110000\r\n".encode() + b"a" * 0x110000)
            assert chunked.recv(100).startswith(b"HTTP/1.1 413")


def test_more_connections_than_allowed_are_turned_away(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_CONNECTIONS", 4)
    with running(model) as address, contextlib.ExitStack() as idle:
        for status in (b"200", b"503"):
            with connection(address) as client:
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert client.recv(12)[-3:] == status
            for _ in range(4):
                idle.enter_context(connection(address))


def test_half_sent_heads_make_room_after_a_time(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a connection, and the next after an answer."""
    monkeypatch.setattr(access, "MOST_CONNECTIONS", 4)
    monkeypatch.setattr(access, "HEAD_SECONDS", 0.5)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(model) as address, contextlib.ExitStack() as senders:
        slow = [senders.enter_context(connection(address)) for _ in range(3)]
        slow[0].sendall(whole)
        assert slow[0].recv(4096)[:12][-3:] == b"200"
        for sender in slow:
            sender.sendall(whole[:20])
        for expected in (b"503", b"200"):
            with connection(address) as client:
                client.sendall(whole)
                assert client.recv(12)[-3:] == expected
            time.sleep(1)


def test_slow_senders_take_no_place_and_what_they_have_sent_is_counted(model: ServedModel) -> None:
    body = json.dumps({"model": "one", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    settings = ServerSettings(waiting=1, batch=1, max_body_mib=1000 / 2**20)
    with running(model, settings) as address, contextlib.ExitStack() as senders:
        for _ in range(3):
            senders.enter_context(half_sent(address, 1))
        client = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        assert client.getresponse().status == 200
        assert statuses([senders.enter_context(half_sent(address, 890)) for _ in range(9)]) == [b"429"]


def test_one_clients_requests_leave_room_for_others(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_OF_A_CLIENT", 5)
    with running(model) as address, contextlib.ExitStack() as senders:
        slow = [senders.enter_context(half_sent(address, 1)) for _ in range(8)]
        assert statuses(slow) == [b"429"] * 3
        for client, status in (("127.0.0.1", b"429"), ("127.0.0.2", b"200")):
            with connection(address, client) as other:
                other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert other.recv(12)[-3:] == status
        for sender in slow:
            sender.close()
        time.sleep(0.5)
        with connection(address) as again:
            again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert again.recv(12)[-3:] == b"200"


# -- the page and the disk -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (folder := tmp_path_factory.mktemp("page") / "uploads").mkdir()
    return folder


@pytest.fixture(scope="module")
def app(model: ServedModel, uploads: Path) -> Iterator[Any]:
    pytest.importorskip("gradio", reason="pip install '.[web]'")
    keep_gradio_quiet(uploads)
    from dora_vl.serving.page import Page, build_page_app

    with contextlib.closing(OpenModels(lambda base, adapters: model, ServerSettings())) as models:
        models.open({name: Path(name) for name in model.names[1:]})
        page = Page(models, Uploads(uploads, 10_000), trains=True)
        built = build_page_app(page, AccessRules(), upload_bytes=8_000)
        built.state.page = page
        yield built


@pytest.fixture
def client(app: Any) -> TestClient:
    return TestClient(app, base_url=HERE, raise_server_exceptions=False)


@pytest.fixture(params=["password file", "beside the uploads", "out of the uploads", "a link", "a device", "the web"])
def not_uploaded(request: pytest.FixtureRequest, uploads: Path) -> Iterator[str]:
    beside = uploads.with_name("uploads-of-another") / "ab" / "secret.png"
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(SECRET)
    link = uploads / "cd" / "link.png"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(beside)
    yield {
        "password file": "/etc/passwd",
        "beside the uploads": str(beside),
        "out of the uploads": f"{uploads}/ef/../../{beside.parent.parent.name}/ab/secret.png",
        "a link": str(link),
        "a device": "/dev/zero",
        "the web": "http://127.0.0.1:1/a.png",
    }[request.param]
    link.unlink()


def stored(uploads: Path) -> list[Path]:
    return [path for path in uploads.rglob("*") if path.is_file() and not path.is_symlink()]


def test_no_function_of_the_page_takes_a_file_that_was_not_uploaded(app, client, uploads, not_uploaded) -> None:
    functions = app.state.page.blocks.fns
    assert len(functions) > 8
    for number, function in functions.items():
        named = [{"value": {"path": not_uploaded, "meta": {"_type": "gradio.FileData"}}}]
        body = {"fn_index": number, "session_hash": "s", "data": [named] * max(1, len(function.inputs))}
        for way in ("run/predict", "queue/join", *(f"{at}/{function.api_name}" for at in ("run", "api", "call"))):
            answer = client.post(f"/gradio_api/{way}", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "refused"), (function, way)
    assert not stored(uploads)


def test_no_address_of_gradios_gives_a_file(app: Any, client: TestClient, not_uploaded: str) -> None:
    paths = app.routes[-1].app.openapi()["paths"]
    assert "/gradio_api/file={path_or_url}" in paths
    for path, methods in paths.items():
        if path.rpartition("/")[2] in ENDLESS:  # and they name no file
            continue
        for method in methods:
            address = re.sub(r"\{\w+\}", lambda _: not_uploaded, path)
            answer = client.request(method, address, params={"deep_link": not_uploaded})
            assert "root:" not in answer.text
            assert SECRET not in answer.text
            assert answer.status_code >= 400 or "{" not in path


@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_of_the_page_is_for_foreigners(app: Any, client: TestClient, uploads: Path, what: str) -> None:
    for number, function in app.state.page.blocks.fns.items():
        body = {"fn_index": number, "session_hash": "s", "data": [None] * len(function.inputs)}
        for way in ("run/predict", "queue/join"):
            assert client.post(f"/gradio_api/{way}", json=body, headers=FOREIGN[what]).status_code == 403
    sent = client.post("/gradio_api/upload", files={"files": ("a.png", b"a")}, headers=FOREIGN[what])
    assert sent.status_code == 403
    assert not stored(uploads)
    for path in ("/", "/config", "/gradio_api/heartbeat/s", "/gradio_api/queue/data?session_hash=s"):
        assert client.get(path, headers=FOREIGN[what]).status_code == 403
    assert client.get("/").status_code == 200


def test_uploads_are_counted_and_forgotten(app: Any, client: TestClient, uploads: Path, monkeypatch: Any) -> None:
    def send(size: int) -> int:
        content = os.urandom(size)
        return client.post("/gradio_api/upload", files={"files": ("a.png", content)}).status_code

    assert [send(4_000), send(4_000), send(4_000)] == [200, 200, 429]
    assert len(stored(uploads)) == 2
    monkeypatch.setattr(access, "MOST_UPLOADS", 2)
    assert send(1) == 429
    (uploads / "partial").write_bytes(b"a" * 3_000)  # as of a client that went away
    hours_ago = time.time() - 7200
    for file in stored(uploads):
        os.utime(file, (hours_ago, hours_ago))
    assert app.state.page.uploads.delete_old() == []
    assert not stored(uploads)
    assert send(4_000) == 200
    app.state.page.uploads.delete(stored(uploads)[0])
    assert not stored(uploads)


def test_an_upload_is_counted_as_it_comes(app: Any, uploads: Path) -> None:
    """Whatever size it states, and where it states none: no more of it is read than there is room for."""

    async def sent(chunks: int, *headers: tuple[bytes, bytes]) -> tuple[int, int]:
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        answers, left = list[int](), [head, *[b"a" * 2_000] * chunks, b"\r\n--b--\r\n"]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message: Any) -> None:
            answers.append(message.get("status", 0))

        named = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b"), *headers]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": named, "query_string": b""}
        await app({**scope, "root_path": "", "http_version": "1.1", "scheme": "http"}, receive, send)
        return answers[0], len(left)

    lie = (b"content-length", b"10"), (b"transfer-encoding", b"chunked")
    for headers, chunks, answers in (((), 20, (429, 500)), (lie, 20, (429, 500)), ((), 2, (200,))):
        status, left = asyncio.run(sent(chunks, *headers))
        assert status in answers  # Gradio answers 500 to what is broken off
        assert (left > 10) == (chunks == 20)
        assert len(stored(uploads)) == (status == 200)  # what was written of one that was broken off is gone
        for file in stored(uploads):
            file.unlink()


@pytest.mark.parametrize("person", ["", "somebody"])
def test_a_talk_that_is_gone_is_never_answered_without_its_pictures(app: Any, monkeypatch: Any, person: str) -> None:
    """Gradio lets go of the oldest states of its visitors."""
    page = app.state.page
    monkeypatch.setattr(SideBySide, "ask", lambda *_: pytest.fail("it was asked"))
    chosen = ("one", "base", 1.0, 1.0, 8, 0.0, True)
    updates = list(page.ask(person, None, *chosen, "1 What is it?", ""))
    assert any(update.get(page.notice) for update in updates)


def test_a_page_that_was_open_before_another_run_was_shows_who_answers_now(app: Any) -> None:
    page = app.state.page
    chosen = ("gone", page.models.names[0], 1.0, 1.0, 8, 0.0, True)
    updates = list(page.ask("somebody", Conversation(), *chosen, "1 What is it?", ""))
    (choices,) = [update[page.columns[0].model]["choices"] for update in updates if page.columns[0].model in update]
    assert choices == list(page.models.names)
    assert [update[page.question] for update in updates if page.question in update] == ["What is it?"]


@pytest.mark.parametrize("run", ["/etc", "runs/../secret", "runs/..", "runs/a/b", "..", ""])
def test_the_page_shows_the_folders_of_runs_alone(app: Any, run: str) -> None:
    with pytest.raises(UserError):
        app.state.page.training.folder_of(run)


def test_what_was_not_uploaded_is_not_moved(app: Any, tmp_path: Path) -> None:
    page, mine = app.state.page, tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    update = page.training.take_files([str(mine)], "", SimpleNamespace(session_hash=""))
    assert "drop it again" in update[page.training.data_state]
    assert mine.read_bytes() == b"mine"


def test_a_field_with_a_nul_is_refused_on_the_page(app: Any) -> None:
    train = app.state.page.training
    updates = list(train.look_at_data("pictures\0", "", "", "base"))
    assert "NUL" in next(update[train.data_state] for update in updates[1:])
    assert updates[-1][train.look]["interactive"]


def test_names_that_begin_with_a_dash_reach_init_as_names(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def printed(words: list[str]) -> list[str]:
        commands.append(words)
        raise UserError("enough")

    monkeypatch.setattr("dora_vl.serving.page_training.printed", printed)
    list(app.state.page.training.look_at_data("--overwrite", "-what?", "", "-base"))
    assert commands == [["init", "./--overwrite", "--ask=-what?", "--model=-base", "--to=runs/overwrite"]]


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


UNCLOSED: dict[str, tuple[bytes, bytes, bytes]] = {
    "items": (b'{"messages":[', b"0,", b"0]}"),
    "a text": (b'{"model": "', b",", b""),
    "nothing but quotes": (b",,", b'""', b","),
}
"""How a request begins, what is in it until it has ten megabytes, and how it ends; some are never closed."""


@pytest.mark.parametrize("what", UNCLOSED)
def test_ten_megabytes_of_values_or_of_what_is_never_closed_are_refused_soon(what: str) -> None:
    """Before they become objects: of those the first would have 16 bytes and more for each of its own."""
    begin, middle, end = UNCLOSED[what]
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
