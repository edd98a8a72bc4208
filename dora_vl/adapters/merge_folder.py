"""Merged weights as a plain model folder, streamed: one tensor is in memory at a time, whatever the model's size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter
from dora_vl.adapters.base_weights import STEMS, BaseWeights, StoredTensor, index_file, single_file
from dora_vl.adapters.checkpoints import refuse_to_replace, written_whole
from dora_vl.adapters.folder import read_json
from dora_vl.adapters.merged_weights import MergedWeights
from dora_vl.adapters.tensor_files import DTYPES, SafetensorsStream, byte_size
from dora_vl.errors import UserError

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

    Raises:
        UserError: a layer or an extra that the base lacks, a shape that does not fit, a quantised base, or a target
            that is there already and was not written by a merge. Nothing is written then.
    """
    refuse_target(target, base_folder)
    with open_base(base_folder) as base:
        weights = MergedWeights(base, adapter)
        with written_whole(target) as staging:
            _copy_other_files(base_folder, staging, dtype, adapter.recipe.get(CLOSED_ANSWERS))
            shards = _plan(weights, dtype, shard_bytes)
            _write_shards(staging, shards, weights)
            total = _write_index(staging, shards, base.stem)
            _write_manifest(staging)
    return Merged(len(weights.factors) + len(adapter.experts), len(adapter.extras), len(shards), total)


def refuse_target(target: Path, base_folder: Path) -> None:
    """Raises a `UserError` where something is there already that is no earlier merge's result, or that is the base."""
    if target.resolve() == base_folder.resolve():
        raise UserError(f"{target} is the base itself; name another folder for the result")
    manifest = target / MANIFEST
    written = [MANIFEST, *CERTIFICATES, *read_json(manifest).get("files", ())] if manifest.is_file() else ()
    refuse_to_replace(target, written)


def _write_manifest(staging: Path) -> None:
    content = {"written_by": "dora-vl merge", "files": sorted(path.name for path in staging.iterdir())}
    (staging / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


@dataclass(frozen=True)
class _Entry:
    """One tensor of the result."""

    stored: StoredTensor
    key: str
    """In the result's files."""
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
        entry = _Entry(stored, base.hub_keys.get(stored.key, stored.key), _output_dtype(stored, dtype, base.folder))
        if groups[-1] and filled + entry.bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.bytes
    if len(groups) == 1:
        return {single_file(base.stem): groups[0]}
    return {f"{base.stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _output_dtype(stored: StoredTensor, dtype: torch.dtype | None, folder: Path) -> torch.dtype:
    if stored.dtype not in DTYPES:
        raise UserError(f"{folder}: {stored.key} is stored as {stored.dtype}, which is not read")
    own = DTYPES[stored.dtype]
    return dtype if dtype is not None and own.is_floating_point else own


def _write_shards(staging: Path, shards: Shards, weights: MergedWeights) -> None:
    total = sum(entry.bytes for entries in shards.values() for entry in entries)
    with tqdm(total=total, desc="merging", unit="B", unit_scale=True, disable=None) as progress:
        for file, entries in shards.items():
            announced = {entry.key: (entry.stored.shape, entry.dtype) for entry in entries}
            with SafetensorsStream(staging / file, announced) as stream:
                for entry in entries:
                    stream.write(entry.key, weights.read(entry.stored).to(entry.dtype))
                    progress.update(entry.bytes)


def _write_index(staging: Path, shards: Shards, stem: str) -> int:
    total = sum(entry.bytes for entries in shards.values() for entry in entries)
    if list(shards) != [single_file(stem)]:
        weight_map = {entry.key: file for file, entries in shards.items() for entry in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / index_file(stem)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total
