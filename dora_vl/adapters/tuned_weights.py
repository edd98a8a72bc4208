"""A tuned model as the matrices it changes: a plain model folder, an adapter folder, or a run's checkpoints of either.

Nothing is merged on disk: a layer's weight after training comes as blocks of rows beside the base's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import SINGLE_FILE, BaseWeights, stem_in
from dora_vl.adapters.checkpoints import complete_checkpoints, step_of
from dora_vl.adapters.factors import Factors
from dora_vl.adapters.folder import CONFIG_FILE as ADAPTER_CONFIG_FILE
from dora_vl.adapters.merged_weights import planned_factors
from dora_vl.adapters.provenance import refuse_other_base
from dora_vl.core import functional
from dora_vl.errors import UserError

ADAPTER = "adapter"
"""Where a run, and each of its checkpoints, keeps its adapter folder."""
WIDE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
Blocks = Iterator[tuple[Float[Tensor, "rows in_"], Float[Tensor, "rows in_"]]]


@dataclass(frozen=True)
class Saved:
    """Weights that a person named, or one checkpoint of the run that they named."""

    folder: Path
    step: int | None = None
    """Of the optimizer; None for a folder that is no run."""

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter; else it is a model."""
        return (self.folder / ADAPTER_CONFIG_FILE).is_file()


def saved_in(path: Path) -> tuple[Saved, ...]:
    """What a path means: every complete checkpoint of a run, oldest first, else the one folder.

    Raises:
        UserError: there are neither weights nor checkpoints.
    """
    checkpoints = complete_checkpoints(path)
    if checkpoints:
        return tuple(Saved(_weights_folder(checkpoint), step_of(checkpoint)) for checkpoint in checkpoints)
    return (Saved(_weights_folder(path)),)


def _weights_folder(folder: Path) -> Path:
    for candidate in (folder, folder / ADAPTER):
        if (candidate / ADAPTER_CONFIG_FILE).is_file():
            return candidate
    if stem_in(folder) is not None:
        return folder
    there = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise UserError(
        f"{folder} is no model folder ({SINGLE_FILE}), adapter folder ({ADAPTER_CONFIG_FILE}) or run with complete "
        f"checkpoints: {there}"
    )


@dataclass(frozen=True)
class TunedWeights:
    """One tuned model against its base, layer by layer."""

    source: str
    base: BaseWeights
    method: str
    """`dora`, `lora`, ... for an adapter, `model` for a folder of whole weights."""
    whole: frozenset[str]
    """Layers whose weight is stored as it is."""
    read: Callable[[str], Tensor]
    """The stored weight of one of `whole`."""
    factors: Mapping[str, Factors] = field(default_factory=dict)
    """Adapted layers."""

    def blocks(self, layer: str) -> Blocks:
        """(before, after) of a layer's weight as [out, in], in float64 where it is computed, a block of rows at a time.

        Raises:
            UserError: the shapes differ, or the base is quantised.
        """
        before = self.base.weight_of(layer)
        found = self.factors.get(layer)
        if found is not None:
            return _merged_blocks(found.as_matrix(before), found)
        after = self.read(layer)
        if after.shape != before.shape:
            raise UserError(
                f"{self.source}: {layer} is {list(after.shape)}, the base's {list(before.shape)}; is it the right base?"
            )
        plain = Factors(lora_A=None, lora_B=None, magnitude=None, scale=1.0, transposed=self._is_transposed(layer))
        rows = (plain.as_matrix(weight).split(functional.NORM_CHUNK_ROWS) for weight in (before, after))
        return iter(zip(*rows, strict=True))

    def _is_transposed(self, layer: str) -> bool:
        return layer in self.base.transposed_layers


def _merged_blocks(matrix: Float[Tensor, "out in_"], found: Factors) -> Blocks:
    """Rows of W and of W'; each row's norm is its own, so that no block needs another."""
    for start in range(0, len(matrix), functional.NORM_CHUNK_ROWS):
        part = slice(start, start + functional.NORM_CHUNK_ROWS)
        before = matrix[part].double()
        b, m = (None if tensor is None else tensor[part] for tensor in (found.lora_B, found.magnitude))
        yield before, functional.merged_weight(before, found.lora_A, b, m, found.scale)


@contextmanager
def opened(saved: Saved, base: BaseWeights) -> Iterator[TunedWeights]:
    """Opens one tuned model beside its base.

    Raises:
        UserError: the files are broken, of another model, or hold none of the base's matrices.
    """
    with _opened_adapter(saved, base) if saved.is_adapter else _opened_model(saved, base) as tuned:
        yield tuned


def refuse_saved_on_another_base(saved: Saved, base: BaseWeights) -> None:
    """Raises a `UserError` where an adapter holds its base's content hash, and it is not this one's."""
    if saved.is_adapter:
        refuse_other_base(read_adapter(saved.folder).recipe, base.folder, str(saved.folder))


@contextmanager
def _opened_model(saved: Saved, base: BaseWeights) -> Iterator[TunedWeights]:
    with BaseWeights(saved.folder) as model:
        whole = frozenset(name for name in matrices_of(model) if f"{name}.weight" in base.tensors)
        if not whole:
            raise UserError(
                f"{saved.folder} and {base.folder} have no matrix in common, e.g. {sorted(model.tensors)[:2]} and "
                f"{sorted(base.tensors)[:2]}; is it the right base?"
            )
        yield TunedWeights(str(saved.folder), base, "model", whole, model.weight_of)


@contextmanager
def _opened_adapter(saved: Saved, base: BaseWeights) -> Iterator[TunedWeights]:
    adapter = read_adapter(saved.folder)
    factors = planned_factors(base, adapter)
    extras = {name.removesuffix(".weight") for name in adapter.extras if name.endswith(".weight")}
    whole = frozenset(name for name in matrices_of(base) if name in extras)
    yield TunedWeights(
        adapter.source, base, adapter.method, whole, lambda layer: adapter.extras[f"{layer}.weight"], factors
    )


def matrices_of(weights: BaseWeights) -> list[str]:
    """Layers with a weight of two axes or more, stored in a dtype that training uses."""
    return [
        name
        for name in weights.module_names()
        for stored in [weights.tensors[f"{name}.weight"]]
        if len(stored.shape) >= 2 and stored.dtype in WIDE_DTYPES
    ]
