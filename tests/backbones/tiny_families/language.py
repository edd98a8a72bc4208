"""Language models without eyes: what each type's config needs beyond the common sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.backbones.tiny_families.family import TABLE

LANGUAGE_MODELS: Mapping[str, Mapping[str, Any]] = TABLE["language"]
"""Model types of `AutoModelForCausalLM`, written and trained from tokenizer and chat template alone."""

QUICK = ("llama", "qwen3_moe", "gemma3_text", "lfm2", "gpt_oss")
"""Plain, of experts, with windows, without keys and values, with sinks."""
LANGUAGE_MODELS_IN_TURN = [
    pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in LANGUAGE_MODELS
]
"""All of them; quick of a few, slow of the others."""
