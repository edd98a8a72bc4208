"""The layouts of other tools' adapters, as a table that needs no torch; `adapters.read` reads files by it.

Sources: NVlabs/DoRA (`peft/tuners/dora.py`, `VL-T5/src/trainer_base.py`), ylsung/VL_adapter (`lora/layers.py`),
pytorch/torchtune (`modules/peft/dora.py`), ml-explore/mlx-lm (`tuner/dora.py`), LyCORIS (`modules/locon.py`) and
kohya-ss/sd-scripts (`networks/lora.py`).
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
ORIGINAL_FORMS = {"nvlabs-vlbart": "dora", "vl-adapter": "lora"}
"""Maps VL-BART's original formats (`--from`, `--as`) to the method whose factors each can hold."""
GGUF_KINDS = ("f16", "f32", "q8_0")
"""Number types of matrices in a GGUF file; vectors are always float32."""


def alpha_over_rank(config: Mapping[str, Any], rank: int) -> float | None:
    """Computes s = lora_alpha / r from PEFT's field names."""
    return None if "lora_alpha" not in config else float(config["lora_alpha"]) / rank


def mlx_scale(config: Mapping[str, Any], rank: int) -> float | None:
    """Reads s, which mlx-lm states itself."""
    stated = config.get("lora_parameters", {}).get("scale")
    return None if stated is None else float(stated)


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
    alpha: tuple[str, ...] = ()
    """Endings of a scalar beside A and B; where it is missing, alpha is the rank."""
    transposed: bool = False
    """A is stored as [in, rank] and B as [rank, out]."""
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
VL_ADAPTER = Layout(
    lora_A=("lora_A",),
    lora_B=("lora_B",),
    magnitude=(),
    extras=("*.bias", "*layer_norm.*", "*layernorm_embedding.*", "*.visual_embedding.*"),
    kept=KeptRows(names=ALIASES, own=ADDED_ROWS, needed_by=f"{EMBEDDING}.*"),
    whole_model=True,
)
LAYOUTS = {
    "nvlabs": NVLABS,
    "nvlabs-llava": replace(NVLABS, renames=LLAVA_RENAMES),
    # VL-BART's DoRA multiplies B A by one, whatever alpha its options name.
    "nvlabs-vlbart": replace(VL_ADAPTER, magnitude=("weight_m",), scale=lambda config, rank: 1.0),
    "vl-adapter": VL_ADAPTER,
    "torchtune": Layout(lora_A=("lora_a.weight",), lora_B=("lora_b.weight",), magnitude=("magnitude",)),
    "mlx": Layout(lora_A=("lora_a",), lora_B=("lora_b",), magnitude=("m",), transposed=True, scale=mlx_scale),
    "kohya": Layout(
        lora_A=("lora_down.weight",), lora_B=("lora_up.weight",), magnitude=("dora_scale",), alpha=("alpha",), extras=()
    ),
}
"""Layouts by the name that `dora-vl convert --from` takes."""
FORMATS = ("peft", *LAYOUTS)
TELLING_KEYS = (
    ("nvlabs-llava", ("model.mm_projector.0.weight",)),
    ("nvlabs", NVLABS.magnitude),
    ("nvlabs-vlbart", ("weight_v",)),
    ("torchtune", ("lora_a.weight",)),
    ("mlx", ("lora_a",)),
    ("kohya", ("lora_down.weight",)),
    ("peft", ("lora_A.weight", "lora_embedding_A", "lora_magnitude_vector", "lora_magnitude_vector.weight")),
)
"""Key endings that only one format has, most specific first."""

TORCHTUNE_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""Maps torchtune's decoder modules to transformers' (torchtune/models/convert_weights.py, `_FROM_HF`)."""
ROTARY_ORDER = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}
"""Maps `model_type` to whether torchtune keeps q and k rows in Meta's order, each rotary pair side by side."""
KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lora_transformer_", "lycoris_")
