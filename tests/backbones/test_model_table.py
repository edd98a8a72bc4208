"""The page of models says what the tests hold."""

from __future__ import annotations

from tests.backbones.model_table import PAGE, page
from tests.backbones.tiny_families.language import LANGUAGE_MODELS
from tests.backbones.tiny_families.table import FAMILIES


def test_the_page_is_written_from_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.backbones.model_table"


def test_fifty_families_see_pictures() -> None:
    assert len(FAMILIES) >= 50
    assert not set(FAMILIES) & set(LANGUAGE_MODELS)
