"""Every family that has a tiny model, from the files beside this one."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import pytest

from tests.backbones.tiny_families import crossing, deepseek, gemma, glm, grids, llava, mistral, qwen, tiles
from tests.backbones.tiny_families.family import Family, why_not_here

FAMILIES: Mapping[str, Family] = {
    **llava.FAMILIES,
    **qwen.FAMILIES,
    **tiles.FAMILIES,
    **gemma.FAMILIES,
    **mistral.FAMILIES,
    **glm.FAMILIES,
    **deepseek.FAMILIES,
    **crossing.FAMILIES,
    **grids.FAMILIES,
}


def _param(family: str) -> object:
    needs = FAMILIES[family].needs
    missing = needs is not None and importlib.util.find_spec(needs) is None
    slow = (pytest.mark.slow,) if FAMILIES[family].slow else ()
    older = why_not_here(FAMILIES[family].since)
    skips = pytest.mark.skipif(missing, reason=f"needs {needs}"), pytest.mark.skipif(bool(older), reason=older)
    return pytest.param(family, marks=(*skips, *slow))


families = pytest.mark.parametrize("family", [_param(family) for family in FAMILIES])
"""A test of every family."""
