"""A base model's folder, read one tensor at a time by the names that the model itself uses.

Files may use older names than the class that loads them (`language_model.model.layers...` for what is now
`model.language_model.layers...`). transformers keeps the renamings; they are applied to the files' keys here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dora_vl.adapters.agreement import tied_names
from dora_vl.adapters.folder import own_name, read_json, read_weights
from dora_vl.adapters.hub_names import hub_names
from dora_vl.core.experts import expert_projections
from dora_vl.core.quantised import loose_tensors
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError
from dora_vl.files import check_whole

STEMS = ("model", "diffusion_pytorch_model")
"""How the weight files of a folder begin: transformers' and diffusers' names."""
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the files."""

    key: str
    """In the files."""
    name: str
    """In the model."""
    file: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' word for it, e.g. BF16."""


def single_file(stem: str) -> str:
    """The one weight file of a folder."""
    return f"{stem}.safetensors"


def index_file(stem: str) -> str:
    """What says which of several weight files holds what."""
    return f"{stem}.safetensors.index.json"


def stem_in(folder: Path) -> str | None:
    """The one of `STEMS` whose files a folder holds; None: it is no model folder in safetensors."""
    found = (stem for stem in STEMS for name in (index_file(stem), single_file(stem)) if (folder / name).is_file())
    return next(found, None)


def config_in(folder: Path) -> dict[str, Any]:
    """A model folder's configuration; empty where it has none."""
    return read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}


class BaseWeights:
    """Opens a folder's safetensors files and hands out tensors; nothing is held in memory between two reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.config = config_in(folder)
        self.stem = stem_in(folder) or self._no_stem()
        """How its weight files begin."""
        self.stored = tuple(self._list())
        layout = layout_of(self.config, {key: shape for key, _, shape, _ in self.stored})
        names = {key: layout.names.get(key, key) for key, *_ in self.stored}
        self.tensors = {
            names[key]: StoredTensor(key, names[key], file, shape, dtype) for key, file, shape, dtype in self.stored
        }
        self.transposed_layers = layout.transposed
        """Layers whose class stores its weight as [in, out] (transformers' `Conv1D`, embeddings)."""
        self.expert_pieces = layout.pieces
        """Stored tensors that are, or are a piece of, the weight of experts that are one tensor in the model."""
        self._tied = layout.tied
        self.hub_keys = layout.hub
        """The name that published folders have for a key; a class that transformers does not have has none."""

    def __enter__(self) -> BaseWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _list(self) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
        index, files = self.folder / index_file(self.stem), [single_file(self.stem)]
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        for file in files:
            handle = self._open(file)
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = handle.get_slice(key)
                yield key, file, tuple(part.get_shape()), part.get_dtype()

    def _no_stem(self) -> NoReturn:
        files = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else "no such folder"
        raise UserError(
            f"{self.folder} holds neither {' nor '.join(map(single_file, STEMS))}, whole or in shards with an index "
            f"({files}); give a model folder in safetensors (load an older one and save_pretrained it once)"
        )

    def _open(self, file: str) -> Any:
        if file not in self._files:
            if (self.folder / file).is_file():
                check_whole(self.folder / file)
            try:
                self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / file} is not a whole safetensors file ({error})") from error
        return self._files[file]

    def read(self, name: str) -> Tensor:
        """One tensor by the model's name for it."""
        if name not in self.tensors:
            raise UserError(f"{self.folder} has no tensor {name}; is it the base that the adapter was trained on?")
        stored = self.tensors[name]
        return self._open(stored.file).get_tensor(stored.key)

    def weight_of(self, layer: str) -> Tensor:
        """A layer's weight, refused where it is quantised."""
        weight = self.read(f"{layer}.weight")
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise UserError(f"{self.folder}: {layer} is stored as {weight.dtype}; give the base before quantisation")
        return weight

    def tied_to(self, name: str) -> list[str]:
        """The model's other names for a tensor; transformers does not tie what the files hold apart."""
        others = next((group - {name} for group in self._tied if name in group), ())
        stored = self.tensors
        return [
            n for n in sorted(others) if not {name, n} <= stored.keys() or torch.equal(self.read(name), self.read(n))
        ]

    def module_names(self) -> list[str]:
        """Full names of the modules that own a weight."""
        return [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]


@dataclass(frozen=True)
class ExpertPiece:
    """Where a stored tensor stands in the weight of experts that are one tensor in the model."""

    layer: str
    """Full name of that weight, `...experts.gate_up_proj`."""
    expert: int | None
    """Whose it is; None: all experts'."""
    part: int
    parts: int
    """Of the output rows it holds the `part`-th of `parts` (gate and up)."""
    in_out: bool
    """It is stored as [in, out]."""


@dataclass(frozen=True)
class Layout:
    """What a folder's keys are in the model."""

    names: Mapping[str, str] = field(default_factory=dict)
    """The model's own name of each key; of one of several pieces of a weight, the key."""
    transposed: frozenset[str] = frozenset()
    pieces: Mapping[str, ExpertPiece] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)
    """The published name of each key."""
    tied: tuple[frozenset[str], ...] = ()
    """Names of one tensor each."""


def layout_of(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The model's own names of the keys in its files, and what is stored otherwise than it is in the model.

    The model is built from its configuration without memory. A folder whose class transformers does not have
    keeps the files' names, and so do tensors that transformers joins into one when it loads them (a matrix for each
    expert): under the joined name only the last would be left.
    """
    model = skeleton(config)
    if model is None:
        return Layout()
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.pytorch_utils import Conv1D

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    own = dict(model.state_dict())
    renamed = partial(rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=own)
    read_as = partial(renamed, weight_renamings=renamings, weight_converters=converters)
    found = {key: read_as(key) for key in shapes}
    keys_of = Counter(name for name, _ in found.values())
    names = {key: name if name in own and keys_of[name] == 1 else key for key, (name, _) in found.items()}
    experts = {
        f"{n}.{leaf}": vars(m)["is_transposed"] for n, m in model.named_modules() for leaf in expert_projections(m)
    }
    sources = [list(converter.source_patterns) for converter in converters]
    pieces = {
        key: _piece(key, name, pattern, sources, in_out=experts[name] != _is_reversed(shapes[key], own[name]))
        for key, (name, pattern) in found.items()
        if name in experts
    }
    transposed = frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D | nn.Embedding))
    unjoined = partial(renamed, weight_renamings=renamings, weight_converters=[])
    hub = hub_names(model, found, read_as, lambda key: unjoined(key)[0])
    return Layout(names, transposed, pieces, hub, tuple(tied_names(model)))


def _is_reversed(stored: tuple[int, ...], own: Tensor) -> bool:
    """Whether all experts are stored in the other of the two layouts than the model has them in."""
    return len(stored) == own.ndim and stored != tuple(own.shape)


def _piece(key: str, name: str, pattern: str | None, sources: list[list[str]], *, in_out: bool) -> ExpertPiece:
    number = re.search(r"experts\.(\d+)\.", key)
    together = next((patterns for patterns in sources if pattern in patterns), [])
    part = together.index(pattern) if pattern in together else 0
    expert = None if number is None else int(number[1])
    return ExpertPiece(name, expert, part, max(1, len(together)), in_out)


def skeleton(config: Mapping[str, Any]) -> Any:
    """The folder's model class on the meta device, or None where transformers has no such class."""
    import transformers

    import_module("transformers.models.auto.modeling_auto")  # with it `dora_vl` registers our towers
    architecture = (config.get("architectures") or [None])[0]
    if architecture is None or architecture not in dir(transformers):
        return None
    kind = getattr(transformers, architecture)
    settings = kind.config_class.from_dict(json.loads(json.dumps(dict(config))))
    settings.quantization_config = None
    with torch.device("meta"):
        model = kind(settings)
    assert isinstance(model, nn.Module)
    return model


# A second model over the weights of the first: its structure copied, its tensors the same objects.


def replaced_by(adapter: Path) -> frozenset[str]:
    """Names of the model's tensors that an adapter folder holds values of its own for, such as a projector's."""
    return frozenset(split_rows(own_name(key))[0] for key in read_weights(adapter))


def shared_tensors(model: nn.Module, replaced: Collection[str] = ()) -> dict[int, Tensor]:
    """What `copy.deepcopy` takes as its memo, so that a copy has these tensors themselves: all but the `replaced`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if name not in replaced}
    return shared | {id(tensor): tensor for tensor in loose_tensors(model)}
