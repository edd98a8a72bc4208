"""Language models without eyes: what each type's config needs beyond the common sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.backbones.tiny_families.family import TABLE

LANGUAGE_MODELS: Mapping[str, Mapping[str, Any]] = TABLE["language"]
"""Model types of `AutoModelForCausalLM`, written and trained from tokenizer and chat template alone."""
