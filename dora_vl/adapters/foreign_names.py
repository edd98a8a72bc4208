"""Names of layers in tools that do not use transformers' own: torchtune's, kohya's, VL-Adapter's tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dora_vl.errors import UserError

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

    Raises:
        UserError: a layer or a model type that the table does not hold.
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
    """kohya's dictionary under the base's names: its names have underscores for dots, so the base must resolve them.

    Raises:
        UserError: a layer that is not in the base, or two layers of the base that write alike.
    """
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

    Raises:
        UserError: tasks that differ and no task given, or an unknown one.
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
