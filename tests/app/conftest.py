"""A tiny model with one adapter, which most tests of the server and the page ask."""

from __future__ import annotations

import pytest

from dora_vl.serving.model import ServedModel
from tests.app.tiny_served import served, spread, write_adapter
from tests.backbones.tiny_image_text import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("served")
    base = spread(write_tiny("qwen2_5_vl", folder / "base"))
    adapter = write_adapter(base, folder / "one", seed=1, targets=("*language_model*.q_proj",), rank=2, alpha=5.0)
    return served(base, {"one": adapter})
