"""Who may come in, by which name, from where and how slowly; and that the page gives and reads no file of the disk."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import http.client
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from dora_vl.errors import UserError
from dora_vl.serving import door
from dora_vl.serving import options as listening_options
from dora_vl.serving.demo_command import keep_gradio_quiet
from dora_vl.serving.door import Uploads
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import LOCAL, Admission, NoKey, Refused, Settings
from dora_vl.serving.server import Server, build_app
from dora_vl.serving.side_by_side import SideBySide
from tests.serving.tiny_served import running

HERE = "http://localhost:7860"
FOREIGN = {"a foreign host": {"Host": "evil.example"}, "a foreign origin": {"Origin": "http://evil.example"}}
ENDLESS = {"{session_hash}", "data", "upload_progress"}
SECRET = "0123456789 never shown"


# -- who may come in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "admitted"),
    [
        ("localhost", None, True),
        ("LOCALHOST:7860", "http://localhost:7860", True),
        ("127.0.0.1:7860", "http://127.0.0.1:7860", True),
        ("[::1]:7860", "http://[::1]:7860", True),
        ("gpu.example", "https://gpu.example", True),
        ("127.0.0.1:7860", "https://gpu.example:8443", True),  # a proxy that was named
        ("10.1.2.3:7860", "http://10.1.2.3:7860", True),
        (None, None, False),
        ("evil.example", None, False),
        ("localhost.evil.example", None, False),
        ("localhost@evil.example", None, False),
        ("evil.example:localhost", None, False),
        ("192.168.0.7:7860", None, False),
        ("evil.example:7860", "http://evil.example:7860", False),
        ("localhost:7860", "http://evil.example", False),
        ("localhost:7860", "http://localhost:3000", False),  # another program of this machine
        ("localhost:7860", "http://127.0.0.1:7860", False),
        ("localhost:7860", "null", False),
        ("localhost:7860", "", False),
    ],
)
def test_a_name_and_an_origin(host: str | None, origin: str | None, admitted: bool) -> None:
    admission = Admission(hosts=frozenset({*LOCAL, "gpu.example", "10.1.2.3"}), origins=frozenset({"gpu.example"}))
    fields = {"host": host, "origin": origin}
    headers = Headers({name: value for name, value in fields.items() if value is not None})
    with contextlib.nullcontext() if admitted else pytest.raises(Refused):
        admission.check(headers)


def test_options_name_hosts_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def admission(*args: str) -> Admission:
        parser = argparse.ArgumentParser()
        listening_options.add_address(parser, port=0)
        return listening_options.admission(parser.parse_args(args))

    assert admission() == Admission()
    assert admission("--host", "0.0.0.0").hosts == frozenset(LOCAL)
    named = admission("--host", "10.1.2.3", "--allow-host", "GPU.example", "--allow-host", "[fd00::1]")
    assert named.hosts == frozenset({*LOCAL, "10.1.2.3", "gpu.example", "fd00::1"})
    assert named.origins == frozenset({"gpu.example", "fd00::1"})
    monkeypatch.setenv(listening_options.KEY_VARIABLE, "of-the-environment")
    assert admission().key == "of-the-environment"
    assert admission("--api-key", "stated").key == "stated"
    for wrong in (("--api-key", ""), ("--api-key", "two words"), ("--allow-host", "http://gpu.example/")):
        with pytest.raises(UserError):
            admission(*wrong)


@pytest.mark.parametrize(
    ("authorization", "admitted"),
    [
        ("Bearer open-sesame", True),
        ("bearer open-sesame", True),
        (f"Basic {base64.b64encode(b'anybody:open-sesame').decode()}", True),  # as a browser asks its person
        (None, False),
        ("Bearer ", False),
        ("Bearer open-sesame2", False),
        ("Basic open-sesame", False),
        (f"Basic {base64.b64encode(b'open-sesame:').decode()}", False),
        ("open-sesame", False),
    ],
)
def test_a_key(authorization: str | None, admitted: bool) -> None:
    headers = Headers({"host": "localhost", **({"authorization": authorization} if authorization is not None else {})})
    with contextlib.nullcontext() if admitted else pytest.raises(NoKey):
        Admission(key="open-sesame").check(headers)


def test_the_server_is_behind_the_door(model: ServedModel) -> None:
    key = {"Authorization": "Bearer open-sesame"}
    with Engine(model) as engine, Server(engine, admission=Admission(key="open-sesame")) as server:
        client = TestClient(build_app(server), base_url=HERE)
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/load_lora_adapter"),
        ):
            for headers in FOREIGN.values():
                answer = client.request(method, path, headers={**headers, **key}, json={})
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "refused")
            answer = client.request(method, path, json={})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert "Basic" in answer.headers["WWW-Authenticate"]
        assert client.get("/v1/models", headers=key).status_code == 200


# -- how slowly ----------------------------------------------------------------------------------------------------


def connection(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_a_head_that_does_not_end_is_not_waited_for(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that never begins, one behind an answered request, or one that is too long."""
    monkeypatch.setattr(door, "HEAD_SECONDS", 0.5)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(model) as address:
        for begun in (b"", whole[:30]):
            with connection(address) as slow:
                slow.sendall(begun)
                assert slow.recv(100) == b""
        with connection(address) as slow:
            slow.sendall(whole)
            answer = b""
            while not answer.endswith(b"}"):
                answer += slow.recv(10_000)
            slow.sendall(whole[:30])
            assert slow.recv(100) == b""
        with connection(address) as long:
            long.sendall(whole[:-2] + b"X: " + b"a" * door.HEAD_BYTES)
            assert long.recv(100).startswith(b"HTTP/1.1 400")


def test_half_sent_requests_of_one_client_leave_room_for_others(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head without an end, or a body; each was a place that nobody else had, for ten seconds or thirty."""
    monkeypatch.setattr(door, "MOST_CONNECTIONS", 12)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(model) as address, contextlib.ExitStack() as senders:
        for begun in (head, head + b"Content-Length: 900\r\n\r\n{"):
            for _ in range(20):
                slow = senders.enter_context(connection(address))
                slow.sendall(begun)
            for _ in range(5):
                client = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
                client.request("GET", "/health")
                assert client.getresponse().status == 200


def test_slow_senders_take_no_place(model: ServedModel) -> None:
    """Of the two that a server has; what they have sent is counted, and too much of it is refused."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = json.dumps({"model": "one", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2})
    with (
        running(model, Settings(waiting=1, batch=1, max_body_mib=1000 / 2**20)) as address,
        contextlib.ExitStack() as senders,
    ):
        for _ in range(3):
            slow = senders.enter_context(connection(address))
            slow.sendall(f"{head}Content-Length: 900\r\n\r\n{{".encode())
        client = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        assert client.getresponse().status == 200
        statuses = []
        for _ in range(9):
            slow = senders.enter_context(connection(address))
            slow.sendall(f"{head}Content-Length: 900\r\n\r\n".encode() + b"a" * 890)
            slow.settimeout(1.0)
            with contextlib.suppress(TimeoutError):  # it waits for the rest
                statuses.append(slow.recv(12))
        assert statuses == [b"HTTP/1.1 429"]


# -- the page and the disk -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "uploads"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def app(model: ServedModel, uploads: Path) -> Iterator[Any]:
    pytest.importorskip("gradio", reason="pip install '.[web]'")
    keep_gradio_quiet(uploads)
    from dora_vl.serving.page import Page, build_page_app

    with Engine(model) as engine, contextlib.closing(SideBySide(engine)) as side:
        page = Page(side, Uploads(uploads, 10_000))
        built = build_page_app(page, Admission(), upload_bytes=8_000)
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


def file_data(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def stored(uploads: Path) -> list[Path]:
    return [path for path in uploads.rglob("*") if path.is_file() and not path.is_symlink()]


def test_no_function_of_the_page_takes_a_file_that_was_not_uploaded(
    app: Any, client: TestClient, uploads: Path, not_uploaded: str
) -> None:
    functions = app.state.page.blocks.fns
    assert len(functions) > 8
    for number, function in functions.items():
        for named in (file_data(not_uploaded), [file_data(not_uploaded)], {"value": {"path": not_uploaded}}):
            body = {"fn_index": number, "session_hash": "s", "data": [named] * max(1, len(function.inputs))}
            ways = ("run/predict", "queue/join", f"run/{function.api_name}", f"api/{function.api_name}")
            for way in (*ways, f"call/{function.api_name}", f"call/v2/{function.api_name}", "component_server"):
                answer = client.post(f"/gradio_api/{way}", json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "refused"), (function, way)
    assert not stored(uploads)


def test_gradios_own_check_is_on(app: Any, uploads: Path, not_uploaded: str) -> None:
    """Behind ours: what its functions read of the disk, and copy to where it is given away."""
    if not_uploaded.startswith("http"):
        pytest.skip("Gradio fetches; only ours refuses")
    behind = TestClient(app.routes[-1].app, base_url=HERE, raise_server_exceptions=False)
    for number, function in app.state.page.blocks.fns.items():
        if function.queue or not function.inputs:
            continue
        body = {"fn_index": number, "session_hash": "s", "data": [file_data(not_uploaded)] * len(function.inputs)}
        answer = behind.post("/gradio_api/run/predict", json=body)
        assert SECRET not in answer.text
        assert "root:" not in answer.text
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


def test_uploads_are_counted_and_forgotten(app: Any, client: TestClient, uploads: Path) -> None:
    def send(size: int) -> int:
        content = os.urandom(size)
        return client.post("/gradio_api/upload", files={"files": ("a.png", content)}).status_code

    assert [send(4_000), send(4_000), send(4_000)] == [200, 200, 429]
    assert len(stored(uploads)) == 2
    (uploads / "partial").write_bytes(b"a" * 3_000)  # as of a client that went away
    hours_ago = time.time() - 7200
    for file in stored(uploads):
        os.utime(file, (hours_ago, hours_ago))
    assert app.state.page.uploads.forget() == []
    assert not stored(uploads)
    assert send(4_000) == 200
    app.state.page.uploads.delete(stored(uploads)[0])
    assert not stored(uploads)


def test_an_upload_is_counted_as_it_comes(app: Any, uploads: Path) -> None:
    """Whatever size it states, and where it states none: no more of it is read than there is room for."""

    async def sent(chunks: int, *headers: tuple[bytes, bytes]) -> tuple[int, int]:
        answers, left = list[int](), [b"a" * 2_000] * chunks
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        left = [head, *left, b"\r\n--b--\r\n"]

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message: Any) -> None:
            answers.append(message.get("status", 0))

        named = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=b"), *headers]
        scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": named, "query_string": b""}
        await app({**scope, "root_path": "", "http_version": "1.1", "scheme": "http"}, receive, send)
        return answers[0], len(left)

    lie = (b"content-length", b"10"), (b"transfer-encoding", b"chunked")
    for headers in ((), lie):
        status, left = asyncio.run(sent(20, *headers))
        assert (status in (429, 500), left > 10) == (True, True)  # Gradio answers 500 to what is broken off
    for file in stored(uploads):  # what was written of those
        file.unlink()
    assert asyncio.run(sent(2))[0] == 200
    for file in stored(uploads):
        file.unlink()


def test_a_malformed_event_is_refused_and_logs_nothing(app: Any, client: TestClient, capfd: Any) -> None:
    """Gradio would write each with its whole value and a traceback."""
    import gradio

    page = app.state.page
    wrong = ({"a": ["y" * 3_000]}, {"path": 1}, [{"path": None}], [1], 10**400, float("nan"))
    for number, function in page.blocks.fns.items():
        takes = [part for part in function.inputs if not isinstance(part, gradio.State)]
        for value in wrong if takes else ():
            for data in ([value] * len(function.inputs), [None] * (len(function.inputs) + 1), "z", None):
                for way in ("run/predict", "queue/join"):
                    body = json.dumps({"fn_index": number, "session_hash": "s", "data": data})
                    answer = client.post(
                        f"/gradio_api/{way}", content=body, headers={"Content-Type": "application/json"}
                    )
                    assert answer.status_code == 403, (function, data)
    for number in (-1, "a", [1], None):
        body = {"fn_index": number, "session_hash": "s", "data": []}
        assert client.post("/gradio_api/run/predict", json=body).status_code == 403
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("person", ["", "somebody"])
def test_a_talk_that_is_gone_is_never_answered_without_its_pictures(
    app: Any, monkeypatch: pytest.MonkeyPatch, person: str
) -> None:
    """Gradio lets go of the oldest states of its visitors."""
    page = app.state.page
    monkeypatch.setattr(SideBySide, "ask", lambda *_: pytest.fail("it was asked"))
    chosen = ("one", "base", 1.0, 1.0, 8, 0.0, True)
    updates = list(page.ask(person, None, *chosen, "1 What is it?", ""))
    assert any(update.get(page.notice) for update in updates)
