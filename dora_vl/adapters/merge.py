"""Merged weights as a plain model folder, streamed: one tensor is in memory at a time, whatever the model's size."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter, ExpertFactors, Factors, read_adapter, refuse_other_base
from dora_vl.adapters.agreement import refuse_other_copy, untied
from dora_vl.adapters.base_weights import (
    SINGLE_FILE,
    STEMS,
    BaseWeights,
    ExpertPiece,
    StoredTensor,
    index_file,
    single_file,
    stem_in,
)
from dora_vl.adapters.files import CONFIG_FILE as ADAPTER_CONFIG_FILE
from dora_vl.adapters.files import (
    DTYPES,
    SafetensorsStream,
    byte_size,
    complete_checkpoints,
    read_json,
    refuse_to_replace,
    step_of,
    write_json,
    written_whole,
)
from dora_vl.adapters.folder import INNER
from dora_vl.core import functional
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError, shown_names

# A base's tensors with an adapter folded in, one in memory at a time; and whether the two belong together.


class MergedWeights:
    """Base + adapter, read tensor by tensor; every product is computed in float32."""

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
    """
    chosen = adapter.factors if chosen is None else chosen
    _refuse_tied_or_twice(base, adapter, chosen)
    stored = {name: base.tensors.get(f"{name}.weight") for name in chosen}
    factors = {
        name: own if (weight := stored[name]) is None
        else own.on_weight(weight.shape, transposed=name in base.transposed_layers)
        for name, own in chosen.items()
    }  # fmt: skip
    _check_fit(base, adapter, factors, added)
    for name, copy in adapter.copies.items():
        refuse_other_copy(adapter.source, name, copy, base.read(name))
    return factors


def _refuse_tied_or_twice(base: BaseWeights, adapter: Adapter, factors: Mapping[str, Factors]) -> None:
    """An adapted layer changes for itself alone, and so does what PEFT trained whole; a run's own part for all."""
    changes = dict.fromkeys((f"{name}.weight" for name in factors), "adapts")
    if not adapter.recipe.get("adapter"):
        changes |= dict.fromkeys(adapter.extras, "trained")
    for name, change in changes.items():
        if others := base.tied_to(name):
            raise untied(adapter.source, name, others, change)
    changed = Counter([f"{name}.weight" for name in factors])
    changed.update([*adapter.experts, *(split_rows(name)[0] for name in adapter.extras)])
    if twice := [name for name, times in changed.items() if times > 1]:
        raise UserError(f"{adapter.source} changes {shown_names(twice)} twice, by A and B and by a tensor of its own")


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
            raise UserError(f"{adapter.source}: {name} is {list(tensor.shape)}, the base's {list(needed)}")


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


SHARD_BYTES = 5_000_000_000
"""Of one output file; transformers' own default."""

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"})
MANIFEST = "dora_vl_merge.json"
"""Names what a merge wrote, so that a later one knows that it may replace the folder."""
CERTIFICATES = ("certificate.json", "certificate.md")
"""What `--check` writes beside the weights."""
NOT_COPIED = frozenset({"pytorch_model.bin.index.json", MANIFEST, *CERTIFICATES, *map(index_file, STEMS)})


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    layers: int
    replaced: int
    """Other tensors taken from the adapter: projector, biases, norms, embeddings, heads of closed answer lists."""
    files: int
    bytes: int


def merge_to_folder(
    adapter: Adapter,
    base_folder: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    open_base: Callable[[Path], BaseWeights] = BaseWeights,
) -> Merged:
    """Writes `base` with `adapter` folded in as a plain folder that transformers opens.

    Every product is computed in float32 and rounded once, to `dtype` or the base's own. Configuration, tokenizer
    and processor files are copied; heads of closed answer lists that the base has not are added, and their lists to
    the configuration. Tensors have the names of published folders, whatever the base's files call them (`hub_names`).
    The folder appears under its name when it is whole.

    Args:
        dtype: of the result; None keeps each tensor's own.
        open_base: gives the values to merge into, where they are not the stored ones.
    """
    refuse_target(target, base_folder)
    with open_base(base_folder) as base:
        weights = MergedWeights(base, adapter)
        with written_whole(target) as staging:
            _copy_other_files(base_folder, staging, dtype, adapter.recipe.get(CLOSED_ANSWERS))
            shards = _plan(weights, dtype, shard_bytes)
            total = _write_shards(staging, shards, weights)
            names = sorted(path.name for path in staging.iterdir())
            write_json(staging / MANIFEST, {"written_by": "dora-vl merge", "files": names})
    return Merged(len(weights.factors) + len(adapter.experts), len(adapter.extras), len(shards), total)


def refuse_target(target: Path, base_folder: Path) -> None:
    """Raises a `UserError` where something is there already that is no earlier merge's result, or that is the base."""
    if target.resolve() == base_folder.resolve():
        raise UserError(f"{target} is the base itself; name another folder for the result")
    manifest = target / MANIFEST
    written = [MANIFEST, *CERTIFICATES, *read_json(manifest).get("files", ())] if manifest.is_file() else ()
    refuse_to_replace(target, written)


def _copy_other_files(
    base_folder: Path, staging: Path, dtype: torch.dtype | None, closed_answers: Mapping[str, list[str]] | None
) -> None:
    for path in sorted(base_folder.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in NOT_COPIED:
            shutil.copyfile(path, staging / path.name)
    config = staging / "config.json"
    if (dtype is not None or closed_answers) and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        if dtype is not None:
            _state_dtype(content, str(dtype).removeprefix("torch."))
        if closed_answers:
            content[CLOSED_ANSWERS] = {**content.get(CLOSED_ANSWERS, {}), **closed_answers}
        write_json(config, content)


def _state_dtype(config: dict[str, object], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None:
            config[key] = dtype
    for part in config.values():
        if isinstance(part, dict):
            _state_dtype(part, dtype)


class _Entry(NamedTuple):
    """One tensor of the result; `key` is its name in the result's files."""

    stored: StoredTensor
    key: str
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return byte_size(self.stored.shape, self.dtype)


Shards = Mapping[str, list[_Entry]]
"""What is written into which file."""


def _plan(weights: MergedWeights, dtype: torch.dtype | None, shard_bytes: int) -> Shards:
    """The output files and what goes where, known from the base's headers and what is added."""
    base, filled = weights.base, 0
    groups: list[list[_Entry]] = [[]]
    for stored in weights.stored:
        if stored.dtype not in DTYPES:
            raise UserError(f"{base.folder}: {stored.key} is stored as {stored.dtype}, which is not read")
        own = DTYPES[stored.dtype]
        kept = own if dtype is None or not own.is_floating_point else dtype
        entry = _Entry(stored, base.hub_keys.get(stored.key, stored.key), kept)
        if groups[-1] and filled + entry.bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.bytes
    if len(groups) == 1:
        return {single_file(base.stem): groups[0]}
    return {f"{base.stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_shards(staging: Path, shards: Shards, weights: MergedWeights) -> int:
    stem, total = weights.base.stem, sum(entry.bytes for entries in shards.values() for entry in entries)
    with tqdm(total=total, desc="merging", unit="B", unit_scale=True, disable=None) as progress:
        for file, entries in shards.items():
            announced = {entry.key: (entry.stored.shape, entry.dtype) for entry in entries}
            with SafetensorsStream(staging / file, announced) as stream:
                for entry in entries:
                    stream.write(entry.key, weights.read(entry.stored).to(entry.dtype))
                    progress.update(entry.bytes)
    if list(shards) != [single_file(stem)]:
        weight_map = dict(sorted((entry.key, file) for file, entries in shards.items() for entry in entries))
        write_json(staging / index_file(stem), {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


# A tuned model as the matrices it changes: a plain model folder, an adapter folder, or a run's checkpoints of either.
#
# Nothing is merged on disk: a layer's weight after training comes as blocks of rows beside the base's rows.


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
    """What a path means: every complete checkpoint of a run, oldest first, else the one folder."""
    checkpoints = complete_checkpoints(path)
    if checkpoints:
        return tuple(Saved(_weights_folder(checkpoint), step_of(checkpoint)) for checkpoint in checkpoints)
    return (Saved(_weights_folder(path)),)


def _weights_folder(folder: Path) -> Path:
    for candidate in (folder, folder / INNER):
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
        """(before, after) of a weight as [out, in], a block of rows at a time; in float64 where it is computed."""
        before = self.base.weight_of(layer)
        found = self.factors.get(layer)
        if found is not None:
            return _merged_blocks(found.as_matrix(before), found)
        after = self.read(layer)
        if after.shape != before.shape:
            raise UserError(
                f"{self.source}: {layer} is {list(after.shape)}, the base's {list(before.shape)}; is it the right base?"
            )
        transposed = layer in self.base.transposed_layers
        plain = Factors(lora_A=None, lora_B=None, magnitude=None, scale=1.0, transposed=transposed)
        rows = (plain.as_matrix(weight).split(functional.NORM_CHUNK_ROWS) for weight in (before, after))
        return iter(zip(*rows, strict=True))


def _merged_blocks(matrix: Float[Tensor, "out in_"], found: Factors) -> Blocks:
    """Rows of W and of W'; each row's norm is its own, so that no block needs another."""
    for start in range(0, len(matrix), functional.NORM_CHUNK_ROWS):
        part = slice(start, start + functional.NORM_CHUNK_ROWS)
        before = matrix[part].double()
        b, m = (None if tensor is None else tensor[part] for tensor in (found.lora_B, found.magnitude))
        yield before, functional.merged_weight(before, found.lora_A, b, m, found.scale)


@contextmanager
def opened(saved: Saved, base: BaseWeights) -> Iterator[TunedWeights]:
    """Opens one tuned model beside its base."""
    if saved.is_adapter:
        adapter = read_adapter(saved.folder)
        factors = planned_factors(base, adapter)
        extras = {name.removesuffix(".weight") for name in adapter.extras if name.endswith(".weight")}
        whole = frozenset(name for name in matrices_of(base) if name in extras)
        read: Callable[[str], Tensor] = lambda layer: adapter.extras[f"{layer}.weight"]  # noqa: E731
        yield TunedWeights(adapter.source, base, adapter.method, whole, read, factors)
        return
    with BaseWeights(saved.folder) as model:
        whole = frozenset(name for name in matrices_of(model) if f"{name}.weight" in base.tensors)
        if not whole:
            raise UserError(
                f"{saved.folder} and {base.folder} have no matrix in common, e.g. {sorted(model.tensors)[:2]} and "
                f"{sorted(base.tensors)[:2]}; is it the right base?"
            )
        yield TunedWeights(str(saved.folder), base, "model", whole, model.weight_of)


def refuse_saved_on_another_base(saved: Saved, base: BaseWeights) -> None:
    """Raises a `UserError` where an adapter holds its base's content hash, and it is not this one's."""
    if saved.is_adapter:
        refuse_other_base(read_adapter(saved.folder).recipe, base.folder, str(saved.folder))


def matrices_of(weights: BaseWeights) -> list[str]:
    """Layers with a weight of two axes or more, stored in a dtype that training uses."""
    return [
        name
        for name in weights.module_names()
        for stored in [weights.tensors[f"{name}.weight"]]
        if len(stored.shape) >= 2 and stored.dtype in WIDE_DTYPES
    ]
