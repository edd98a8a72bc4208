"""A base with an adapter folded in, one tensor in memory at a time; written as a plain model folder, or for vLLM.

vLLM's slots hold A and B of the language model's linear layers (and, with a plugin, magnitudes); all else that was
trained is folded into the base beside it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dora_vl.adapters.adapter import (
    CLOSED_ANSWERS,
    IMAGE_ASPECT,
    Adapter,
    Factors,
    content_hash,
    is_extra,
    write_adapter,
)
from dora_vl.adapters.base_weights import INDEX, WEIGHTS, BaseWeights, StoredTensor
from dora_vl.adapters.files import (
    DTYPES,
    byte_size,
    refuse_other_copy,
    refuse_to_replace,
    split_key,
    untied,
    write_safetensors,
)
from dora_vl.adapters.settings import VLLM_RANKS, own_recipe, peft_fields
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError, short_names
from dora_vl.files import read_json, whole_folder, write_json

SHARD_BYTES = 5_000_000_000
"""One output file is at most this large; transformers has the same default."""
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"})
MANIFEST = "dora_vl_merge.json"
"""This file lists what a merge wrote, so that a later one may replace the folder."""
CHECK_FILE = "check.json"
"""A check writes its result beside the weights under this name."""
NOT_COPIED = frozenset({"pytorch_model.bin.index.json", MANIFEST, CHECK_FILE, INDEX})


class MergedWeights:
    """Base + adapter, read tensor by tensor; every product is computed in float32."""

    def __init__(self, base: BaseWeights, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.factors = factors_for_base(base, adapter, with_experts_and_heads=True)
        check_experts(base, adapter)
        self._rows = {split_rows(name)[0]: name for name in adapter.extras if split_rows(name)[0] != name}
        """Maps tensors of which only some rows are the adapter's to the rows' name."""

    @cached_property
    def stored(self) -> list[StoredTensor]:
        """Lists everything to read: the base's tensors in its files' order, and heads that the base lacks."""
        dtype_names = {dtype: name for name, dtype in DTYPES.items()}
        heads = {name: self.adapter.extras[name] for name in sorted(self.adapter.answer_heads - set(self.base.tensors))}
        added = [StoredTensor(name, name, "", tuple(t.shape), dtype_names[t.dtype]) for name, t in heads.items()]
        return [*self.base.tensors.values(), *added]

    def read(self, stored: StoredTensor) -> Tensor:
        """Reads one tensor, in float32 where the adapter changes it, else as it is stored."""
        name, extras, experts = stored.name, self.adapter.extras, self.adapter.experts
        if name in extras:
            return extras[name]
        weight, piece = self.base.read(name), self.base.expert_pieces.get(stored.key)
        if piece is not None and piece.layer in experts:
            numbers = range(len(weight)) if piece.expert is None else (piece.expert,)
            merged = [
                replace(
                    experts[piece.layer].of_expert(number, piece.part, piece.parts), transposed=piece.in_out
                ).merged(part)
                for number, part in zip(numbers, weight if piece.expert is None else [weight], strict=True)
            ]
            return torch.stack(merged) if piece.expert is None else merged[0]
        if name in self._rows:
            rows = self._rows[name]
            weight = weight.clone()
            weight[split_rows(rows)[1]] = extras[rows].to(weight.dtype)
            return weight
        layer = name.removesuffix(".weight")
        return self.factors[layer].merged(weight) if name.endswith(".weight") and layer in self.factors else weight


def factors_for_base(
    base: BaseWeights, adapter: Adapter, *, with_experts_and_heads: bool = False
) -> dict[str, Factors]:
    """Returns the adapter's factors, transposed for layers whose class stores the weight as [in, out].

    Every merge, export and measurement starts here: each tensor of the base is changed once, under the only name it
    has. Unless `with_experts_and_heads`, refuses an adapter of experts stored as one tensor, or one with answer heads
    that the base lacks.
    """
    chosen = adapter.matrix_factors if with_experts_and_heads else adapter.factors
    # An adapted layer, or a weight that PEFT trained whole, changes under one name; a run's own part under all.
    changes = dict.fromkeys((f"{name}.weight" for name in chosen), "adapts")
    if not adapter.recipe.get("adapter"):
        changes |= dict.fromkeys(adapter.extras, "trained")
    for name, change in changes.items():
        if others := base.tied_to(name):
            raise untied(adapter.source, name, others, change)
    changed = Counter([f"{name}.weight" for name in chosen])
    changed.update([*adapter.experts, *(split_rows(name)[0] for name in adapter.extras)])
    if twice := [name for name, times in changed.items() if times > 1]:
        raise UserError(f"{adapter.source} changes {short_names(twice)} twice, by A and B and by a tensor of its own")
    factors = dict(chosen)
    for name in chosen:
        if (weight := base.tensors.get(f"{name}.weight")) is not None:
            factors[name] = chosen[name].on_weight(weight.shape, transposed=name in base.transposed_layers)
    _check_fit(base, adapter, factors, adapter.answer_heads if with_experts_and_heads else frozenset())
    for name, copy in adapter.copies.items():
        refuse_other_copy(adapter.source, name, copy, base.read(name))
    return factors


def _check_fit(base: BaseWeights, adapter: Adapter, factors: Mapping[str, Factors], added: frozenset[str]) -> None:
    missing = [f"{name}.weight" for name in factors if f"{name}.weight" not in base.tensors]
    missing += [name for name in adapter.extras if split_rows(name)[0] not in base.tensors and name not in added]
    if missing and adapter.answer_heads.issuperset(missing):
        raise UserError(
            f"{adapter.source} answers {', '.join(adapter.recipe[CLOSED_ANSWERS])} from a closed list, whose head this "
            "cannot take along; dora-vl merge with only this --adapter, weight 1, writes it into the merged folder"
        )
    if missing:
        raise UserError(
            f"{adapter.source}: {len(missing)} tensors are not in {base.folder}, first {missing[:3]}; wrong base?"
        )
    for name, layer in factors.items():
        weight = base.weight_of(name)
        if not layer.shape_fits(weight):
            a, b = (None if factor is None else list(factor.shape) for factor in (layer.lora_A, layer.lora_B))
            raise UserError(f"{adapter.source}: {name} has A {a} and B {b}, the base's weight is {list(weight.shape)}")
    for name, tensor in adapter.extras.items():
        stored, rows = split_rows(name)
        if stored not in base.tensors:
            continue
        shape = base.tensors[stored].shape
        needed = (len(range(shape[0])[rows]), *shape[1:]) if rows != slice(None) else shape
        if tuple(tensor.shape) != needed:
            raise UserError(f"{adapter.source}: {name} is {list(tensor.shape)}, the base's {list(needed)}")


def check_experts(base: BaseWeights, adapter: Adapter) -> None:
    """Raises a `UserError` unless the base has every row of the adapted experts."""
    shapes = {stored.key: stored.shape for stored in base.tensors.values()}
    rows_in_base = dict.fromkeys(adapter.experts, 0)
    for key, piece in base.expert_pieces.items():
        if piece.layer not in adapter.experts:
            continue
        factors, shape = adapter.experts[piece.layer], shapes[key]
        experts, rows = factors.experts_and_rows
        out, width = reversed(shape[-2:]) if piece.in_out else shape[-2:]
        fits = out * piece.parts == rows and (factors.lora_A is None or factors.lora_A.shape[-1] == width)
        if not fits or (piece.expert is None and shape[0] != experts):
            raise UserError(f"{adapter.source}: {piece.layer} does not fit {base.folder}'s {key} {list(shape)}")
        rows_in_base[piece.layer] += out * (experts if piece.expert is None else 1)
    for name, factors in adapter.experts.items():
        experts, rows = factors.experts_and_rows
        if rows_in_base[name] != experts * rows:
            raise UserError(
                f"{adapter.source}: {base.folder} has {rows_in_base[name]:,} rows of {experts * rows:,} of {name}"
            )


@dataclass(frozen=True)
class MergeCounts:
    """Counts what a merge wrote."""

    layers: int
    replaced: int
    """Counts other tensors from the adapter: projector, biases, norms, embeddings, heads of closed answer lists."""
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
) -> MergeCounts:
    """Writes `base` with `adapter` folded in as a plain folder that transformers opens.

    Every product is computed in float32 and rounded once, to `dtype`: None is each tensor's own, or the recipe's where
    a base of float32 was trained in another, so that the model answers as it was trained. Configuration, tokenizer and
    processor files are copied; heads of closed answer lists that the base lacks are added. The configuration states
    their lists, and how pictures become squares. Tensors have the names of published folders (`hub_names`). `open_base`
    gives the values to merge into, where they are not the stored ones.
    """
    refuse_target(target, base_folder)
    with open_base(base_folder) as base:
        weights = MergedWeights(base, adapter)
        stored = {DTYPES[tensor.dtype] for tensor in base.tensors.values() if tensor.dtype in DTYPES}
        if dtype is None and {kind for kind in stored if kind.is_floating_point} == {torch.float32}:
            dtype = getattr(torch, adapter.recipe.get("dtype", "float32"))
        with whole_folder(target) as staging:
            _copy_other_files(base_folder, staging, dtype, adapter.recipe)
            shards = _plan(weights, dtype, shard_bytes)
            total = sum(byte_size(t.shape, kind) for entries in shards.values() for t, kind in entries.values())
            with tqdm(total=total, desc="merging", unit="B", unit_scale=True, disable=None) as progress:
                for file, entries in shards.items():

                    def read(key: str, entries: Mapping[str, tuple[StoredTensor, torch.dtype]] = entries) -> Tensor:
                        stored, kind = entries[key]
                        progress.update(byte_size(stored.shape, kind))
                        return weights.read(stored).to(kind)

                    announced = {key: (stored.shape, kind) for key, (stored, kind) in entries.items()}
                    write_safetensors(staging / file, announced, read)
            if len(shards) > 1:
                weight_map = dict(sorted((key, file) for file, entries in shards.items() for key in entries))
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_json(staging / INDEX, index)
            names = sorted(path.name for path in staging.iterdir())
            write_json(staging / MANIFEST, {"written_by": "dora-vl merge", "files": names})
    return MergeCounts(len(weights.factors) + len(adapter.experts), len(adapter.extras), len(shards), total)


def refuse_target(target: Path, base_folder: Path) -> None:
    """Raises a `UserError` unless the target is absent or an earlier merge's result; the base itself is refused too."""
    if target.resolve() == base_folder.resolve():
        raise UserError(f"{target} is the base itself; name another folder for the result")
    manifest = target / MANIFEST
    written = [MANIFEST, CHECK_FILE, *read_json(manifest).get("files", ())] if manifest.is_file() else ()
    refuse_to_replace(target, written)


def _copy_other_files(base_folder: Path, staging: Path, dtype: torch.dtype | None, recipe: Mapping[str, Any]) -> None:
    for path in sorted(base_folder.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in NOT_COPIED:
            shutil.copyfile(path, staging / path.name)
    config, closed_answers, aspect = staging / "config.json", recipe.get(CLOSED_ANSWERS), recipe.get(IMAGE_ASPECT)
    if (dtype is not None or closed_answers or aspect) and config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        if dtype is not None:
            content["dtype"] = ""  # also where it is unstated
            _state_dtype(content, str(dtype).removeprefix("torch."))
        if closed_answers:
            content[CLOSED_ANSWERS] = {**content.get(CLOSED_ANSWERS, {}), **closed_answers}
        if aspect not in (None, content.get(IMAGE_ASPECT, "pad")):
            content[IMAGE_ASPECT] = aspect
        write_json(config, content)


def _state_dtype(config: dict[str, object], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None:
            config[key] = dtype
    for part in config.values():
        if isinstance(part, dict):
            _state_dtype(part, dtype)


def _plan(
    weights: MergedWeights, dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, dict[str, tuple[StoredTensor, torch.dtype]]]:
    """Plans the output files and their tensors by name, from the base's headers and what is added."""
    base, filled = weights.base, 0
    groups: list[dict[str, tuple[StoredTensor, torch.dtype]]] = [{}]
    for stored in weights.stored:
        if stored.dtype not in DTYPES:
            raise UserError(f"{base.folder}: {stored.key} is stored as {stored.dtype}, which is not read")
        own = DTYPES[stored.dtype]
        kind = own if dtype is None or not own.is_floating_point else dtype
        size = byte_size(stored.shape, kind)
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][base.hub_keys.get(stored.key, stored.key)] = (stored, kind)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


BASE, ADAPTER = "base", "adapter"
"""An export writes these two folders."""
WHOLE = "dora-vl merge writes the whole model as plain weights instead"


@dataclass(frozen=True)
class Exported:
    """Says what an export wrote."""

    layers: int
    """Counts the layers that stay an adapter."""
    base: Path
    """The adapter is served on this folder: a new one, or the given one where nothing had to change in it."""
    folded: MergeCounts | None
    """Counts what was folded into a new base; None if it is the given one."""
    max_lora_rank: int
    use_dora: bool


def export_for_vllm(
    adapter: Adapter,
    base_folder: Path,
    target: Path,
    language: Collection[str],
    *,
    head: str | None = None,
    dtype: torch.dtype | None = None,
    open_base: Callable[[Path], BaseWeights] = BaseWeights,
) -> Exported:
    """Writes `target/adapter`, and `target/base` where something has to be folded in or renamed for vLLM."""
    refuse_to_replace(target, ())
    with open_base(base_folder) as base:
        refuse_unserved(adapter, base, language, head)
        MergedWeights(base, adapter)  # everything fits
        is_plain = type(base) is BaseWeights and dtype is None
        renamed = any(name != key for key, name in base.hub_keys.items())
    served, folded = split(adapter, language)
    with whole_folder(target) as staging:
        merged = None
        if folded.tensors or renamed or not is_plain:
            merged = merge_to_folder(folded, base_folder, staging / BASE, dtype=dtype, open_base=open_base)
        base_of_result = base_folder if merged is None else target / BASE
        recipe = served.recipe
        if "base" in recipe:
            digest = content_hash(base_folder if merged is None else staging / BASE)
            own = {"base": str(base_of_result), "revision": None, "base_sha256": digest, "quantisation": None}
            recipe = {**recipe, **own}
        config = {**served.config, "base_model_name_or_path": str(base_of_result)}
        write_adapter(replace(served, config=config, recipe=recipe), staging / ADAPTER)
    rank = next(rank for rank in VLLM_RANKS if rank >= served.config["r"])
    return Exported(len(served.layers), base_of_result, merged, rank, bool(served.config["use_dora"]))


def refuse_unserved_base(config: Mapping[str, Any], folder: Path) -> None:
    """Raises a `UserError` if vLLM has no class for a base's tower, by the base's configuration."""
    tower = config.get("vision_config")
    if isinstance(tower, Mapping) and tower.get("model_type") == "dora_grid_tower":  # of timm or open_clip, or pooled
        raise UserError(
            f"{folder} has a tower of {tower.get('library')} ({tower.get('architecture') or 'pooled'}), which vLLM has "
            "no class for: its LLaVA takes CLIP, SigLIP and Pixtral; dora-vl merge --to FOLDER writes plain weights, "
            "which dora-vl serve --model FOLDER serves in the same protocol"
        )


def refuse_unserved(adapter: Adapter, base: BaseWeights, language: Collection[str], head: str | None) -> None:
    """Raises a `UserError` that says what vLLM cannot serve, why, and what to do."""
    refuse_unserved_base(base.config, base.folder)
    if adapter.method not in ("dora", "lora"):
        raise UserError(
            f"{adapter.source}: vLLM's slots hold A and B, and a {adapter.method} adapter has none; {WHOLE}"
        )
    for name, layer in adapter.layers.items():
        reasons = {
            "is the output head": name == head,
            "is experts in one tensor": name in adapter.experts,
            "is an embedding": name in adapter.embeddings,
            "is a convolution": "lora_A" in layer and layer["lora_A"].ndim > 2,
            "has only a magnitude": "lora_A" not in layer,
            "is a Conv1D": name in base.transposed_layers,
        }
        if (reason := next((reason for reason, holds in reasons.items() if holds), None)) is not None:
            raise UserError(f"{adapter.source}: {name} {reason}, which vLLM serves no adapter of; {WHOLE}")
    inside = [name for name in adapter.layers if name in language]
    if not inside:
        raise UserError(
            f"{adapter.source}: no linear layer of the language model is adapted, nothing to serve; {WHOLE}"
        )
    highest = max(factors.rank for factors in adapter.factors.values())
    if highest > VLLM_RANKS[-1]:
        raise UserError(f"{adapter.source}: rank {highest} is above vLLM's largest, {VLLM_RANKS[-1]}; {WHOLE}")


def split(adapter: Adapter, language: Collection[str]) -> tuple[Adapter, Adapter]:
    """Splits an adapter into what is served, all layers with one scale, and what is folded into the base."""
    served = {name: factors for name, factors in adapter.factors.items() if name in language}
    rest = {key: tensor for key, tensor in adapter.tensors.items() if is_extra(key) or split_key(key)[0] not in served}
    recipe = {name: value for name, value in adapter.recipe.items() if name != "adapter"}
    return _of_one_scale(adapter, served), replace(adapter, tensors=rest, recipe=recipe)


def _of_one_scale(adapter: Adapter, served: Mapping[str, Factors]) -> Adapter:
    """Makes an adapter of the served layers in which alpha / r is each layer's scale.

    vLLM only reads `r` and `lora_alpha`, PEFT the patterns too: B absorbs a layer's scale that differs.
    """
    scale = Counter(factors.scale for factors in served.values()).most_common(1)[0][0]
    ranks = {name: factors.rank for name, factors in served.items()}
    highest, use_dora = max(ranks.values()), bool(adapter.config.get("use_dora"))
    tensors: dict[str, Tensor] = {}
    for name, factors in served.items():
        assert factors.lora_B is not None  # refused before
        share = factors.scale / scale
        tensors |= replace(factors, lora_B=factors.lora_B if share == 1 else share * factors.lora_B).tensors(name)
    others = {name: rank for name, rank in ranks.items() if rank != highest}
    config = peft_fields(
        ranks,
        {},
        r=highest,
        lora_alpha=scale * highest,
        rank_pattern=others,
        alpha_pattern={name: scale * rank for name, rank in others.items()},
        lora_dropout=float(adapter.config.get("lora_dropout") or 0.0),
        task_type=adapter.config.get("task_type"),
        use_dora=use_dora,
    )
    recipe = {**adapter.recipe, **own_recipe(config)} if adapter.recipe else {}
    return Adapter(tensors, config, recipe, adapter.source)
