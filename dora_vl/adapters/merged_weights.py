"""A base's tensors with an adapter folded in, one in memory at a time; and whether the two belong together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter
from dora_vl.adapters.agreement import refuse_other_copy, untied
from dora_vl.adapters.base_weights import BaseWeights, ExpertPiece, StoredTensor
from dora_vl.adapters.factors import ExpertFactors, Factors
from dora_vl.adapters.tensor_files import DTYPES
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError, shown_names


class MergedWeights:
    """Base + adapter, read tensor by tensor; every product is computed in float32.

    Raises:
        UserError: a layer or an extra that the base lacks, a shape that does not fit, or a quantised base.
    """

    def __init__(self, base: BaseWeights, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.factors = planned_factors(base, adapter, adapter.matrix_factors, added=adapter.answer_heads)
        check_experts(base, adapter)

    @cached_property
    def stored(self) -> list[StoredTensor]:
        """Everything there is to read: the base's tensors in its files' order, and heads that the base has not."""
        return [*self.base.tensors.values(), *_added_heads(self.base, self.adapter)]

    def read(self, stored: StoredTensor) -> Tensor:
        """One tensor, in float32 where the adapter changes it, else as it is stored."""
        base, extras, experts = self.base, self.adapter.extras, self.adapter.experts
        layer, piece = stored.name.removesuffix(".weight"), base.expert_pieces.get(stored.key)
        if piece is not None and piece.layer in experts:
            return _merged_experts(experts[piece.layer], piece, base.read(stored.name))
        if stored.name in extras:
            return extras[stored.name]
        if stored.name in self._partial:
            whole, name = base.read(stored.name).clone(), self._partial[stored.name]
            whole[split_rows(name)[1]] = extras[name].to(whole.dtype)
            return whole
        if stored.name.endswith(".weight") and layer in self.factors:
            return self.factors[layer].merged(base.read(stored.name))
        return base.read(stored.name)

    @cached_property
    def _partial(self) -> dict[str, str]:
        """Tensors of which some rows alone are the adapter's -> the name of these."""
        extras = self.adapter.extras
        return {split_rows(name)[0]: name for name in extras if split_rows(name)[0] != name}


def planned_factors(
    base: BaseWeights,
    adapter: Adapter,
    chosen: Mapping[str, Factors] | None = None,
    *,
    added: frozenset[str] = frozenset(),
) -> dict[str, Factors]:
    """The adapter's factors, or the chosen ones, turned the way that each layer's class stores its weight.

    Whatever merges, exports, combines or measures begins here: each tensor of the base is changed by one thing, under
    the one name that it has.

    Args:
        added: extras that the base need not have.

    Raises:
        UserError: a layer or an extra without a place in the base, or of another shape; a tensor that is changed twice,
            or that is tied to one that must not change; a copy of a weight that is not the base's.
    """
    chosen = adapter.factors if chosen is None else chosen
    _refuse_tied(base, adapter, chosen)
    _refuse_twice(adapter, chosen)
    factors = {name: _on_base(base, name, found) for name, found in chosen.items()}
    _check_fit(base, adapter, factors, added)
    for name, copy in adapter.copies.items():
        refuse_other_copy(adapter.source, name, copy, base.read(name))
    return factors


def _on_base(base: BaseWeights, name: str, factors: Factors) -> Factors:
    stored = base.tensors.get(f"{name}.weight")
    transposed = name in base.transposed_layers
    return factors if stored is None else factors.on_weight(stored.shape, transposed=transposed)


def _refuse_tied(base: BaseWeights, adapter: Adapter, factors: Mapping[str, Factors]) -> None:
    """An adapted layer changes for itself alone, and so does what PEFT trained whole; a run's own part for all."""
    changes = dict.fromkeys((f"{name}.weight" for name in factors), "adapts")
    if not adapter.recipe.get("adapter"):
        changes |= dict.fromkeys(adapter.extras, "trained")
    for name, change in changes.items():
        if others := base.tied_to(name):
            raise untied(adapter.source, name, others, change)


def _refuse_twice(adapter: Adapter, factors: Mapping[str, Factors]) -> None:
    changed = Counter([f"{name}.weight" for name in factors])
    changed.update([*adapter.experts, *(split_rows(name)[0] for name in adapter.extras)])
    if twice := [name for name, times in changed.items() if times > 1]:
        raise UserError(
            f"{adapter.source} changes {shown_names(twice)} twice, by A and B and by a tensor of its own; take one of "
            "them out of the file"
        )


def _check_fit(base: BaseWeights, adapter: Adapter, factors: Mapping[str, Factors], added: frozenset[str]) -> None:
    missing = [f"{name}.weight" for name in factors if f"{name}.weight" not in base.tensors]
    missing += [name for name in adapter.extras if split_rows(name)[0] not in base.tensors and name not in added]
    if missing and adapter.answer_heads.issuperset(missing):
        raise UserError(
            f"{adapter.source} answers {', '.join(adapter.recipe[CLOSED_ANSWERS])} from a closed list, whose head this "
            "cannot take along; dora-vl merge --adapter alone, with weight 1, writes it into the merged folder"
        )
    if missing:
        raise UserError(
            f"{adapter.source} does not fit {base.folder}: {len(missing)} tensors are not in the base, first "
            f"{missing[:3]}; is it the right base?"
        )
    for name, found in factors.items():
        weight = base.weight_of(name)
        if not found.shape_fits(weight):
            a = None if found.lora_A is None else list(found.lora_A.shape)
            b = None if found.lora_B is None else list(found.lora_B.shape)
            raise UserError(f"{adapter.source}: {name} has A {a} and B {b}, the base's weight is {list(weight.shape)}")
    for name, tensor in adapter.extras.items():
        whole, rows = split_rows(name)
        if whole not in base.tensors:
            continue
        shape = base.tensors[whole].shape
        needed = (len(range(shape[0])[rows]), *shape[1:]) if rows != slice(None) else shape
        if tuple(tensor.shape) != needed:
            raise UserError(f"{adapter.source}: {name} is {list(tensor.shape)}, the base's {needed}")


def check_experts(base: BaseWeights, adapter: Adapter) -> None:
    """Raises a `UserError` unless every row of the adapted experts has its place in the base."""
    stored = {one.key: one for one in base.tensors.values()}
    held: dict[str, int] = {}
    for key, piece in base.expert_pieces.items():
        found = adapter.experts.get(piece.layer)
        if found is None:
            continue
        experts, rows = found.experts_and_rows
        shape = stored[key].shape
        out, width = reversed(shape[-2:]) if piece.in_out else shape[-2:]
        fits = out * piece.parts == rows and (found.lora_A is None or found.lora_A.shape[-1] == width)
        if not fits or (piece.expert is None and shape[0] != experts):
            raise UserError(f"{adapter.source}: {piece.layer} does not fit {base.folder}'s {key} {list(shape)}")
        held[piece.layer] = held.get(piece.layer, 0) + out * (experts if piece.expert is None else 1)
    for name, found in adapter.experts.items():
        experts, rows = found.experts_and_rows
        if held.get(name) != experts * rows:
            raise UserError(
                f"{adapter.source}: {base.folder} holds {held.get(name, 0):,} of the {experts * rows:,} rows of "
                f"{name}; is it the right base?"
            )


def _merged_experts(found: ExpertFactors, piece: ExpertPiece, stored: Tensor) -> Tensor:
    """A stored tensor of experts' weights with the adapter folded in, in the layout that it has."""
    numbers = range(len(stored)) if piece.expert is None else (piece.expert,)
    weights = stored if piece.expert is None else stored.unsqueeze(0)
    merged = [
        replace(found.of(number, piece.part, piece.parts), transposed=piece.in_out).merged(weight)
        for number, weight in zip(numbers, weights, strict=True)
    ]
    return torch.stack(merged) if piece.expert is None else merged[0]


def _added_heads(base: BaseWeights, adapter: Adapter) -> list[StoredTensor]:
    """Heads of closed answer lists that the base has not, as if it had stored them."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    return [
        StoredTensor(name, name, "", tuple(adapter.extras[name].shape), words[adapter.extras[name].dtype])
        for name in sorted(adapter.answer_heads - set(base.tensors))
    ]
