"""Requests that are wrong in every way: an answer with its status each, no crash, flat memory, no file left behind."""

from __future__ import annotations

import base64
import http.client
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dora_vl.serving.requests import MediaLimits
from dora_vl.serving.server import ServerSettings
from tests.app.tiny_served import data_url, running, served, spread, write_adapter
from tests.backbones.tiny_image_text import write_tiny

RED = data_url(Image.new("RGB", (9, 9), "red"))
STATUSES = frozenset({200, 400, 404, 413})
MOST_GROWTH_MIB = 60
"""Of resident memory from the first fifth to the last request: what a leak of a picture each would pass by far."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    base = spread(write_tiny("qwen2_5_vl", folder / "base"))
    targets = ("*language_model*.q_proj",)
    adapter = write_adapter(base, folder / "one", seed=1, targets=targets, rank=2, alpha=5.0)
    limits = MediaLimits(pictures=3, picture_pixels=1000, bytes=100_000, remote=True, fetch_seconds=1.0)
    model_settings = ServerSettings(media=limits, body_bytes=200_000, new_tokens=3)
    with running(served(base, {"one": adapter}), model_settings) as address:
        yield address.removeprefix("http://")


def post(address: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def check(address: str, body: bytes) -> None:
    """An answer, or OpenAI's error in one line."""
    status, content = post(address, body)
    assert status in STATUSES, (status, content[:300])
    if status != 200:
        error = json.loads(content)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        assert len(error["message"]) < 500


# -- requests that are nearly right ----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BYTES = st.binary(max_size=60).map(lambda content: base64.b64encode(content).decode())
URLS = st.one_of(
    st.just(RED),
    st.text(max_size=40),
    BYTES.map(lambda content: f"data:image/png;base64,{content}"),
    st.integers(0, 120).map(lambda size: RED[: len("data:image/png;base64,") + size]),
    st.sampled_from(["http://127.0.0.1/", "http://localhost:1/a", "https://169.254.169.254/", "file:///etc/passwd"]),
)
PART_TYPES = ("text", "image_url", "video_url", "input_audio")
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=30)}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": URLS.map(lambda url: {"url": url})}),
    st.fixed_dictionaries(
        {"type": st.just("video_url"), "video_url": BYTES.map(lambda c: {"url": f"data:;base64,{c}"})}
    ),
    st.fixed_dictionaries({"type": st.sampled_from(PART_TYPES)}, optional={"text": JSON, "image_url": JSON}),
    JSON,
)
MESSAGES = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "assistant", "system", "tool", ""]) | JSON,
        "content": st.text(max_size=40) | st.lists(PARTS, max_size=4) | JSON,
    },
    optional={"name": JSON},
)
REQUESTS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["base", "one", "other"]) | JSON,
        "messages": st.lists(MESSAGES, max_size=4) | JSON,
        "max_tokens": st.integers(1, 3) | JSON,
    },
    optional={
        "temperature": st.floats(0, 2) | JSON, "top_p": st.floats(0, 1) | JSON, "stop": st.lists(st.text()) | JSON,
        "seed": st.integers() | JSON, "n": JSON, "tools": JSON, "logprobs": JSON, "response_format": JSON,
    },
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    REQUESTS.map(lambda value: json.dumps(value).encode()),
    REQUESTS.flatmap(lambda value: st.integers(0, 200).map(lambda end: json.dumps(value).encode()[:end])),
)


def left_behind() -> list[str]:
    """Of requests; a page that another test process has open holds a folder of its own."""
    folders = Path(tempfile.gettempdir()).glob("dora-vl-*")
    return [path.name for path in folders if not path.name.startswith("dora-vl-page-")]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_malformed_requests_get_an_answer_and_leave_memory_flat(address: str, examples: int) -> None:
    memory: list[float] = []
    health = list(HealthCheck)

    @given(body=BODIES)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=health, derandomize=True)
    def all_of_them(body: bytes) -> None:
        check(address, body)
        memory.append(resident_mib())

    all_of_them()
    assert memory[-1] - memory[len(memory) // 5] < MOST_GROWTH_MIB
    assert not left_behind()
    good = {"model": "one", "messages": [{"role": "user", "content": "a"}]}
    assert post(address, json.dumps(good).encode())[0] == 200
