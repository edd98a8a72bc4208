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

from dora_vl.adapters.files import own_name, tied_names
from dora_vl.adapters.folder import read_weights
from dora_vl.core.other_layers import expert_projections
from dora_vl.core.quantised import loose_tensors
from dora_vl.core.trainable import split_rows
from dora_vl.errors import UserError
from dora_vl.files import check_attention, read_json, weight_files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""A base's weights are in the first file where it is there, else in files that the index maps each tensor to."""
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the folder's files."""

    key: str
    """Names the tensor in the files."""
    name: str
    """Names the tensor in the model."""
    file: str
    shape: tuple[int, ...]
    dtype: str
    """Spells the dtype as safetensors does, e.g. BF16."""


@dataclass(frozen=True)
class ExpertPiece:
    """The position of a stored tensor inside experts that the model holds as one tensor."""

    layer: str
    """Names the experts' weight in full: `...experts.gate_up_proj`."""
    expert: int | None
    """The piece belongs to the expert of this number; None means all experts."""
    part: int
    parts: int
    """The piece is the `part`-th of `parts` of the output rows (gate and up)."""
    in_out: bool
    """The piece is stored as [in, out]."""


def holds_weights(folder: Path) -> bool:
    """Tells whether a folder holds a model in safetensors."""
    return any((folder / name).is_file() for name in (INDEX, WEIGHTS))


def config_in(folder: Path) -> dict[str, Any]:
    """Reads a model folder's configuration; empty if it has none."""
    return read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}


class BaseWeights:
    """Opens a folder's safetensors files and reads single tensors; nothing stays in memory between reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.config = config_in(folder)
        if not holds_weights(folder):
            files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise UserError(
                f"{folder} holds no {WEIGHTS}, whole or in shards ({files}); give a "
                "model folder in safetensors (load an older one and save_pretrained it once)"
            )
        self.transposed_layers: frozenset[str] = frozenset()
        """The classes of these layers store their weight as [in, out] (transformers' `Conv1D`, embeddings)."""
        self.expert_pieces: dict[str, ExpertPiece] = {}
        """Maps stored tensors to their position in experts that the model holds as one tensor."""
        self.hub_keys: dict[str, str] = {}
        """Maps a key to its name in published folders; empty for a class that transformers lacks."""
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
        """Yields key, file, shape and dtype of every tensor, from the files that transformers loads."""
        for path in weight_files(self.folder):
            file = str(path.relative_to(self.folder))
            handle = self._open(file)
            for key in handle.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                part = handle.get_slice(key)
                yield key, file, tuple(part.get_shape()), part.get_dtype()

    def _model_names(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Maps the files' keys to the model's own names, and records what the files store in another layout.

        A folder whose class transformers does not have keeps the files' names, and so do tensors that transformers
        joins into one (a matrix for each expert): under the joined name only the last would be left.
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
        read_key = partial(renamed, weight_renamings=renamings, weight_converters=converters)
        read_unmerged = partial(renamed, weight_renamings=renamings, weight_converters=[])
        read = {key: read_key(key) for key in shapes}
        experts = {
            f"{n}.{leaf}": vars(m)["is_transposed"] for n, m in modules.items() for leaf in expert_projections(m)
        }
        for key, (name, pattern) in read.items():
            if name in experts:
                joined = next((c.source_patterns for c in converters if pattern in c.source_patterns), [pattern])
                # Files may store all experts transposed to the model's layout.
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
        self.hub_keys = hub_names(model, read, read_key, read_unmerged)
        self._tied = tied_names(model)
        keys_of = Counter(name for name, _ in read.values())
        return {key: name if name in own and keys_of[name] == 1 else key for key, (name, _) in read.items()}

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / file} is not a whole safetensors file ({error})") from error
        return self._files[file]

    def read(self, name: str) -> Tensor:
        """Reads one tensor by the model's name for it."""
        if name not in self.tensors:
            raise UserError(f"{self.folder} has no tensor {name}; is it the base that the adapter was trained on?")
        stored = self.tensors[name]
        return self._open(stored.file).get_tensor(stored.key)

    def weight_of(self, layer: str) -> Tensor:
        """Reads a layer's weight; refuses a quantised one."""
        weight = self.read(f"{layer}.weight")
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise UserError(f"{self.folder}: {layer} is stored as {weight.dtype}; give the base before quantisation")
        return weight

    def tied_to(self, name: str) -> list[str]:
        """Returns the model's other names for a tensor; what the files store apart is not tied."""
        others = sorted(next((group - {name} for group in self._tied if name in group), ()))
        stored = self.tensors
        return [n for n in others if not {name, n} <= stored.keys() or torch.equal(self.read(name), self.read(n))]


def hub_conversions(model: Any) -> list[Any]:
    """Returns transformers' conversions from a checkpoint's names to this model's that a save has to undo.

    transformers removes a prefix from whole models for text models cut out of a larger one, and adds one for files that
    lack it. Neither shows what published files use, so both are left out. A prefix scoped to one part is that class's
    former layout and is kept.
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
    read_key: Callable[[str], tuple[str, str | None]],
    read_unmerged: Callable[[str], tuple[str, str | None]],
) -> dict[str, str]:
    """Maps each key of a model's files to the key of published folders.

    A tensor that transformers joins or splits keeps its pieces. A key whose new name would not be read back
    as the same tensor stays; all stay where two would get one name. `read_key` maps a key as transformers does, to the
    model's name and the pattern of pieces joined into it (`read` has these), `read_unmerged` without joining pieces.
    """
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    conversions = reversed(hub_conversions(model))
    reversed_renamings: Any = [
        change.reverse_transform() for change in conversions if isinstance(change, WeightRenaming)
    ]
    names = {key: rename_source_key(read_unmerged(key)[0], reversed_renamings, [])[0] for key in read}
    safe = {key: name if read_key(name) == read[key] else key for key, name in names.items()}
    return safe if len(set(safe.values())) == len(safe) else {key: key for key in safe}


def skeleton(config: Mapping[str, Any]) -> Any:
    """Builds the folder's model on the meta device; None if transformers has no such class."""
    import transformers

    check_attention("config.json", config)
    architecture = (config.get("architectures") or [None])[0]
    if architecture is None or architecture not in dir(transformers):
        return None
    model_class = getattr(transformers, architecture)
    # transformers writes infinity, as in a Nemotron H's time steps, as an object
    plain = json.loads(
        json.dumps(dict(config)),
        object_hook=lambda value: float(value["__float__"]) if value.keys() == {"__float__"} else value,
    )
    settings = model_class.config_class.from_dict(plain)
    settings.quantization_config = None
    with torch.device("meta"):
        return model_class(settings)


def replaced_by(adapter: Path) -> frozenset[str]:
    """Names the model's tensors that an adapter folder replaces, such as a projector's."""
    return frozenset(split_rows(own_name(key))[0] for key in read_weights(adapter))


def shared_tensors(model: nn.Module, replaced: Collection[str] = ()) -> dict[int, Tensor]:
    """Makes a `copy.deepcopy` memo, so that the copy shares all tensors but the `replaced`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if name not in replaced}
    return shared | {id(tensor): tensor for tensor in loose_tensors(model)}
