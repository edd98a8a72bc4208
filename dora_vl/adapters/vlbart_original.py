"""A VL-BART's adapter back into the dictionary that NVlabs' DoRA or VL-Adapter's LoRA saves, with the base's weights.

The originals save a whole model. What the adapter does not hold comes from its base; beside each adapted weight stand
the factors, and the token embedding has all five of its names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter, Factors
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.foreign import ALIASES, EMBEDDING
from dora_vl.adapters.merge import planned_factors
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError

ORIGINAL_FORMS = {"nvlabs-vlbart": "dora", "vl-adapter": "lora"}
"""By the name that `--from` and `--as` take: the method whose factors it can hold."""
NVLABS_SCALE = 1.0


@dataclass(frozen=True)
class OriginalDictionary:
    """What the original's `torch.save(model.state_dict())` writes."""

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    """Of a LoRA: what `lora_alpha` of VL-Adapter's configuration has to be, since the file does not say it."""


def original_dictionary(
    adapter: Adapter, base: BaseWeights, form: str, *, tasks: Sequence[str] = (), alpha: float | None = None
) -> OriginalDictionary:
    """The adapter on its base as one of `ORIGINAL_FORMS`, every floating-point tensor in float32.

    A, B, magnitudes and weights are copied bit by bit. Only where a layer's scale is not the form's (1 for NVlabs,
    alpha / rank for VL-Adapter) B takes the difference, rounded once.

    Args:
        tasks: VL-Adapter's `--tasks`; all have this one adapter, as with `--use_single_lora`.
        alpha: VL-Adapter's `lora_alpha`; None: the adapter's own.
    """
    if f"{EMBEDDING}.feat_embedding.0.weight" not in base.tensors:
        raise UserError(f"{base.folder} is no VL-BART: it holds no {EMBEDDING}.feat_embedding.0.weight")
    if adapter.answer_heads or base.config.get(CLOSED_ANSWERS):
        raise UserError(f"{form} has no place for the heads of closed answer lists; dora-vl merge writes them")
    _check_method(adapter, form, tasks)
    factors = planned_factors(base, adapter)
    rank = _one_rank(adapter, factors)
    alpha = rank * NVLABS_SCALE if form == "nvlabs-vlbart" else _one_alpha(adapter, factors, alpha)
    state = _whole_state(base, adapter.extras)
    for name, found in factors.items():
        weight = state.pop(f"{name}.weight")
        assert found.lora_A is not None  # the method has factors
        a, b = found.lora_A.float(), _scaled(found, alpha / rank)
        if form == "nvlabs-vlbart":
            assert found.magnitude is not None
            leaves = {"weight_v": weight, "weight_m": found.magnitude.float().unsqueeze(1), "lora_A": a, "lora_B": b}
        else:
            leaves = {"weight": weight} | {
                f"lora_{k}s.{task}": one for task in tasks for k, one in (("A", a), ("B", b))
            }
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    return OriginalDictionary(state, rank, alpha)


def write_original(found: OriginalDictionary, file: Path) -> None:
    """Writes the `.pth` under a temporary name and renames it."""
    refuse_to_overwrite(file)
    staging = file.with_name(f".{file.name}.writing-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found.tensors, staging)
        staging.replace(file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error})") from error
    finally:
        staging.unlink(missing_ok=True)


def refuse_to_overwrite(file: Path) -> None:
    """Raises a `UserError` where the file, or a folder, is there already."""
    if file.exists():
        raise UserError(f"--to {file} is there already; name another file")


def _check_method(adapter: Adapter, form: str, tasks: Sequence[str]) -> None:
    method = ORIGINAL_FORMS[form]
    if adapter.method != method:
        raise UserError(f"{adapter.source}: method is {adapter.method!r}; {form} holds the factors of {method} alone")
    odd = [
        name for name, one in adapter.factors.items() if (one.magnitude is None) == (method == "dora") or not one.rank
    ]
    if odd or not adapter.factors:
        raise UserError(f"{adapter.source}: {len(odd)} layers are no {method} with A and B, first {odd[:1]}")
    if form == "vl-adapter" and (not tasks or not all(task.isidentifier() for task in tasks)):
        raise UserError("--as vl-adapter needs --task, VL-Adapter's --tasks: such as --task vqa,gqa,nlvr,caption")


def _one_rank(adapter: Adapter, factors: Mapping[str, Factors]) -> int:
    ranks = {found.rank: name for name, found in factors.items()}
    if len(ranks) > 1:
        (one, first), (other, second) = list(ranks.items())[:2]
        raise UserError(
            f"{adapter.source}: rank is {one} in {first} and {other} in {second}; the original has one rank"
        )
    return next(iter(ranks))


def _one_alpha(adapter: Adapter, factors: Mapping[str, Factors], given: float | None) -> float:
    alphas = {found.scale * found.rank: name for name, found in factors.items()}
    if given is not None:
        return given
    if len(alphas) > 1:
        (one, first), (other, second) = list(alphas.items())[:2]
        raise UserError(
            f"{adapter.source}: alpha is {one:g} in {first} and {other:g} in {second}; the original has one: give it "
            "as --alpha, and B takes the difference"
        )
    return next(iter(alphas))


def _scaled(found: Factors, scale: float) -> Tensor:
    assert found.lora_B is not None
    if found.scale == scale:
        return found.lora_B.float()
    return (found.lora_B.double() * (found.scale / scale)).float()


def _whole_state(base: BaseWeights, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {name: _wide(base.read(name)) for name in base.tensors}
    for name, tensor in extras.items():
        whole, rows = split_rows(name)
        if whole == name:
            state[name] = _wide(tensor)
        else:
            state[whole] = state[whole].clone()
            state[whole][rows] = _wide(tensor)
    tokens = next(state[name] for name in ALIASES if name in state)
    return {**state, **dict.fromkeys(ALIASES, tokens)}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
