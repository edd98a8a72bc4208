"""The kinds of backbone, as `recipe.json` states them: how a base is loaded, prompted and asked."""

from __future__ import annotations

LLAVA = "llava"
"""LLaVA-1.5: its own wording, pictures and masks."""
IMAGE_TEXT = "image_text"
"""Any other image-text-to-text model of transformers, through its own processor."""
CAUSAL_LM = "causal_lm"
"""A plain language model."""
VLBART = "vlbart"
"""An encoder-decoder over visual features."""
