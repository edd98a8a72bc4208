"""Every family that has a tiny model, and language models without eyes."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.backbones.tiny_families.family import TABLE, Family, why_not_here

FAMILIES: Mapping[str, Family] = {
    name: Family(**{**row, "idle": tuple(row.get("idle", ()))}) for name, row in TABLE["families"].items()
}
QUICK = ("qwen3_vl", "qwen3_5_moe", "internvl", "gemma3", "paligemma", "mllama")
"""These families have one of each kind of picture, mask and prompt."""


def param(family: str, *, is_slow: bool = False) -> object:
    """A family's name with what it takes to be tried."""
    slow = (pytest.mark.slow,) if is_slow or FAMILIES[family].slow else ()
    older = why_not_here(FAMILIES[family].since)
    return pytest.param(family, marks=(pytest.mark.skipif(bool(older), reason=older), *slow))


families = pytest.mark.parametrize("family", [param(family) for family in FAMILIES])
"""A test of every family."""

families_in_turn = pytest.mark.parametrize("family", [param(name, is_slow=name not in QUICK) for name in FAMILIES])
"""A test of every family that takes a second for each: quick of a few, slow of the others."""

LANGUAGE_MODELS: Mapping[str, Mapping[str, Any]] = TABLE["language"]
"""Model types of `AutoModelForCausalLM`, what their config needs beyond the common sizes; tokenizer and template alone.
"""
QUICK_WORDS = ("llama", "qwen3_moe", "gemma3_text", "lfm2", "gpt_oss")
"""Plain, of experts, with windows, without keys and values, with sinks."""
LANGUAGE_MODELS_IN_TURN = [
    pytest.param(name, marks=() if name in QUICK_WORDS else (pytest.mark.slow,)) for name in LANGUAGE_MODELS
]
"""All of them; quick of a few, slow of the others."""
