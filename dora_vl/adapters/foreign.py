"""The layouts of other tools' adapters, as a table that needs no torch; `adapters.read` reads files by it.

Sources: NVlabs/DoRA (`peft/tuners/dora.py`, `VL-T5/src/trainer_base.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

EMBEDDING = "model.encoder.visual_embedding"
TOKENS = "model.shared.weight"
ALIASES = (
    TOKENS,
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    f"{EMBEDDING}.obj_order_embedding.weight",
    "lm_head.weight",
)
"""A VL-BART's token embedding is stored under any of these names."""
ADDED_ROWS = f"{TOKENS}[-200:]"
"""Frozen random rows of the token embedding that the result depends on: the picture tokens' orders."""


def alpha_over_rank(config: Mapping[str, Any], rank: int) -> float | None:
    """Computes s = lora_alpha / r from PEFT's field names."""
    return None if "lora_alpha" not in config else float(config["lora_alpha"]) / rank


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """Frozen rows that an adapter carries; the file holds their whole tensor under one of several names."""

    names: tuple[str, ...]
    own: str
    """Name of the rows in an adapter folder, such as `shared.weight[-200:]`."""
    needed_by: str
    """Full-name glob of trained tensors that mean nothing without the rows."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one tool names a layer's tensors: endings after the layer's name, alternatives in order."""

    lora_A: tuple[str, ...]
    lora_B: tuple[str, ...]
    magnitude: tuple[str, ...]
    scale: Callable[[Mapping[str, Any], int], float | None] = alpha_over_rank
    """Computes s from the tool's own `adapter_config.json` (or {}) and a rank; None where it is not stated."""
    extras: tuple[str, ...] = ("*",)
    """Full-name globs of the other tensors that were trained."""
    kept: KeptRows | None = None
    whole_model: bool = False
    """The file holds the base as well; elsewhere a tensor that is neither adapter nor extra is refused."""
    renames: tuple[tuple[str, str], ...] = ()
    """Prefixes of names: the tool's, and transformers'."""


NVLABS = Layout(
    lora_A=("lora_A.weight", "lora_A.default.weight"),
    lora_B=("lora_B.weight", "lora_B.default.weight"),
    magnitude=("weight_m_wdecomp.weight", "weight_m_wdecomp.default.weight"),
)
LLAVA_RENAMES = (
    ("model.layers.", "model.language_model.layers."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
)
"""Maps prefixes of LLaVA's own class to those of transformers' `LlavaForConditionalGeneration`."""
NVLABS_VLBART = Layout(
    lora_A=("lora_A",),
    lora_B=("lora_B",),
    magnitude=("weight_m",),
    scale=lambda config, rank: 1.0,  # B A is multiplied by one, whatever alpha its options name
    extras=("*.bias", "*layer_norm.*", "*layernorm_embedding.*", "*.visual_embedding.*"),
    kept=KeptRows(names=ALIASES, own=ADDED_ROWS, needed_by=f"{EMBEDDING}.*"),
    whole_model=True,
)
LAYOUTS = {"nvlabs": NVLABS, "nvlabs-llava": replace(NVLABS, renames=LLAVA_RENAMES), "nvlabs-vlbart": NVLABS_VLBART}
"""Layouts by the name that `dora-vl convert --from` takes."""
FORMATS = ("peft", *LAYOUTS)
TELLING_KEYS = (
    ("nvlabs-llava", ("model.mm_projector.0.weight",)),
    ("nvlabs", NVLABS.magnitude),
    ("nvlabs-vlbart", ("weight_v",)),
    ("peft", ("lora_A.weight", "lora_embedding_A", "lora_magnitude_vector", "lora_magnitude_vector.weight")),
)
"""Key endings that only one format has, most specific first."""
