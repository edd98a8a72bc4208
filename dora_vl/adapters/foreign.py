"""Adapters of other tools, read into ours by the table of their layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from dora_vl.adapters.adapter import Adapter
from dora_vl.adapters.agreement import PEFT_PREFIX
from dora_vl.adapters.settings import new_config, own_recipe
from dora_vl.core.trainable import kept_rows
from dora_vl.errors import UserError

# Where each tool puts A, B and the magnitude: a table.
#
# Sources of the layouts: NVlabs/DoRA (`peft/tuners/dora.py`, `VL-T5/src/trainer_base.py`), ylsung/VL_adapter
# (`lora/layers.py`), pytorch/torchtune (`modules/peft/dora.py`), ml-explore/mlx-lm (`tuner/dora.py`), LyCORIS
# (`modules/locon.py`) and kohya-ss/sd-scripts (`networks/lora.py`).


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


# -- torchtune -----------------------------------------------------------------------------------------------

TORCHTUNE_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""torchtune's decoder layer -> transformers' (torchtune/models/convert_weights.py, `_FROM_HF`)."""

ROTARY_ORDER = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}
"""By `model_type`: whether torchtune keeps q and k rows in Meta's order, each rotary pair side by side."""


def from_torchtune(tensors: Mapping[str, Tensor], base_config: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """torchtune's dictionary under transformers' names, rows of q and k in transformers' order.

    torchtune's own export reorders B alone; a magnitude belongs to its row and moves with it.
    """
    model_type = base_config.get("model_type")
    if model_type not in ROTARY_ORDER:
        raise UserError(f"{source}: base model type {model_type!r} is not known here; {list(ROTARY_ORDER)} are")
    heads = int(base_config["num_attention_heads"])
    key_heads = int(base_config.get("num_key_value_heads") or heads)
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, leaf = _torchtune_name(key, source)
        per_row = leaf in {"lora_b.weight", "magnitude"}
        if ROTARY_ORDER[model_type] and per_row and name.endswith((".q_proj", ".k_proj")):
            tensor = _in_halves(tensor, heads if name.endswith(".q_proj") else key_heads)
        renamed[f"{name}.{leaf}"] = tensor
    return renamed


def _torchtune_name(key: str, source: str) -> tuple[str, str]:
    match = re.fullmatch(r"(?:decoder\.)?layers\.(\d+)\.([\w.]+?)\.(lora_a\.weight|lora_b\.weight|magnitude)", key)
    if match and match[2] in TORCHTUNE_MODULES:
        return f"model.layers.{match[1]}.{TORCHTUNE_MODULES[match[2]]}", match[3]
    match = re.fullmatch(r"output\.(lora_a\.weight|lora_b\.weight|magnitude)", key)
    if match:
        return "lm_head", match[1]
    raise UserError(f"{source}: {key} is no adapter tensor of a torchtune decoder; {list(TORCHTUNE_MODULES)} are read")


def _in_halves(rows: Tensor, heads: int) -> Tensor:
    """Each head's rows from (even, odd, even, odd...) to all even ones, then all odd ones."""
    per_head = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return per_head.transpose(1, 2).reshape(rows.shape)


# -- kohya and LyCORIS ---------------------------------------------------------------------------------------

KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te_", "lora_transformer_", "lycoris_")


def from_kohya(tensors: Mapping[str, Tensor], module_names: Iterable[str], source: str) -> dict[str, Tensor]:
    """kohya's dictionary under the base's names: its names have underscores for dots, so the base must resolve them."""
    by_flat_name: dict[str, list[str]] = {}
    for name in module_names:
        by_flat_name.setdefault(name.replace(".", "_"), []).append(name)
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        flat, _, leaf = key.partition(".")
        prefix = next((p for p in KOHYA_PREFIXES if flat.startswith(p)), "")
        found = by_flat_name.get(flat.removeprefix(prefix), [])
        if len(found) != 1:
            raise UserError(f"{source}: {flat} names {len(found)} layers of the base {found[:2]}; wrong --base?")
        renamed[f"{found[0]}.{leaf}"] = tensor
    return renamed


# -- VL-Adapter ----------------------------------------------------------------------------------------------


def from_vl_adapter(tensors: Mapping[str, Tensor], task: str | None, source: str) -> dict[str, Tensor]:
    """VL-Adapter's dictionary with one task's `lora_As.<task>`, `lora_Bs.<task>` as `lora_A`, `lora_B`.

    With `--use_single_lora` all tasks alias one tensor and `task` can be None.
    """
    per_task: dict[str, dict[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])s\.(\w+)", key)
        if match:
            per_task.setdefault(match[3], {})[f"{match[1]}.lora_{match[2]}"] = tensor
        else:
            plain[key] = tensor
    if task is None and per_task:
        first = next(iter(per_task.values()))
        if not all(_same(first, other) for other in per_task.values()):
            raise UserError(f"{source}: tasks {sorted(per_task)} have adapters of their own; choose one with --task")
        task = next(iter(per_task))
    if task is not None and task not in per_task:
        raise UserError(f"{source}: no adapter for task {task!r}; there are {sorted(per_task)}")
    return {**plain, **(per_task[task] if task is not None else {})}


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def split_layers(
    tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapted layer by what they are, and all the others."""
    endings = {
        **{ending: "A" for ending in layout.lora_A},
        **{ending: "B" for ending in layout.lora_B},
        **{ending: "magnitude" for ending in layout.magnitude},
        **{ending: "alpha" for ending in layout.alpha},
    }
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("module.").removeprefix(PEFT_PREFIX)
        ending = next((e for e in endings if name.endswith(f".{e}")), None)
        if ending is None:
            others[name] = tensor
        else:
            layers.setdefault(name.removesuffix(f".{ending}"), {})[endings[ending]] = tensor
    return layers, others


def to_adapter(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    *,
    config: Mapping[str, Any],
    alpha: float | None = None,
    renames: tuple[tuple[str, str], ...] = (),
    base_model: str = "",
    source: str = "adapter",
) -> Adapter:
    """Turns one tool's dictionary into an adapter under PEFT's keys."""
    found, others = split_layers(tensors, layout)
    layers = {_renamed(name, (*layout.renames, *renames)): layer for name, layer in found.items()}
    if not layers:
        raise UserError(f"{source}: no key ends in {', '.join(layout.lora_A)}; is it another format (--from)?")
    _check_layers(layers, source)
    own, scales, input_axis = _convert_layers(layers, layout, config=config, alpha=alpha, source=source)
    ranks = {name: len(own[f"{PEFT_PREFIX}{name}.lora_A.weight"]) for name in scales}
    extras = _trained_extras(others, layout, renames, source)
    new = new_config(
        ranks,
        scales,
        lora_dropout=float(config.get("lora_dropout", 0.0)),
        base_model_name_or_path=base_model,
        modules_to_save=sorted({name.rpartition(".")[0] for name in extras if name.endswith(".weight")}) or None,
        use_dora=bool(ranks) and any("magnitude" in layer for layer in layers.values()),
    )
    own.update({f"{PEFT_PREFIX}{name}": tensor for name, tensor in extras.items()})
    kept = [layout.kept.own] if layout.kept is not None and layout.kept.own in extras else []
    alone = layers.keys() - ranks.keys()
    recipe = own_recipe(new, extras, kept, alone) if extras or alone else {}
    return Adapter(own, new, recipe, source, input_axis)


def _convert_layers(
    layers: Mapping[str, Mapping[str, Tensor]],
    layout: Layout,
    *,
    config: Mapping[str, Any],
    alpha: float | None,
    source: str,
) -> tuple[dict[str, Tensor], dict[str, float], frozenset[str]]:
    """All layers' tensors under PEFT's keys, each low-rank pair's scale, and where the norm was an input's."""
    own: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    input_axis: set[str] = set()
    for name, layer in layers.items():
        converted, axis = _own_tensors(layer, layout, f"{source}: {name}")
        own.update({f"{PEFT_PREFIX}{name}.{leaf}": tensor for leaf, tensor in converted.items()})
        input_axis.update({name} if axis == "input" else ())
        if "A" in layer:
            scales[name] = _scale(layer, len(converted["lora_A.weight"]), layout, config, alpha, source)
    return own, scales, frozenset(input_axis)


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _check_layers(layers: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    half = sorted(name for name, layer in layers.items() if ("A" in layer) != ("B" in layer))
    if half:
        raise UserError(f"{source}: {len(half)} layers have one of A and B without the other, first {half[0]}")
    bare = sorted(name for name, layer in layers.items() if "magnitude" not in layer)
    if bare and len(bare) < len(layers):
        raise UserError(
            f"{source}: {len(bare)} of {len(layers)} layers have no magnitude, first {bare[0]}; LLaVA's own script "
            "puts them into non_lora_trainables.bin, give the folder that holds both files"
        )


def _own_tensors(layer: Mapping[str, Tensor], layout: Layout, where: str) -> tuple[dict[str, Tensor], str]:
    """A, B and magnitude of one layer under PEFT's leaves and in PEFT's shapes, and the magnitude's axis."""
    a, b, magnitude = layer.get("A"), layer.get("B"), layer.get("magnitude")
    if layout.transposed and a is not None and b is not None:
        a, b = a.t().contiguous(), b.t().contiguous()
    own: dict[str, Tensor] = {}
    if a is not None and b is not None:
        own = {"lora_A.weight": a, "lora_B.weight": b}
    if magnitude is None:
        return own, "output"
    rows = magnitude.numel() if b is None else len(b)
    columns = -1 if a is None else a.shape[1]
    axis = _magnitude_axis(magnitude, rows, columns, where)
    if axis == "input" and a is not None and a.ndim > 2:
        raise UserError(f"{where}: a convolution's magnitude per input channel is not read; train with wd_on_output")
    kernel_axes = 0 if a is None or axis == "input" else a.ndim - 2
    own["lora_magnitude_vector"] = magnitude.reshape(1, -1, *[1] * kernel_axes) if kernel_axes else magnitude.flatten()
    return own, axis


def _magnitude_axis(magnitude: Tensor, rows: int, columns: int, where: str) -> str:
    """Which way the norm was taken, from the shape: [out, 1...] or [out] is a row's, [1, in...] a column's."""
    if magnitude.numel() == rows and magnitude.shape[0] == rows:
        return "output"
    if magnitude.numel() == columns and magnitude.shape[0] == 1:
        return "input"
    raise UserError(
        f"{where}: magnitude {list(magnitude.shape)} fits neither {rows} output rows nor {columns} input columns"
    )


def _scale(
    layer: Mapping[str, Tensor],
    rank: int,
    layout: Layout,
    config: Mapping[str, Any],
    alpha: float | None,
    source: str,
) -> float:
    if alpha is not None:
        return alpha / rank
    if layout.alpha:
        return float(layer["alpha"]) / rank if "alpha" in layer else 1.0
    stated = layout.scale(config, rank)
    if stated is None:
        raise UserError(f"{source}: nothing states the scale (no adapter_config.json beside it?); add --alpha ALPHA")
    return stated


def _trained_extras(
    others: Mapping[str, Tensor], layout: Layout, renames: tuple[tuple[str, str], ...], source: str
) -> dict[str, Tensor]:
    aliases = () if layout.kept is None else layout.kept.names
    extras = {name: one for name, one in others.items() if _matches(name, layout.extras) and name not in aliases}
    strangers = sorted(set(others) - set(extras))
    if strangers and not layout.whole_model:
        raise UserError(
            f"{source}: {len(strangers)} tensors are no LoRA or DoRA factor, first {strangers[:3]}; this converter "
            "would lose them (LoHa, LoKr, Tucker factors and trained norms are not read)"
        )
    trained = {_renamed(name, (*layout.renames, *renames)): tensor for name, tensor in extras.items()}
    return {**trained, **_rows_kept(others, trained, layout.kept, source)}


def _rows_kept(
    others: Mapping[str, Tensor], trained: Mapping[str, Tensor], kept: KeptRows | None, source: str
) -> dict[str, Tensor]:
    """The rows of a layout that keeps some, as tensors of their own: the whole one is the base's, and large."""
    if kept is None:
        return {}
    found = {name: kept_rows(kept.own, others[name]).clone() for name in kept.names if name in others}
    if not found and any(fnmatchcase(name, kept.needed_by) for name in trained):
        raise UserError(
            f"{source}: none of {', '.join(kept.names)} is there, whose last rows the pictures' tokens need"
        )
    first = next(iter(found), "")
    if other := next((name for name, rows in found.items() if not torch.equal(rows, found[first])), None):
        raise UserError(f"{source}: the last rows of {first} and of {other} differ; they are one tensor in a VL-BART")
    return {kept.own: found[first]} if found else {}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
