"""Merged weights as a plain model folder, streamed: one tensor is in memory at a time, whatever the model's size."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter
from dora_vl.adapters.base_weights import STEMS, BaseWeights, ExpertPiece, StoredTensor, index_file, single_file
from dora_vl.adapters.checkpoints import refuse_to_replace, replace_folder
from dora_vl.adapters.factors import ExpertFactors, Factors
from dora_vl.adapters.folder import read_json
from dora_vl.adapters.tensor_files import DTYPES, SafetensorsStream, byte_size
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError

SHARD_BYTES = 5_000_000_000
"""Of one output file; transformers' own default."""

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"})
MANIFEST = "dora_vl_merge.json"
"""Names what a merge wrote, so that a later one knows that it may replace the folder."""
NOT_COPIED = frozenset({"pytorch_model.bin.index.json", MANIFEST, *map(index_file, STEMS)})


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
    and processor files are copied; heads of closed answer lists that the base has not are added, and their lists to the
    configuration. The folder appears under its name when it is whole.

    Args:
        dtype: of the result; None keeps each tensor's own.
        open_base: gives the values to merge into, where they are not the stored ones.

    Raises:
        UserError: a layer or an extra that the base lacks, a shape that does not fit, a quantised base, or a target
            that is there already and was not written by a merge. Nothing is written then.
    """
    refuse_target(target, base_folder)
    with open_base(base_folder) as base:
        factors = factors_on(base, adapter, adapter.matrix_factors)
        check_fit(base, adapter, factors, added=adapter.answer_heads)
        check_experts(base, adapter)
        staging = target.with_name(f".{target.name}.writing-{os.getpid()}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _copy_other_files(base_folder, staging, dtype, adapter.recipe.get(CLOSED_ANSWERS))
        shards = _plan(base, _added_heads(base, adapter), dtype, shard_bytes)
        for file, entries in shards.items():
            _write_shard(staging / file, entries, base, factors, adapter)
        total = _write_index(staging, shards, base.stem)
    _write_manifest(staging)
    replace_folder(staging, target)
    return Merged(len(factors) + len(adapter.experts), len(adapter.extras), len(shards), total)


def refuse_target(target: Path, base_folder: Path) -> None:
    """Raises a `UserError` where something is there already that is no earlier merge's result, or that is the base."""
    if target.resolve() == base_folder.resolve():
        raise UserError(f"{target} is the base itself; name another folder for the result")
    manifest = target / MANIFEST
    refuse_to_replace(target, [MANIFEST, *read_json(manifest).get("files", ())] if manifest.is_file() else ())


def _write_manifest(staging: Path) -> None:
    content = {"written_by": "dora-vl merge", "files": sorted(path.name for path in staging.iterdir())}
    (staging / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def factors_on(base: BaseWeights, adapter: Adapter, chosen: Mapping[str, Factors] | None = None) -> dict[str, Factors]:
    """The adapter's factors, or the chosen ones, turned the way that each layer's class stores its weight."""
    found: dict[str, Factors] = {}
    for name, factors in (adapter.factors if chosen is None else chosen).items():
        stored = base.tensors.get(f"{name}.weight")
        transposed = name in base.transposed_layers
        found[name] = factors if stored is None else factors.on_weight(stored.shape, transposed=transposed)
    return found


def check_fit(
    base: BaseWeights, adapter: Adapter, factors: Mapping[str, Factors], *, added: frozenset[str] = frozenset()
) -> None:
    """Raises a `UserError` unless every layer and extra has its place in the base, but those that are `added` to it."""
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
            f"{missing[:3]} (a tied matrix is stored once, under its other name); is it the right base?"
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
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _state_dtype(config: dict[str, object], dtype: str) -> None:
    """Sets the dtype that a configuration and its parts state, under either of transformers' names for it."""
    for field in ("dtype", "torch_dtype"):
        if config.get(field) is not None:
            config[field] = dtype
    for part in config.values():
        if isinstance(part, dict):
            _state_dtype(part, dtype)


Entries = list[tuple[StoredTensor, torch.dtype]]


def _plan(
    base: BaseWeights, added: Sequence[StoredTensor], dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, Entries]:
    """The output files and what goes where, known from the base's headers and what is added."""
    groups: list[Entries] = [[]]
    filled = 0
    for stored in (*base.tensors.values(), *added):
        out = _output_dtype(stored, dtype, base.folder)
        size = byte_size(stored.shape, out)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((stored, out))
        filled += size
    if len(groups) == 1:
        return {single_file(base.stem): groups[0]}
    return {f"{base.stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _output_dtype(stored: StoredTensor, dtype: torch.dtype | None, folder: Path) -> torch.dtype:
    if stored.dtype not in DTYPES:
        raise UserError(f"{folder}: {stored.key} is stored as {stored.dtype}, which is not read")
    own = DTYPES[stored.dtype]
    return dtype if dtype is not None and own.is_floating_point else own


def _write_shard(
    path: Path, entries: Entries, base: BaseWeights, factors: Mapping[str, Factors], adapter: Adapter
) -> None:
    announced = {stored.key: (stored.shape, dtype) for stored, dtype in entries}
    with SafetensorsStream(path, announced) as stream:
        for (stored, dtype), tensor in zip(entries, _merged(entries, base, factors, adapter), strict=True):
            stream.write(stored.key, tensor.to(dtype))


def _merged(entries: Entries, base: BaseWeights, factors: Mapping[str, Factors], adapter: Adapter) -> Iterator[Tensor]:
    extras, experts = adapter.extras, adapter.experts
    partial = {split_rows(name)[0]: name for name in extras if split_rows(name)[0] != name}
    for stored, _ in entries:
        layer, piece = stored.name.removesuffix(".weight"), base.expert_pieces.get(stored.key)
        if piece is not None and piece.layer in experts:
            yield _merged_experts(experts[piece.layer], piece, base.read(stored.name))
        elif stored.name in extras:
            yield extras[stored.name]
        elif stored.name in partial:
            whole, name = base.read(stored.name).clone(), partial[stored.name]
            whole[split_rows(name)[1]] = extras[name].to(whole.dtype)
            yield whole
        elif stored.name.endswith(".weight") and layer in factors:
            yield factors[layer].merged(base.read(stored.name))
        else:
            yield base.read(stored.name)


def _write_index(staging: Path, shards: Mapping[str, Entries], stem: str) -> int:
    total = sum(byte_size(stored.shape, dtype) for entries in shards.values() for stored, dtype in entries)
    if list(shards) != [single_file(stem)]:
        weight_map = {stored.key: file for file, entries in shards.items() for stored, _ in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / index_file(stem)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
