"""A tiny model with four adapters, which most tests of the engine, the server and the page ask; a server over it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from tests.backbones.tiny_image_text import write_tiny_video
from tests.serving.browser import browser
from tests.serving.tiny_served import running, served, spread, write_adapters


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread(write_tiny_video("qwen2_5_vl", tmp_path_factory.mktemp("served") / "model"))


@pytest.fixture(scope="session")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def model(base: Path, folders: dict[str, Path]) -> ServedModel:
    return served(base, folders)


@pytest.fixture(scope="module")
def address(model: ServedModel) -> Iterator[str]:
    settings = ServerSettings(batch=32, window_ms=200, max_body_mib=0.3, max_pictures=2, max_mpx=0.015, frames=4)
    with running(model, settings) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def endless(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.backbone.model.generation_config, "eos_token_id", None)
