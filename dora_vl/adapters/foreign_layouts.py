"""Where each tool puts A, B and the magnitude: a table.

Sources of the layouts: NVlabs/DoRA (`peft/tuners/dora.py`, `VL-T5/src/trainer_base.py`), ylsung/VL_adapter
(`lora/layers.py`), pytorch/torchtune (`modules/peft/dora.py`), ml-explore/mlx-lm (`tuner/dora.py`), LyCORIS
(`modules/locon.py`) and kohya-ss/sd-scripts (`networks/lora.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dora_vl.adapters.vlbart_tensors import ADDED_ROWS, ALIASES, EMBEDDING

ScaleRule = Callable[[Mapping[str, Any], int], "float | None"]
"""From the tool's own `adapter_config.json` (empty where there is none) and a rank to s; None: not stated there."""


def alpha_over_rank(config: Mapping[str, Any], rank: int) -> float | None:
    """s = lora_alpha / r, by a configuration with PEFT's field names."""
    return None if "lora_alpha" not in config else float(config["lora_alpha"]) / rank


def mlx_scale(config: Mapping[str, Any], rank: int) -> float | None:
    """mlx-lm states s itself."""
    stated = config.get("lora_parameters", {}).get("scale")
    return None if stated is None else float(stated)


def always_one(config: Mapping[str, Any], rank: int) -> float:
    """VL-BART's DoRA multiplies B A by one, whatever alpha its options name."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """Frozen rows of a tensor that an adapter carries; the file holds it whole, under any of several names."""

    names: tuple[str, ...]
    own: str
    """The rows' name in an adapter folder, such as `shared.weight[-200:]`."""
    needed_by: str
    """Full-name glob of trained tensors that mean nothing without the rows."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where one tool puts the tensors of a layer: endings after the layer's name, alternatives in order."""

    lora_A: tuple[str, ...]
    lora_B: tuple[str, ...]
    magnitude: tuple[str, ...]
    alpha: tuple[str, ...] = ()
    """A scalar tensor beside A and B; missing there, alpha is the rank."""
    transposed: bool = False
    """A is [in, rank] and B [rank, out]."""
    scale: ScaleRule = alpha_over_rank
    extras: tuple[str, ...] = ("*",)
    """Full-name globs of the other tensors that were trained."""
    kept: KeptRows | None = None
    """Frozen rows that the result depends on."""
    whole_model: bool = False
    """The file holds the base as well; elsewhere a tensor that is neither adapter nor extra is refused."""
    renames: tuple[tuple[str, str], ...] = ()
    """Beginnings of names, the tool's and transformers'."""


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
"""LLaVA's own class -> transformers' `LlavaForConditionalGeneration`."""

VLBART_TRAINED = ("*.bias", "*layer_norm.*", "*layernorm_embedding.*", "*.visual_embedding.*")
VLBART_KEPT = KeptRows(names=ALIASES, own=ADDED_ROWS, needed_by=f"{EMBEDDING}.*")
"""The last rows of the token embedding are random, and stand for picture regions."""

LAYOUTS = {
    "nvlabs": NVLABS,
    "nvlabs-llava": Layout(
        lora_A=NVLABS.lora_A, lora_B=NVLABS.lora_B, magnitude=NVLABS.magnitude, renames=LLAVA_RENAMES
    ),
    "nvlabs-vlbart": Layout(
        lora_A=("lora_A",),
        lora_B=("lora_B",),
        magnitude=("weight_m",),
        scale=always_one,
        extras=VLBART_TRAINED,
        kept=VLBART_KEPT,
        whole_model=True,
    ),
    "vl-adapter": Layout(
        lora_A=("lora_A",),
        lora_B=("lora_B",),
        magnitude=(),
        extras=VLBART_TRAINED,
        kept=VLBART_KEPT,
        whole_model=True,
    ),
    "torchtune": Layout(lora_A=("lora_a.weight",), lora_B=("lora_b.weight",), magnitude=("magnitude",)),
    "mlx": Layout(lora_A=("lora_a",), lora_B=("lora_b",), magnitude=("m",), transposed=True, scale=mlx_scale),
    "kohya": Layout(
        lora_A=("lora_down.weight",),
        lora_B=("lora_up.weight",),
        magnitude=("dora_scale",),
        alpha=("alpha",),
        extras=(),
    ),
}
"""By the name that `dora-vl convert --from` takes."""
