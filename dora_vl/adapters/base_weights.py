"""A base model's folder, read one tensor at a time by the names that the model itself uses.

Files may use older names than the class that loads them (`language_model.model.layers...` for what is now
`model.language_model.layers...`). transformers keeps the renamings; they are applied to the files' keys here, and
undone for what is written: published folders have the older names, which vLLM and other tools read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dora_vl.adapters.agreement import own_name, tied_names
from dora_vl.adapters.folder import read_weights
from dora_vl.core.other_layers import expert_projections
from dora_vl.core.quantised import loose_tensors
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError
from dora_vl.files import check_attention, check_whole, read_json

STEMS = ("model", "diffusion_pytorch_model")
"""How the weight files of a folder begin: transformers' and diffusers' names."""
SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
"""How they end; the index says which of several files holds what."""
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


def stem_in(folder: Path) -> str | None:
    """The one of `STEMS` whose files a folder holds; None: it is no model folder in safetensors."""
    return next(
        (s for s in STEMS if any((folder / f"{s}{suffix}").is_file() for suffix in (INDEX_SUFFIX, SUFFIX))), None
    )


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
        stem = stem_in(folder)
        if stem is None:
            files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise UserError(
                f"{folder} holds neither {' nor '.join(f'{stem}{SUFFIX}' for stem in STEMS)}, whole or in shards "
                f"({files}); give a model folder in safetensors (load an older one and save_pretrained it once)"
            )
        self.stem = stem
        """How its weight files begin."""
        self.transposed_layers: frozenset[str] = frozenset()
        """Layers whose class stores its weight as [in, out] (transformers' `Conv1D`, embeddings)."""
        self.expert_pieces: dict[str, ExpertPiece] = {}
        """Stored tensors that are, or are a piece of, the weight of experts that are one tensor in the model."""
        self.hub_keys: dict[str, str] = {}
        """The name that published folders have for a key; a class that transformers does not have has none."""
        self._tied: list[frozenset[str]] = []
        stored = list(self._stored())
        names = self._model_names({key: shape for key, _, shape, _ in stored})
        self.tensors = {
            names[key]: StoredTensor(key, names[key], file, shape, dtype) for key, file, shape, dtype in stored
        }

    def __enter__(self) -> BaseWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _stored(self) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
        """Key, file, shape and dtype of every tensor."""
        index, files = self.folder / f"{self.stem}{INDEX_SUFFIX}", [f"{self.stem}{SUFFIX}"]
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        for file in files:
            handle = self._open(file)
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                part = handle.get_slice(key)
                yield key, file, tuple(part.get_shape()), part.get_dtype()

    def _model_names(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """The model's own names of the files' keys; finds out what is stored otherwise than it is in the model.

        The model is built from its configuration without memory. A folder whose class transformers does not have
        keeps the files' names, and so do tensors that transformers joins into one when it loads them (a matrix for
        each expert): under the joined name only the last would be left.
        """
        model = skeleton(self.config)
        if model is None:
            return {key: key for key in shapes}
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.pytorch_utils import Conv1D

        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        own, modules = dict(model.state_dict()), dict(model.named_modules())
        renamed = partial(rename_source_key, base_model_prefix=model.base_model_prefix, meta_state_dict=own)
        read_as = partial(renamed, weight_renamings=renamings, weight_converters=converters)
        unjoined = partial(renamed, weight_renamings=renamings, weight_converters=[])
        read = {key: read_as(key) for key in shapes}
        experts = {
            f"{n}.{leaf}": vars(m)["is_transposed"] for n, m in modules.items() for leaf in expert_projections(m)
        }
        for key, (name, pattern) in read.items():
            if name in experts:
                joined = next((c.source_patterns for c in converters if pattern in c.source_patterns), [pattern])
                # All experts may be stored in the other of the two layouts than the model has them in.
                is_reversed = len(shapes[key]) == own[name].ndim and shapes[key] != tuple(own[name].shape)
                number = re.search(r"experts\.(\d+)\.", key)
                self.expert_pieces[key] = ExpertPiece(
                    layer=name,
                    expert=None if number is None else int(number[1]),
                    part=list(joined).index(pattern),
                    parts=len(joined),
                    in_out=experts[name] != is_reversed,
                )
        self.transposed_layers = frozenset(n for n, m in modules.items() if isinstance(m, Conv1D | nn.Embedding))
        self.hub_keys = hub_names(model, read, read_as, lambda key: unjoined(key)[0])
        self._tied = tied_names(model)
        keys_of = Counter(name for name, _ in read.values())
        return {key: name if name in own and keys_of[name] == 1 else key for key, (name, _) in read.items()}

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
        others = sorted(next((group - {name} for group in self._tied if name in group), ()))
        stored = self.tensors
        return [n for n in others if not {name, n} <= stored.keys() or torch.equal(self.read(name), self.read(n))]

    def module_names(self) -> list[str]:
        """Full names of the modules that own a weight."""
        return [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]


def hub_conversions(model: Any) -> list[Any]:
    """transformers' conversions from a checkpoint's names to this model's, those that a save has to undo.

    A prefix that is taken from the whole model tells where somebody cut a text model out of a larger one, and one that
    is put in, where somebody left it out: of those nothing says that a checkpoint has them. A part's own prefix is its
    class's former layout.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    return [
        conversion
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if not isinstance(conversion, PrefixChange)
        or (conversion.prefix_to_remove is not None and bool(conversion.scope_prefix))
    ]


def save_under_hub_names(model: Any) -> None:
    """Makes `model.save_pretrained` write the names of published folders, as if it had been loaded from one.

    transformers undoes some renamings only then: since 5.x a CLIP or SigLIP tower's class has no `vision_model` inside
    it, so that a model made from parts would be saved without that word.
    """
    model._weight_conversions = hub_conversions(model)


def hub_names(
    model: Any,
    read: Mapping[str, tuple[str, str | None]],
    read_as: Callable[[str], tuple[str, str | None]],
    unjoined: Callable[[str], str],
) -> dict[str, str]:
    """Each key of a model's files -> the key that published folders have.

    `read_as` says what transformers reads a key as: the model's own name, and the pattern of the pieces that are joined
    into it; `read` is that of each key. Tensors that transformers joins or splits stay the pieces that they are. A key
    whose new name would not be read as the same tensor keeps its own; so do all, where two would have one name.
    """
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = reversed(hub_conversions(model))
    undone: Any = [change.reverse_transform() for change in conversions if isinstance(change, WeightRenaming)]
    names = {key: rename_source_key(unjoined(key), undone, [])[0] for key in read}
    safe = {key: name if read_as(name) == read[key] else key for key, name in names.items()}
    return safe if len(set(safe.values())) == len(safe) else {key: key for key in safe}


def skeleton(config: Mapping[str, Any]) -> Any:
    """The folder's model class on the meta device, or None where transformers has no such class."""
    import transformers

    check_attention("config.json", config)
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


def replaced_by(adapter: Path) -> frozenset[str]:
    """Names of the model's tensors that an adapter folder holds values of its own for, such as a projector's."""
    return frozenset(split_rows(own_name(key))[0] for key in read_weights(adapter))


def shared_tensors(model: nn.Module, replaced: Collection[str] = ()) -> dict[int, Tensor]:
    """What `copy.deepcopy` takes as its memo, so that a copy has these tensors themselves: all but the `replaced`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if name not in replaced}
    return shared | {id(tensor): tensor for tensor in loose_tensors(model)}
