"""OpenAI's own client against the server: answers, streams, pictures, adapters that come and go, errors."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from transformers import AutoProcessor

from dora_vl.data.turns import Turn
from dora_vl.evaluation.prompt_inputs import Shown
from dora_vl.serving.answering import EngineSettings
from dora_vl.serving.decoding import RowText
from dora_vl.serving.model import ServedModel
from dora_vl.serving.requests import MediaLimits
from dora_vl.serving.server import ServerSettings
from tests.app.tiny_served import (
    ADAPTERS,
    NOTHING,
    alone,
    answer_alone,
    data_url,
    picture_part,
    running,
    served,
    spread,
    write_adapters,
)
from tests.backbones.tiny_video import write_tiny_video

TOKENS = 8
DECLARED = "Content-Type: application/json"
NAMES = ("base", *ADAPTERS)
RED, WIDE = Image.new("RGB", (21, 15), "red"), Image.new("RGB", (60, 17), (20, 40, 220))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread(write_tiny_video("qwen2_5_vl", tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def model(base: Path, folders: dict[str, Path]) -> ServedModel:
    return served(base, folders)


@pytest.fixture(scope="module")
def address(model: ServedModel, folders: dict[str, Path]) -> Iterator[str]:
    settings = ServerSettings(
        adapter_root=folders["one"].parent,
        body_bytes=300_000,
        media=MediaLimits(pictures=2, picture_pixels=10_000, frames=4),
    )
    with running(model, settings, EngineSettings(batch_rows=32, window_seconds=0.2)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def words(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def expected(base: Path, folders: dict[str, Path], name: str, turns: list[Turn], seen: Shown = NOTHING) -> str:
    return answer_alone(alone(base, folders.get(name)), turns, seen, tokens=TOKENS)


def test_models_are_the_base_and_its_adapters(client: Any) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == list(NAMES)
    assert client.models.retrieve("two").id == "two"


def test_an_answer_whole_and_streamed(client: Any, base: Path, folders: dict[str, Path]) -> None:
    asked = {"model": "one", "messages": words("What colour is it?"), "max_tokens": TOKENS}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert text == expected(base, folders, "one", [Turn("user", "What colour is it?")])
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= TOKENS
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_two_pictures_and_a_talk(client: Any, base: Path, folders: dict[str, Path]) -> None:
    content = [picture_part(WIDE), picture_part(RED), {"type": "text", "text": "Which is red?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "the second"},
        {"role": "user", "content": "And the other?"},
    ]
    found = client.chat.completions.create(model="two", messages=messages, max_tokens=TOKENS)
    turns = [
        Turn("user", "<image>\n<image>\nWhich is red?"),
        Turn("assistant", "the second"),
        Turn("user", "And the other?"),
    ]
    assert found.choices[0].message.content == expected(base, folders, "two", turns, Shown(pictures=(WIDE, RED)))


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message(client: Any, base: Path, folders: dict[str, Path], role: str) -> None:
    """The prompt is as long as the processor's own chat template makes it."""
    system, asked = "Be brief. Look at its edges.", "What colour is it?"
    parts = [{"type": "image", "image": RED}, {"type": "text", "text": asked}]
    talk = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": parts},
    ]
    theirs = AutoProcessor.from_pretrained(base).apply_chat_template(
        talk, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    content = [picture_part(RED), {"type": "text", "text": asked}]
    messages = [{"role": role, "content": system}, {"role": "user", "content": content}]
    found = client.chat.completions.create(model="one", messages=messages, max_tokens=TOKENS)
    turns = [Turn("system", system), Turn("user", f"<image>\n{asked}")]
    assert found.choices[0].message.content == expected(base, folders, "one", turns, Shown(pictures=(RED,)))
    assert found.usage.prompt_tokens == theirs["input_ids"].shape[1]


def test_a_strength_of_an_adapter(client: Any, base: Path, folders: dict[str, Path]) -> None:
    """Ours, beside OpenAI's fields: 0 is the base, 1 the adapter; what is no strength is refused by name."""

    def said(strength: Any) -> str:
        asked = {"model": "one", "messages": words("What colour is it?"), "max_tokens": TOKENS}
        found = client.chat.completions.create(**asked, extra_body={"strength": strength})
        return str(found.choices[0].message.content)

    turns = [Turn("user", "What colour is it?")]
    assert said(0) == expected(base, folders, "base", turns)
    assert said(1.0) == said(None) == expected(base, folders, "one", turns)
    assert said(0.5) not in (said(0), said(1))
    for wrong in (-0.5, 11, "half", [1]):
        with pytest.raises(openai.BadRequestError) as refused:
            said(wrong)
        assert refused.value.body["param"] == "strength"  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


def test_a_video(client: Any, base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("av", reason="pip install 'dora-vl[video]'")
    from data_prep.moving_shapes import Settings, make
    from dora_vl.data.turns import Clip
    from dora_vl.data.video import Uniform, read_frames

    make(tmp_path / "data", Settings(pretrain=1, adapt=1, test=1, seed=1), workers=1)
    file = tmp_path / "data" / "clips" / "test-00000.mp4"
    url = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What moves?"}]
    found = client.chat.completions.create(
        model="one", messages=[{"role": "user", "content": content}], max_tokens=TOKENS
    )
    video = read_frames(file.parent, Clip(path=file.name), Uniform(4))
    turns = [Turn("user", "<video>\nWhat moves?")]
    assert found.choices[0].message.content == expected(base, folders, "one", turns, Shown(videos=(video,)))


def test_32_requests_in_flight_answer_as_each_adapter_alone(client: Any, base: Path, folders: dict[str, Path]) -> None:
    questions = [
        "What colour is it?",
        "Say the colour.",
        "It is red green blue. Say it.",
        " ".join(["What is it?"] * 5),
    ]
    asked = [(NAMES[number % 5], questions[number % 4], number % 3) for number in range(32)]

    def ask(name: str, question: str, pictures: int) -> str:
        content = [*map(picture_part, (RED, WIDE)[:pictures]), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        found = client.chat.completions.create(model=name, messages=messages, max_tokens=TOKENS)
        return found.choices[0].message.content

    with ThreadPoolExecutor(32) as threads:
        found = list(threads.map(lambda one: ask(*one), asked))
    assistants = {name: alone(base, folders.get(name)) for name in NAMES}
    for (name, question, pictures), said in zip(asked, found, strict=True):
        turns, seen = [Turn("user", "<image>\n" * pictures + question)], Shown(pictures=(RED, WIDE)[:pictures])
        assert said == answer_alone(assistants[name], turns, seen, tokens=TOKENS)


def test_sampling_is_a_rows_own(client: Any) -> None:
    asked = {"model": "one", "messages": words("What colour is it?"), "max_tokens": TOKENS}

    def say(**more: Any) -> str:
        return client.chat.completions.create(**asked, **more).choices[0].message.content

    with ThreadPoolExecutor(8) as threads:
        hot = list(threads.map(lambda seed: say(temperature=2.0, seed=seed), [1, 2, 3, 4, 1, 2, 3, 4]))
        greedy = threads.submit(say, temperature=0).result()
    assert hot[:4] == hot[4:]
    assert len(set(hot)) > 1
    assert greedy == say()
    assert say(temperature=2.0, seed=1, top_p=1e-6) == greedy  # only the likeliest is left


def test_adapters_come_and_go_while_it_runs(client: Any, address: str, base: Path, folders: dict[str, Path]) -> None:
    def post(what: str, **body: Any) -> Any:
        return client.post(f"/{what}_lora_adapter", body=body, cast_to=str)

    assert "added" in post("load", lora_name="again", lora_path="two")
    found = client.chat.completions.create(model="again", messages=words("Say it."), max_tokens=TOKENS)
    assert found.choices[0].message.content == expected(base, folders, "two", [Turn("user", "Say it.")])
    assert "removed" in post("unload", lora_name="again")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="again", messages=words("Say it."))
    for path in ("..", "/etc", "none", "a\0b", str(base)):
        with pytest.raises(openai.BadRequestError, match=r"below the one that adapters|is no path"):
            post("load", lora_name="other", lora_path=path)
    with pytest.raises(openai.BadRequestError, match="served already"):
        post("load", lora_name="one", lora_path="two")
    with pytest.raises(openai.BadRequestError, match="is the base, which stays"):
        post("unload", lora_name="base")
    with pytest.raises(openai.NotFoundError):
        post("unload", lora_name="never")


# -- what cannot be answered ---------------------------------------------------------------------------------


def status_of(client: Any, **asked: Any) -> tuple[int, str]:
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "one", "messages": words("a"), **asked})
    body = refused.value.response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return refused.value.status_code, body["error"]["message"]


def shows(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def url_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({"model": "other"}, 404, "no model 'other' is served; there are base, one"),
        ({"messages": words("Say " * 3000)}, 400, "positions"),
        ({"max_tokens": 100_000}, 400, "positions"),
        ({"messages": words("x" * 400_000)}, 413, "larger than the 300,000 bytes"),
        ({"messages": shows(*[picture_part(RED)] * 3)}, 413, "shows 3 pictures, and 2 are allowed"),
        ({"messages": shows(picture_part(Image.new("RGB", (200, 60))))}, 413, "200 x 60 pixels; 10,000 are allowed"),
        ({"messages": shows(url_part("data:image/png;base64,AAAA"))}, 400, "no picture of PNG"),
        ({"messages": shows(url_part(data_url(RED)[:-60]))}, 400, "messages[0].content[0].image_url"),
        ({"messages": shows(url_part("data:image/png;base64,?"))}, 400, "cannot be read"),
        ({"messages": shows(url_part("data:,abc"))}, 400, "is not base64"),
        ({"messages": shows(url_part("http://example.com/a.png"))}, 400, "--allow-remote-media"),
        ({"messages": shows(url_part("file:///etc/passwd"))}, 400, "data: URLs alone"),
        ({"messages": words("<image> a")}, 400, "the text holds <image>"),
        ({"messages": words("<|im_end|>")}, 400, "special token"),
        ({"messages": words("\ufdd1 a")}, 400, "holds a Unicode noncharacter"),
        ({"messages": [{"role": "system", "content": "a"}]}, 400, "a question must be last"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "must alternate, the user first"),
        ({"messages": [{"role": "system", "content": [picture_part(RED)]}]}, 400, "holds words alone"),
        ({"messages": []}, 400, "messages"),
        ({"temperature": 3}, 400, "temperature"),
        ({"n": 2}, 400, "n: "),
        ({"stop": [""]}, 400, "stop[0]: "),
        ({"extra_body": {"best_of": 2}}, 400, "best_of"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    ],
)
def test_bad_input_is_said_with_its_status(client: Any, asked: dict[str, Any], status: int, message: str) -> None:
    found, said = status_of(client, **asked)
    assert (found, message in said) == (status, True), said


def raw(address: str, content: bytes) -> bytes:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(content)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


def test_what_is_no_json_or_no_route(client: Any, address: str) -> None:
    for body in (b"", b"{", b"[]", b"\xff\xfe", b'{"model": 1}', b"null", b"[" * 100_000):
        lines = [f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{DECLARED}", f"Content-Length: {len(body)}"]
        answer = raw(address, "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body)
        assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
        assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
    for method, path, status in (("GET", "/v1/none", 404), ("GET", "/v1/chat/completions", 405)):
        answer = raw(address, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status}".encode())
        assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])
    assert client.chat.completions.create(model="one", messages=words("a"), max_tokens=2).choices


def test_a_client_that_goes_away_ends_its_row(model: ServedModel, monkeypatch: Any) -> None:
    """Two long answers end when their clients leave, one streamed and one waited for; the next is answered."""
    rows: dict[int, RowText] = {}
    take = RowText.take
    monkeypatch.setattr(RowText, "take", lambda row, *given: (rows.setdefault(id(row), row), take(row, *given))[1])
    asked = {"model": "one", "messages": words("What colour is it?"), "max_tokens": 1500}
    monkeypatch.setattr(model.backbone.model.generation_config, "eos_token_id", None)
    with running(model) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(**asked)
        client.chat.completions.create(**{**asked, "max_tokens": 2})
    *left, answered = rows.values()
    assert answered.reason == "length"
    assert left
    assert all(row.reason == "ended" and len(row.ids) < 1000 for row in left), [len(row.ids) for row in left]


def test_an_answer_that_takes_too_long(model: ServedModel, monkeypatch: Any) -> None:
    asked = {"model": "one", "messages": words("What colour is it?"), "max_tokens": 1900}
    monkeypatch.setattr(model.backbone.model.generation_config, "eos_token_id", None)
    with running(model, engine_settings=EngineSettings(answer_seconds=1.5)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        status, said = status_of(client, **asked)
        assert (status, "it took too long" in said) == (504, True)
        with pytest.raises(openai.APIError, match="it took too long"):
            list(client.chat.completions.create(**asked, stream=True))
        assert client.chat.completions.create(**{**asked, "max_tokens": 2}).choices


def test_a_server_of_other_settings(model: ServedModel, monkeypatch: Any) -> None:
    """No adapters over HTTP, addresses on the web but none of this network, a slow sender, and too many at once."""
    settings = ServerSettings(held=1, body_seconds=1.5, media=MediaLimits(remote=True))
    with running(model, settings) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for what, body in (("load", {"lora_name": "a", "lora_path": "a"}), ("unload", {"lora_name": "one"})):
            with pytest.raises(openai.BadRequestError, match="--adapter-root"):
                client.post(f"/{what}_lora_adapter", body=body, cast_to=str)
        for url in (f"{address}/health", "http://localhost/a.png", "http://169.254.169.254/latest", "http://[::1]/"):
            status, said = status_of(client, messages=shows(url_part(url)))
            assert status == 400
            assert "is no public address" in said
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{DECLARED}\r\nContent-Length: 1000\r\n\r\n"
            )
            slow.sendall(head.encode() + b"{")
            assert slow.recv(100).startswith(b"HTTP/1.1 504")
        monkeypatch.setattr(model.backbone.model.generation_config, "eos_token_id", None)
        asked = {"model": "one", "messages": words("a"), "max_tokens": 500}
        with ThreadPoolExecutor(2) as threads:
            both = [threads.submit(client.chat.completions.create, **asked) for _ in range(2)]
            refused = [one.exception() for one in both if one.exception() is not None]
        assert [type(one) for one in refused] == [openai.RateLimitError]
        assert refused[0].response.headers["retry-after"] == "1"  # type: ignore[union-attr]
        assert client.chat.completions.create(model="one", messages=words("a"), max_tokens=2).choices
        health = json.loads(
            raw(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").partition(
                b"\r\n\r\n"
            )[2]
        )
        assert (health["status"], health["waiting"]) == ("ok", 0)
