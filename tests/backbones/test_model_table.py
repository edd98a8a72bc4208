"""The page of models says what the tests hold."""

from __future__ import annotations

import pytest

from tests.backbones.model_table import PAGE, page
from tests.backbones.tiny_families.family import why_not_here
from tests.backbones.tiny_families.language import LANGUAGE_MODELS
from tests.backbones.tiny_families.table import FAMILIES, families
from tests.backbones.tiny_image_text import tiny_tokenizer

PAGE_OF = "5.24"


@pytest.mark.skipif(bool(why_not_here(PAGE_OF)), reason="the page lists a newer version's models too")
def test_the_page_is_written_from_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.backbones.model_table"


def test_fifty_families_see_pictures() -> None:
    assert len(FAMILIES) >= 50
    assert not set(FAMILIES) & set(LANGUAGE_MODELS)


@families
def test_a_family_takes_videos_where_its_processor_has_a_part_for_them(family: str) -> None:
    row = FAMILIES[family]
    processor = row.processor(tiny_tokenizer(row.names))
    assert (vars(processor).get("video_processor") is not None) == row.video
