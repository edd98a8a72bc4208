"""A VL-BART's adapter back into the dictionary that NVlabs' DoRA or VL-Adapter's LoRA saves, with the base's weights.

The originals save a whole model. What the adapter does not hold comes from its base; beside each adapted weight stand
the factors, and the token embedding has all five of its names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.foreign import ALIASES, EMBEDDING, ORIGINAL_FORMS
from dora_vl.adapters.merge import planned_factors
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError


def original_dictionary(
    adapter: Adapter, base: BaseWeights, form: str, *, tasks: Sequence[str] = (), alpha: float | None = None
) -> tuple[dict[str, Tensor], int, float]:
    """The adapter on its base as one of `ORIGINAL_FORMS`, every floating-point tensor in float32; its rank and alpha.

    A, B, magnitudes and weights are copied bit by bit. Only where a layer's scale is not the form's (1 for NVlabs,
    alpha / rank for VL-Adapter) B takes the difference, rounded once. VL-Adapter's configuration has to state the
    alpha, since the file does not; None takes the adapter's own. All its `tasks` have this one adapter, as with
    `--use_single_lora`.
    """
    _check_form(adapter, base, form, tasks)
    factors, is_dora = planned_factors(base, adapter), form == "nvlabs-vlbart"
    rank = round(_one_of({name: float(layer.rank) for name, layer in factors.items()}, f"{adapter.source}: rank"))
    if is_dora:
        alpha = float(rank)  # the form's scale is 1
    elif alpha is None:
        alphas = {name: layer.scale * layer.rank for name, layer in factors.items()}
        alpha = _one_of(alphas, f"{adapter.source}: alpha", ": give it as --alpha, and B takes the difference")
    state = _whole_state(adapter, base)
    for name, layer in factors.items():
        assert layer.lora_A is not None  # the method has factors
        assert layer.lora_B is not None
        weight, a, b = state.pop(f"{name}.weight"), layer.lora_A.float(), layer.lora_B.float()
        if layer.scale != alpha / rank:
            b = (layer.lora_B.double() * (layer.scale / (alpha / rank))).float()
        if is_dora:
            assert layer.magnitude is not None
            leaves = {"weight_v": weight, "weight_m": layer.magnitude.float().unsqueeze(1), "lora_A": a, "lora_B": b}
        else:
            factors_of = {f"lora_{side}s.{task}": part for task in tasks for side, part in (("A", a), ("B", b))}
            leaves = {"weight": weight, **factors_of}
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return state, rank, alpha


def _check_form(adapter: Adapter, base: BaseWeights, form: str, tasks: Sequence[str]) -> None:
    if f"{EMBEDDING}.feat_embedding.0.weight" not in base.tensors:
        raise UserError(f"{base.folder} is no VL-BART: it holds no {EMBEDDING}.feat_embedding.0.weight")
    if adapter.answer_heads or base.config.get(CLOSED_ANSWERS):
        raise UserError(f"{form} has no place for the heads of closed answer lists; dora-vl merge writes them")
    if adapter.method != ORIGINAL_FORMS[form]:
        raise UserError(
            f"{adapter.source}: method is {adapter.method!r}; {form} holds the factors of {ORIGINAL_FORMS[form]} alone"
        )
    is_dora = form == "nvlabs-vlbart"
    odd = [name for name, layer in adapter.factors.items() if (layer.magnitude is None) == is_dora or not layer.rank]
    if odd or not adapter.factors:
        raise UserError(f"{adapter.source}: {len(odd)} layers are no {adapter.method} with A and B, first {odd[:1]}")
    if not is_dora and (not tasks or not all(task.isidentifier() for task in tasks)):
        raise UserError("--as vl-adapter needs --task, VL-Adapter's --tasks: such as --task vqa,gqa,nlvr,caption")


def _one_of(by_layer: Mapping[str, float], what: str, advice: str = "") -> float:
    """The one value that all layers have."""
    layers = {value: name for name, value in by_layer.items()}
    if len(layers) > 1:
        (first, one), (second, other) = list(layers.items())[:2]
        raise UserError(f"{what} is {first:g} in {one} and {second:g} in {other}; the original has one{advice}")
    return next(iter(layers))


def _whole_state(adapter: Adapter, base: BaseWeights) -> dict[str, Tensor]:
    """The base's weights with the adapter's tensors beside its layers, the token embedding under all its names."""
    state = {name: _wide(base.read(name)) for name in base.tensors}
    for name, tensor in adapter.extras.items():
        whole, rows = split_rows(name)
        if whole == name:
            state[name] = _wide(tensor)
        else:
            state[whole] = state[whole].clone()
            state[whole][rows] = _wide(tensor)
    return {**state, **dict.fromkeys(ALIASES, next(state[name] for name in ALIASES if name in state))}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def write_original(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes the `.pth` under a temporary name and renames it."""
    refuse_to_overwrite(file)
    staging = file.with_name(f".{file.name}.writing-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(tensors), staging)
        staging.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error})") from error
    finally:
        staging.unlink(missing_ok=True)


def refuse_to_overwrite(file: Path) -> None:
    """Raises a `UserError` where the file, or a folder, is there already."""
    if file.exists():
        raise UserError(f"--to {file} is there already; name another file")
