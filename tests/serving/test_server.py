"""`dora-vl serve`: OpenAI's own client against the server, refusals before a weight is read, and its whole life."""

import argparse
import base64
import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from dora_vl.data.turns import Clip, Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving import demo_command, media, serve_command
from dora_vl.serving.decoding import SequenceText
from dora_vl.serving.engine import NOTHING
from dora_vl.serving.media import Reading
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings, adapters_by_name, run_name
from dora_vl.serving.server import Server
from tests.backbones.tiny_image_text import write_tiny
from tests.serving.tiny_served import (
    ADAPTERS,
    RED,
    WIDE,
    alone,
    answer_alone,
    data_url,
    picture_part,
    running,
    with_recipe,
    write_adapter,
)

TOKENS = 8
NAMES = ("base", *ADAPTERS)


def client_of(address: str, **named: Any) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, **{"timeout": 120, **named})


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return client_of(address)


def words(text: str, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": text}]


def shows(*parts: Any, text: str = "What is it?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def text_of(client: Any, **request: Any) -> str:
    request = {"model": "one", "messages": words("What colour is it?"), "max_tokens": TOKENS, **request}
    return client.chat.completions.create(**request).choices[0].message.content


def expected(base: Path, folders: dict[str, Path], name: str, turns: list[Turn], seen: PromptMedia = NOTHING) -> str:
    return answer_alone(alone(base, folders.get(name)), turns, seen, tokens=TOKENS)


def test_an_answer_whole_and_streamed(client: Any, base: Path, folders: dict[str, Path]) -> None:
    request = {"model": "one", "messages": words("What colour is it?"), "max_tokens": TOKENS}
    whole = client.chat.completions.create(**request)
    text = whole.choices[0].message.content
    assert text == expected(base, folders, "one", [Turn("user", "What colour is it?")])
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= TOKENS
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


BRIEF, ASKED = "Be brief. Look at its edges.", "What colour is it?"


@pytest.mark.parametrize(
    ("messages", "turns", "pictures"),
    [
        (
            [*shows(picture_part(WIDE), picture_part(RED)), *words("the second", "assistant"), *words(ASKED)],
            [Turn("user", "<image>\n<image>\nWhat is it?"), Turn("assistant", "the second"), Turn("user", ASKED)],
            (WIDE, RED),
        ),
        ([*words(BRIEF, "system"), *words(ASKED)], [Turn("system", BRIEF), Turn("user", ASKED)], ()),
        ([*words(BRIEF, "developer"), *words(ASKED)], [Turn("system", BRIEF), Turn("user", ASKED)], ()),
        (shows(picture_part(RED), text=f"{ASKED} "), [Turn("user", f"<image>\n{ASKED}")], (RED,)),  # as in training
    ],
)
def test_a_conversation(client, base, folders, messages, turns, pictures) -> None:
    answer = expected(base, folders, "two", turns, PromptMedia(pictures=pictures))
    assert text_of(client, model="two", messages=messages) == answer


def test_a_strength_of_an_adapter(client: Any, base: Path, folders: dict[str, Path]) -> None:
    """Ours, beside OpenAI's fields: 0 is the base, 1 the adapter; what is no strength is refused by name."""
    turns = [Turn("user", "What colour is it?")]
    at = {strength: text_of(client, extra_body={"strength": strength}) for strength in (0, 0.5, 1.0, None)}
    assert at[0] == expected(base, folders, "base", turns)
    assert at[1.0] == at[None] == expected(base, folders, "one", turns)
    assert at[0.5] not in (at[0], at[1.0])
    for wrong in (-0.5, 11, "half", [1]):
        assert refusal(client, extra_body={"strength": wrong}) == (400, None, "strength")


def test_a_video(client: Any, base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("av", reason="pip install '.[video]'")
    from dora_vl.data.video import Uniform
    from tests.data.video_files import read_frames, write_video

    write_video(tmp_path / "clip.mp4", [number / 25 for number in range(50)])
    url = f"data:video/mp4;base64,{base64.b64encode((tmp_path / 'clip.mp4').read_bytes()).decode()}"
    video = read_frames(tmp_path, Clip(path="clip.mp4"), Uniform(4))
    answer = expected(base, folders, "one", [Turn("user", "<video>\nWhat moves?")], PromptMedia(videos=(video,)))
    part = {"type": "video_url", "video_url": {"url": url}}
    assert text_of(client, messages=shows(part, text="What moves?")) == answer


def test_20_requests_in_flight_answer_as_each_adapter_alone(client, base, folders, monkeypatch) -> None:
    monkeypatch.setattr(media, "PATIENT_SECONDS", 60.0)  # a busy machine takes long to start a process
    questions = [ASKED, "Say the colour.", "It is red green blue. Say it.", "What is it?" + " What is it?" * 4]
    requests = [(NAMES[number % 5], questions[number % 4], (RED, WIDE)[: number % 3]) for number in range(20)]

    def ask(name: str, question: str, pictures: Sequence[Image.Image]) -> str:
        return text_of(client, model=name, messages=shows(*map(picture_part, pictures), text=question))

    with ThreadPoolExecutor(20) as threads:
        texts = list(threads.map(lambda request: ask(*request), requests))
    assistants = {name: alone(base, folders.get(name)) for name in NAMES}
    for (name, question, pictures), text in zip(requests, texts, strict=True):
        turns = [Turn("user", "<image>\n" * len(pictures) + question)]
        assert text == answer_alone(assistants[name], turns, PromptMedia(pictures=pictures), tokens=TOKENS)


def refusal(client: Any, **request: Any) -> tuple[int, str | None, str | None]:
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "one", "messages": words("a"), **request})
    error = refused.value.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return refused.value.status_code, error["code"], error["param"]


LARGE = Image.new("RGB", (200, 100))
PICTURE = "messages[0].content[0].image_url"


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ({"model": "other"}, (404, "model_not_found", None)),
        ({"messages": words("Say " * 3000)}, (400, None, None)),  # no room for it
        *(
            ({"messages": large}, (413, "too_large", None))
            for large in (words("x" * 400_000), shows(*[picture_part(RED)] * 3), shows(picture_part(LARGE)))
        ),
        *(
            ({"messages": shows({"type": "image_url", "image_url": {"url": url}})}, (400, None, PICTURE))
            for url in (data_url(RED)[:-60], "data:,abc", "http://example.com/a.png", "file:///etc/passwd")
        ),
        ({"messages": words("<image> a")}, (400, None, "messages[0].content[0].text")),
        ({"messages": words("<|im_end|>")}, (400, None, None)),
        ({"messages": words("\ufdd1 a")}, (400, None, None)),
        ({"messages": [{"role": "assistant", "content": "a"}]}, (400, None, None)),
        ({"messages": [{"role": "system", "content": [picture_part(RED)]}]}, (400, None, "messages[0]")),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, (400, None, "tools")),
    ],
)
def test_bad_input_is_told_with_its_status_and_place(client: Any, body: dict[str, Any], refused: Any) -> None:
    assert refusal(client, **body) == refused


def send(address: str, method: str, path: str, body: bytes = b"", declared: str | None = "application/json") -> Any:
    with contextlib.closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)) as connection:
        connection.request(method, path, body, {} if declared is None else {"Content-Type": declared})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_what_is_no_json_or_no_route(client: Any, address: str) -> None:
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"model": 1}', b"null", b"[" * 100_000):
        status, content = send(address, "POST", "/v1/chat/completions", body)
        assert (status, set(content)) == (400, {"error"})
    for path, expected_status in (("/v1/none", 404), ("/v1/chat/completions", 405)):
        status, content = send(address, "GET", path)
        assert (status, set(content)) == (expected_status, {"error"})
    assert text_of(client)


@pytest.mark.parametrize("declared", ["text/plain;charset=UTF-8", "multipart/form-data", "", None])
def test_other_types_of_content_are_refused(address: str, declared: str | None) -> None:
    """Those are what a browser lets any page send to this machine without asking the server first."""
    body = {"model": "one", "messages": words("a")}
    status, content = send(address, "POST", "/v1/chat/completions", json.dumps(body).encode(), declared)
    assert (status, content["error"]["code"]) == (415, "not_json")


def test_a_server_of_other_settings(model: ServedModel, endless: None) -> None:
    settings = ServerSettings(waiting=1, batch=1)
    with running(model, settings) as address:
        client = client_of(address)
        request = {"model": "one", "messages": words("a"), "max_tokens": 500}
        with ThreadPoolExecutor(4) as threads:
            requests = [threads.submit(client.chat.completions.create, **request) for _ in range(4)]
            errors: list[Any] = [error for future in requests if (error := future.exception()) is not None]
        assert len(errors) in (2, 3)  # one is answered and one may wait
        told = {(type(error), error.response.headers["retry-after"]) for error in errors}
        assert told == {(openai.RateLimitError, "1")}
        status, health = send(address, "GET", "/health")
        assert (status, health["status"], health["waiting"]) == (200, "ok", 0)


def test_a_client_that_goes_away_ends_its_row(model: ServedModel, endless: None, monkeypatch: Any) -> None:
    rows: dict[int, SequenceText] = {}
    take = SequenceText.take
    monkeypatch.setattr(SequenceText, "take", lambda row, *args: (rows.setdefault(id(row), row), take(row, *args))[1])
    request = {"model": "one", "messages": words("What colour is it?"), "max_tokens": 1500}
    with running(model) as address:
        client = client_of(address)
        stream = client.chat.completions.create(**request, stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(**request)
        client.chat.completions.create(**{**request, "max_tokens": 2})
    *left, answered = rows.values()
    assert answered.reason == "length"
    assert left
    assert all(row.reason == "ended" and len(row.ids) < 1500 for row in left), [len(row.ids) for row in left]


def test_an_answer_that_takes_too_long(model: ServedModel, endless: None) -> None:
    with running(model, ServerSettings(answer_seconds=1.5)) as address:
        client = client_of(address)
        assert refusal(client, max_tokens=1900) == (504, "timeout", None)
        with pytest.raises(openai.APIError) as late:
            list(client.chat.completions.create(model="one", messages=words("a"), max_tokens=1900, stream=True))
        assert late.value.code == "timeout"
        assert text_of(client, max_tokens=2)


@pytest.mark.parametrize("is_there", [False, True])
def test_nothing_more_is_decoded_for_a_client_that_has_gone_or_waited_too_long(model, monkeypatch, is_there) -> None:
    """The time of an answer begins when its request comes; pictures here take longer than all of it."""
    pictures, prepared, ended = list[str](), list[object](), threading.Event()
    picture, prepare = Reading.picture, Server._prepared

    def slow(media: Reading, content: bytes, where: str) -> Image.Image:
        pictures.append(where)
        time.sleep(1.0 if is_there else 2.5)
        return picture(media, content, where)

    def counted(server: Server, *args: Any) -> Any:
        try:
            prepared.append(prepare(server, *args))
            return prepared[-1]
        finally:
            ended.set()

    monkeypatch.setattr(Reading, "picture", slow)
    monkeypatch.setattr(Server, "_prepared", counted)
    shown = shows(*[picture_part(RED)] * 3)
    with running(model, ServerSettings(answer_seconds=0.5 if is_there else 300)) as address:
        if is_there:
            assert refusal(client_of(address), messages=shown) == (504, "timeout", None)
        else:
            with pytest.raises(openai.APITimeoutError):
                text_of(client_of(address, timeout=0.5), messages=shown)
        assert ended.wait(30)
    assert len(pictures) <= 1  # none where this machine is slow
    assert not prepared


ROOT = Path(__file__).parents[2]
SETTINGS: Any = {"targets": ("*language_model*.q_proj",), "rank": 2, "alpha": 5.0}


def refused(command: ModuleType, *arguments: object) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError) as error:
        list(command.run(parser.parse_args([str(word) for word in arguments])))
    return str(error.value)


@pytest.mark.parametrize("command", [serve_command, demo_command])
def test_what_is_wrong_is_told_before_weights_are_read(command: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    first = with_recipe(write_adapter(base, tmp_path / "one", seed=1, **SETTINGS), base)
    second = with_recipe(write_adapter(base, tmp_path / "two", seed=2, **SETTINGS), base, base_sha256="f" * 64)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("weights"))
    monkeypatch.setattr(demo_command, "find_spec", lambda name: name)  # as where the extra is installed
    refused(command, *(["--no-train"] if command is demo_command else []))
    refused(command, "--adapter", "gone")
    refused(command, "--adapter", f"one={second}", "--adapter", first)
    assert "empty" in refused(command, "--adapter", tmp_path / "empty", "--port", 0)
    assert "f" * 12 in refused(command, "--adapter", first, "--adapter", second, "--port", 0)
    refused(command, "--adapter", first, "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(command, "--adapter", first, "--port", taken.getsockname()[1])
    for words in (["--batch", "0"], ["--port", "70000"]):
        with pytest.raises(SystemExit):
            refused(command, *words)
    if command is serve_command:
        refused(command, "--model", "./gone", "--port", 0)


def test_every_number_of_the_documentation_is_its_options_default() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    of_rows = [zip(row[1].split(", "), row[2].split(", "), strict=False) for row in rows if len(row) == 4]
    documented = {name: value for pairs in of_rows for name, value in pairs}
    defaults = {f"`--{entry.name.replace('_', '-')}`": entry.default for entry in dataclasses.fields(ServerSettings)}
    shared = documented.keys() & defaults.keys()
    assert len(shared) >= 10
    assert {name: float(documented[name]) for name in shared} == {name: defaults[name] for name in shared}


def test_without_its_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "dora-vl[serve]" in refused(serve_command, "--model", tmp_path)
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None)
    assert "dora-vl[web]" in refused(demo_command, "--adapter", tmp_path)


def test_adapters_are_called_as_their_runs(tmp_path: Path) -> None:
    assert run_name(tmp_path / "runs" / "cats" / "adapter") == "cats"
    assert run_name(tmp_path / "runs" / "cats" / "checkpoint-240" / "adapter") == "cats-240"
    assert run_name(tmp_path / "some" / "peft") == "peft"
    (tmp_path / "a=b").mkdir()
    assert adapters_by_name([f"{tmp_path}/a=b", f"other={tmp_path}"]) == {"a=b": tmp_path / "a=b", "other": tmp_path}


@contextlib.contextmanager
def started(folder: Path, verb: str, adapter: Path) -> Iterator[tuple[Any, str]]:
    (folder / "temporary").mkdir()
    command = [sys.executable, "-m", "dora_vl.cli", verb, "--adapter", str(adapter), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "temporary")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, process.stderr.read()[-2000:]
        yield process, line
        assert "Traceback" not in process.stderr.read()
    assert not list((folder / "temporary").glob("dora-vl-*"))


def test_the_server_from_start_to_ctrl_c(tmp_path: Path, folders: dict[str, Path]) -> None:
    with started(tmp_path, "serve", folders["one"]) as (process, line):
        client = openai.OpenAI(base_url=line.split()[-3], api_key="none", timeout=60)
        assert [card.id for card in client.models.list().data] == ["model", "one"]
        messages: Any = [{"role": "user", "content": "What colour is it?"}]
        assert client.chat.completions.create(model="one", messages=messages, max_tokens=3).usage
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_from_start_to_end(tmp_path: Path, folders: dict[str, Path], number: signal.Signals) -> None:
    pytest.importorskip("gradio", reason="pip install '.[web]'")
    with started(tmp_path, "demo", folders["one"]) as (process, line):
        with urllib.request.urlopen(line.split()[-3], timeout=60) as answer:
            assert b"dora-vl demo" in answer.read()
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert list((tmp_path / "temporary").glob("dora-vl-page-*"))
        process.send_signal(number)
        assert process.wait(60) == 128 + number
