"""An adapter without a model: PEFT's two files, read, checked and written without changing a bit.

Our own adapter folder is a PEFT folder with a `recipe.json`, so one reader and one writer serve both.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import cached_file

from dora_vl.adapters.files import (
    CONFIG_FILE,
    FILE_TO_LEAF,
    LEAVES,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    by_own_name,
    read_peft_config,
    read_recipe,
    read_trained,
    split_key,
)
from dora_vl.adapters.folder import PICKLED_WEIGHTS_FILE, write_folder
from dora_vl.adapters.settings import check_peft_fields, rank_of, refuse_contradiction, scale_of, type_of
from dora_vl.core import functional
from dora_vl.core.inject import SHARED_NAME
from dora_vl.errors import UserError
from dora_vl.files import file_sha256, weight_files
from dora_vl.shapes import Float


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A, B and magnitude of one layer, flattened to two axes; A and B are None if it has only a magnitude.

    A convolution's kernel is a linear layer's weight once its last axes are flattened; an embedding's table and
    transformers' `Conv1D` weight are linear weights transposed. So the equation in `core.functional` serves all.
    Experts that are one tensor in the model have an axis more, from which `of_expert` takes one.
    """

    lora_A: Float[Tensor, "*experts rank in_"] | None
    lora_B: Float[Tensor, "*experts out rank"] | None
    magnitude: Float[Tensor, "*experts length"] | None
    scale: float
    transposed: bool = False
    """The layer stores its weight as [in, out], as embeddings and transformers' `Conv1D` do."""
    shared_A: bool = False
    """A is DVoRA's, as wide as the widest layer; `on_weight` crops it."""

    @property
    def rank(self) -> int:
        """Returns the number of A's rows; 0 if there is only a magnitude."""
        return 0 if self.lora_A is None else len(self.lora_A)

    @property
    def experts_and_rows(self) -> tuple[int, int]:
        """Returns the number of experts, and the output rows of each."""
        by_row = self.lora_B if self.lora_B is not None else self.magnitude
        assert by_row is not None
        return by_row.shape[0], by_row.shape[1]

    def of_expert(self, expert: int, part: int = 0, parts: int = 1) -> Factors:
        """Cuts out one expert's factors, or those of the `part`-th of `parts` of its output rows."""
        size = self.experts_and_rows[1] // parts
        rows = slice(part * size, (part + 1) * size)
        a, b, m = self.lora_A, self.lora_B, self.magnitude
        return replace(
            self,
            lora_A=None if a is None else a[expert],
            lora_B=None if b is None else b[expert, rows],
            magnitude=None if m is None else m[expert, rows],
        )

    def on_weight(self, shape: tuple[int, ...], *, transposed: bool) -> Factors:
        """Adapts these factors to a weight's shape and to whether the layer stores it as [in, out]."""
        turned = replace(self, transposed=self.transposed or transposed)
        if self.lora_A is None or not self.shared_A:
            return turned
        columns = turned.as_matrix(torch.empty(shape, device="meta")).shape[1]
        return replace(turned, lora_A=self.lora_A[:, :columns], shared_A=False)

    def shape_fits(self, weight: Tensor) -> bool:
        """Tells whether A, B and the magnitude belong to a weight of this shape."""
        rows, columns = self.as_matrix(weight).shape
        return (
            (self.lora_A is None or self.lora_A.shape[1] == columns)
            and (self.lora_B is None or self.lora_B.shape[0] == rows)
            and (self.magnitude is None or self.magnitude.numel() == rows)
        )

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """Views the layer's weight as the equation's [out, in]."""
        return weight.t() if self.transposed else weight.flatten(1)

    def merged(self, weight: Tensor) -> Tensor:
        """Computes W' in the shape of `weight`, in float32 (float64 for float64)."""
        matrix = self.as_matrix(weight.detach())
        wide = matrix.to(functional.accumulation_dtype(weight.dtype))
        new = functional.merged_weight(wide, self.lora_A, self.lora_B, self.magnitude, self.scale)
        return new.t().contiguous() if self.transposed else new.view(weight.shape)

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """Returns A, B and magnitude under a linear layer's PEFT keys."""
        parts = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B, "lora_magnitude_vector": self.magnitude}
        return {f"{PEFT_PREFIX}{layer}.{leaf}": part for leaf, part in parts.items() if part is not None}


CLOSED_ANSWERS = "closed_answers"
"""`recipe.json` and a VL-BART's `config.json` hold the closed answer lists by task under this key."""

IMAGE_ASPECT = "image_aspect"
"""`recipe.json`, and the `config.json` of a LLaVA merged from a run, say under this key how pictures become square."""

SHARED = (f"{SHARED_NAME}.random_A", f"{SHARED_NAME}.random_B")


@dataclass(frozen=True)
class Adapter:
    """The content of one adapter folder."""

    tensors: dict[str, Tensor]
    """Holds the tensors of `adapter_model.safetensors` under PEFT's keys, in their own dtypes and shapes."""
    config: dict[str, Any]
    """Holds all fields of `adapter_config.json`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Holds `recipe.json`; empty for an adapter that was not made here."""
    source: str = "adapter"
    """Says in messages where the adapter came from."""

    @cached_property
    def layers(self) -> dict[str, dict[str, Tensor]]:
        """Maps each adapted layer's full name to its tensors by the layer's own names."""
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            layer, leaf = split_key(key)
            if leaf is not None:
                layers.setdefault(layer, {})[leaf] = tensor
        return layers

    @cached_property
    def embeddings(self) -> frozenset[str]:
        """Names the adapted layers that are tables; their A and B have names of their own in the file."""
        endings = tuple(f".{ending}" for ending in FILE_TO_LEAF if "embedding" in ending)
        return frozenset(split_key(key)[0] for key in self.tensors if key.endswith(endings))

    @cached_property
    def _by_name(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return by_own_name(self.source, self.tensors)

    @cached_property
    def extras(self) -> dict[str, Tensor]:
        """Returns every other tensor (projector, trained biases, kept rows) by its name in the model."""
        own = self._by_name[0]
        return {name: own[name] for name in own if name.rpartition(".")[2] not in LEAVES and name not in SHARED}

    @cached_property
    def copies(self) -> dict[str, Tensor]:
        """Returns PEFT's copies of the weights under adapted embeddings and heads, by the model's names."""
        return self._by_name[1]

    @cached_property
    def answer_heads(self) -> frozenset[str]:
        """Returns the `extras` that are heads of a VL-BART's closed answer lists, which a base need not have."""
        prefixes = tuple(f"answer_heads.{task}." for task in self.recipe.get(CLOSED_ANSWERS, {}))
        return frozenset(name for name in self.extras if name.startswith(prefixes))

    @property
    def method(self) -> str:
        """Returns `dora`, `lora`, `magnitude`, `dvora` or `full`."""
        method = self.recipe.get("adapter", {}).get("method")
        return str(method or ("dora" if self.config.get("use_dora") else "lora"))

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Returns the factors of each adapted layer by full name."""
        if self.experts:
            raise UserError(
                f"{self.source}: {next(iter(self.experts))} is experts in one tensor, to load or merge and no more"
            )
        return self.matrix_factors

    @cached_property
    def matrix_factors(self) -> dict[str, Factors]:
        """Returns `factors` without experts, for callers that take `experts` as well."""
        return {name: self._factors(name, layer) for name, layer in self.layers.items() if name not in self.experts}

    @cached_property
    def experts(self) -> dict[str, Factors]:
        """Returns the factors of experts stored as one tensor, by full name."""
        names = self.recipe.get("adapter", {}).get("experts", ())
        return {name: self._factors(name, self.layers.get(name, {}), of_experts=True) for name in names}

    def _factors(self, layer: str, tensors: Mapping[str, Tensor], *, of_experts: bool = False) -> Factors:
        if tensors.keys() & {"lambda_d", "lambda_b"}:
            return self._shared_factors(layer, tensors)
        a, b, magnitude = (tensors.get(leaf) for leaf in ("lora_A", "lora_B", "magnitude"))
        use_dora = bool(self.config.get("use_dora"))
        if (a is None) != (b is None) or (a is None and magnitude is None):
            raise UserError(f"{self.source}: {layer} has one of A and B without the other; copy the file again")
        if use_dora and magnitude is None:
            raise UserError(f"{self.source}: {layer} has no magnitude, yet use_dora is true; it was lost on the way")
        if magnitude is not None and a is not None and not use_dora:
            raise UserError(f"{self.source}: {layer} has a magnitude, yet use_dora is false; PEFT would drop it")
        if not of_experts:
            a, b = (None if factor is None else factor.flatten(1) for factor in (a, b))
            magnitude = None if magnitude is None else magnitude.flatten()
        rank = 0 if a is None else a.shape[-2]
        if a is not None and b is not None and {b.shape[-1], rank_of(self.config, layer)} != {rank}:
            raise UserError(
                f"{self.source}: {layer} has A {list(a.shape)} and B {list(b.shape)}, the configuration says "
                f"rank {rank_of(self.config, layer)}; correct r or rank_pattern in {CONFIG_FILE}"
            )
        return Factors(
            lora_A=a,
            lora_B=b,
            magnitude=magnitude,
            scale=scale_of(self.config, layer, rank) if rank else 1.0,
            transposed=layer in self.embeddings or bool(self.config.get("fan_in_fan_out")),
        )

    def _shared_factors(self, layer: str, tensors: Mapping[str, Tensor]) -> Factors:
        """Folds both vectors of a DVoRA layer into B; A stays as wide as the widest layer."""
        parts = {name: self.tensors.get(f"{PEFT_PREFIX}{name}") for name in SHARED}
        parts |= {f"{layer}.{leaf}": tensors.get(leaf) for leaf in ("lambda_d", "lambda_b", "magnitude")}
        if missing := [name for name, tensor in parts.items() if tensor is None]:
            raise UserError(f"{self.source}: a DVoRA adapter without {missing}; copy the file again")
        a, b, d, rows, magnitude = (tensor for tensor in parts.values() if tensor is not None)
        if len(a) != len(d) or b.shape[1] != len(d) or len(b) < len(rows):
            raise UserError(
                f"{self.source}: {layer} has d [{len(d)}] and b [{len(rows)}], the shared A is {list(a.shape)} and B "
                f"{list(b.shape)}; copy the file again"
            )
        folded = b[: len(rows)] * d * rows.unsqueeze(1)
        return Factors(lora_A=a, lora_B=folded, magnitude=magnitude.flatten(), scale=1.0, shared_A=True)


def is_extra(key: str) -> bool:
    """Tells whether a tensor belongs to the model itself, neither to one adapted layer nor to all of them."""
    return split_key(key)[1] is None and key.removeprefix(PEFT_PREFIX) not in SHARED


def read_adapter(folder: str | PathLike[str]) -> Adapter:
    """Reads and checks a PEFT folder (ours included), given by its own path or by its weights file's."""
    source = Path(folder)
    if source.is_file():
        if not names_adapter(source):
            raise UserError(
                f"{source} is of PEFT's format, which states its scale in {CONFIG_FILE}: lay the two into a folder, "
                f"this one as {WEIGHTS_FILE}, and give the folder"
            )
        source = source.parent
    config = read_peft_config(source)
    check_peft_fields(str(source / CONFIG_FILE), config)
    weights = source / WEIGHTS_FILE
    if not weights.is_file() and (source / PICKLED_WEIGHTS_FILE).is_file():
        weights = source / PICKLED_WEIGHTS_FILE
    tensors = read_trained(weights)
    recipe = read_recipe(source)
    refuse_contradiction(str(source), config, recipe.get("adapter", {}))
    adapter = Adapter(tensors, config, recipe, str(source))
    if not adapter.extras and not adapter.matrix_factors and not adapter.experts:
        raise UserError(f"{weights} holds no tensor")
    return adapter


def names_adapter(path: Path) -> bool:
    """Tells whether a path is a folder, or the weights file of a PEFT folder."""
    return path.is_dir() or path.name in {WEIGHTS_FILE, PICKLED_WEIGHTS_FILE}


def write_adapter(adapter: Adapter, folder: str | PathLike[str]) -> None:
    """Writes the folder whole or not at all; where PEFT would leave tensors out, `peft_type` becomes one it refuses."""
    kind = adapter.config.get("peft_type", "LORA")
    if kind == "LORA":
        kind = type_of(by_own_name(adapter.source, adapter.tensors)[0], adapter.config)
    write_folder(Path(folder), adapter.tensors, {**adapter.config, "peft_type": kind}, adapter.recipe)


PACKAGES = ("dora-vl", "torch", "transformers", "deepspeed", "accelerate", "timm", "open_clip_torch")
BASE_CONFIG_FILE = "config.json"


def local_folder(folder_or_id: str, revision: str | None = None) -> Path:
    """Returns the folder of a model's files: the path itself, or a hub id's snapshot in the cache."""
    if Path(folder_or_id).is_dir():
        return Path(folder_or_id)
    config = cached_file(folder_or_id, BASE_CONFIG_FILE, revision=revision or "main", local_files_only=True)
    return Path(str(config)).parent


def content_hash(folder: Path) -> str:
    """Hashes a model folder's config and the weights files that are loaded, by SHA-256, in the order of their names.

    A file in the hub's cache is a link to a blob named by its SHA-256; that name is taken, so gigabytes are not read
    again.
    """
    digest = hashlib.sha256()
    config = [folder / BASE_CONFIG_FILE] if (folder / BASE_CONFIG_FILE).is_file() else []
    for path in sorted([*config, *weight_files(folder)]):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Returns a file's SHA-256."""
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", blob):
        return blob
    return file_sha256(path)


def versions() -> dict[str, str]:
    """Returns the installed versions of what a run depends on; absent packages are left out."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def base_of(adapter: Adapter) -> Path:
    """Returns the base's folder that an adapter states: a local folder, or a hub id's snapshot in the cache."""
    name = str(adapter.config.get("base_model_name_or_path") or "")
    if not name:
        raise UserError(f"{adapter.source} does not say which base it was trained on; add --base FOLDER")
    try:
        return local_folder(name, adapter.config.get("revision"))
    except OSError as error:
        raise UserError(f"base {name!r} of {adapter.source} is not on this machine; add --base FOLDER") from error


def refuse_other_base(recipe: Mapping[str, Any], base: str | Path, source: str, revision: str | None = None) -> None:
    """Raises a `UserError` if the recipe holds the base's content hash and this base's is another."""
    if (expected := recipe.get("base_sha256")) is None:
        return
    try:
        digest = content_hash(local_folder(str(base), revision))
    except OSError:
        return  # a hub id that is not in the cache yet; loading it says what is wrong, or fetches that revision
    if digest != expected:
        raise UserError(
            f"{source} was trained on another base (content hash {expected[:12]}) than {base} ({digest[:12]}); give "
            "the right --base, or --any-base if you know that its weights are the same"
        )
