"""Names of a VL-BART's tensors, which are those of VL-T5, VL-Adapter and NVlabs; needs no transformers."""

from __future__ import annotations

EMBEDDING = "model.encoder.visual_embedding"
TOKENS = "model.shared.weight"
ALIASES = (
    TOKENS,
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    f"{EMBEDDING}.obj_order_embedding.weight",
    "lm_head.weight",
)
"""One tensor under five names."""
ADDED_TOKENS = 200
"""`<extra_id_99>` to `<extra_id_0>`, then `<vis_extra_id_99>` to `<vis_extra_id_0>`."""
ADDED_ROWS = f"{TOKENS}[-{ADDED_TOKENS}:]"
"""Frozen random rows of the token embedding that the result depends on: the picture tokens' orders."""
