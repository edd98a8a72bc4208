"""Requests that are no JSON, whose adapter goes, whose client goes, or whose time is over before they are handed in."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from dora_vl.serving.answering import EngineSettings
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel
from dora_vl.serving.requests import RequestMedia
from dora_vl.serving.server import Server, ServerSettings
from tests.app.tiny_served import picture_part, running

RED = Image.new("RGB", (21, 15), "red")


def client_of(address: str, **named: Any) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, **named)


def asked(*, pictures: int = 0, model: str = "base", tokens: int = 2) -> dict[str, Any]:
    content = [*[picture_part(RED)] * pictures, {"type": "text", "text": "What is it?"}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens}


# -- what is not declared as JSON --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(model, ServerSettings(adapter_root=tmp_path_factory.mktemp("adapters"))) as address:
        yield address


def post(address: str, path: str, body: Any, declared: str | None) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    headers = {} if declared is None else {"Content-Type": declared}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    status, content = answer.status, answer.read()
    connection.close()
    return status, json.loads(content)


@pytest.mark.parametrize("declared", ["text/plain", "text/plain;charset=UTF-8", "multipart/form-data", "", None])
def test_other_types_of_content_are_refused(address: str, declared: str | None) -> None:
    """Those are what a browser lets any page send to this machine without asking the server first."""
    for path, body in (
        ("/v1/unload_lora_adapter", {"lora_name": "one"}),
        ("/v1/load_lora_adapter", {"lora_name": "two", "lora_path": "two"}),
        ("/v1/chat/completions", asked()),
    ):
        status, content = post(address, path, body, declared)
        assert (status, content["error"]["code"]) == (415, "not_json")
        assert "Content-Type must be application/json" in content["error"]["message"]
    assert [card.id for card in client_of(address).models.list().data] == ["base", "one"]


# -- an adapter that goes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("moment", ["while it is prepared", "before it is handed in", "before its batch"])
def test_an_adapter_that_goes_meanwhile_is_no_fault_of_the_request(
    model: ServedModel, monkeypatch: Any, moment: str, stream: bool
) -> None:
    """503, to be tried again: 404 is for a name that was not served when the request came."""
    folder = Path(model.source.place).parent / "one"
    place, name = {
        "while it is prepared": (Engine, "prepare"),
        "before it is handed in": (Engine, "submit"),
        "before its batch": (Engine, "_is_served"),
    }[moment]
    step = getattr(place, name)

    def after_it_went(engine: Engine, *given: Any, **named: Any) -> Any:
        if "two" in engine.model.names:
            engine.model.drop("two")
        return step(engine, *given, **named)

    with running(model) as address:
        client = client_of(address)
        model.put(*model.read("two", folder))
        monkeypatch.setattr(place, name, after_it_went)
        with pytest.raises(openai.InternalServerError, match="adapter two was unloaded") as refused:
            client.chat.completions.create(**asked(model="two"), stream=stream)
        assert refused.value.status_code == 503
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**asked(model="two"))


# -- a client that goes, and time that is over -------------------------------------------------------------------


class Decoding:
    """Pictures whose decoding takes as long as it is told."""

    def __init__(self, monkeypatch: Any, seconds: float) -> None:
        self.pictures, self.prepared = 0, 0
        self.ended = threading.Event()
        picture, prepared = RequestMedia.picture, Server._prepared

        def slow(media: RequestMedia, content: bytes, where: str) -> Image.Image:
            self.pictures += 1
            time.sleep(seconds)
            return picture(media, content, where)

        def counted(server: Server, *given: Any) -> Any:
            try:
                found = prepared(server, *given)
                self.prepared += 1
                return found
            finally:
                self.ended.set()

        monkeypatch.setattr(RequestMedia, "picture", slow)
        monkeypatch.setattr(Server, "_prepared", counted)


def test_nothing_more_is_decoded_for_a_client_that_has_gone(model: ServedModel, monkeypatch: Any) -> None:
    decoding = Decoding(monkeypatch, seconds=2.5)
    with running(model) as address:
        with pytest.raises(openai.APITimeoutError):
            client_of(address, timeout=0.5).chat.completions.create(**asked(pictures=3))
        assert decoding.ended.wait(30)
    assert decoding.pictures <= 1  # none where this machine is slow
    assert not decoding.prepared


def test_the_time_of_an_answer_begins_when_its_request_comes(model: ServedModel, monkeypatch: Any) -> None:
    decoding = Decoding(monkeypatch, seconds=1.0)
    with running(model, engine_settings=EngineSettings(answer_seconds=0.5)) as address:
        with pytest.raises(openai.InternalServerError, match="it took too long") as refused:
            client_of(address).chat.completions.create(**asked(pictures=2))
        assert refused.value.status_code == 504
    assert decoding.pictures <= 1  # none where this machine is slow
    assert not decoding.prepared
