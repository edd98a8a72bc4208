"""A base model's folder, read one tensor at a time by the names that the model itself uses.

Files may use older names than the class that loads them (`language_model.model.layers...` for what is now
`model.language_model.layers...`). transformers keeps the renamings; they are applied to the files' keys here, and
undone for what is written: published folders have the older names, which vLLM and other tools read.

A base may be quantised when it is loaded (QDoRA). Loading and merging share which layers, how, and the values that they
then have, so that what is merged is what was trained on.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.adapters.files import own_name, tied_names
from dora_vl.adapters.folder import read_weights
from dora_vl.core.config import Quantisation
from dora_vl.core.other_layers import expert_projections
from dora_vl.core.quantised import class_path, dequantised, loose_tensors, quantised_in, settle_quantised
from dora_vl.core.trainable import split_rows
from dora_vl.errors import MissingExtra, UserError, one_line, short_repr
from dora_vl.files import check_attention, read_json, weight_files
from dora_vl.shapes import Float

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


TRIAL_WIDTH = 64
MOST_OFF = 0.05
"""A quantised layer may be off its dequantised weight by this relative error. LLM.int8 rounds its input to 127 steps,
which costs about 0.01; a lost gradient, or one of another block's scales, is off by far more."""
NEXT = "set model.quantisation to another kind, or null"


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a linear layer."""

    package: str
    layer: Callable[[nn.Linear, torch.dtype, torch.device], nn.Module]
    """Quantises a linear layer's weight as loading in a dtype on a device does."""
    width: int = 1
    """A layer's inputs must be a multiple of this; other layers stay whole."""


def _nf4(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layers: Any = import_module("bitsandbytes.nn")  # pyright takes its parameters for modules
    width, height = linear.in_features, linear.out_features
    layer: Any = layers.Linear4bit(width, height, linear.bias is not None, dtype, quant_type="nf4", device="meta")
    layer.weight = layers.Params4bit(linear.weight.data.to(dtype), requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    return layer.to(device)


def _int8(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layers: Any = import_module("bitsandbytes.nn")  # pyright takes its parameters for modules
    width, height = linear.in_features, linear.out_features
    layer: Any = layers.Linear8bitLt(
        width, height, linear.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    layer.weight = layers.Int8Params(linear.weight.data.to(dtype), requires_grad=False, has_fp16_weights=False).to(
        device
    )
    layer.bias = linear.bias
    return layer


SCHEMES: Mapping[str, Scheme] = {
    # On a CPU bitsandbytes 0.50 gives weights back with other blocks' scales where a row ends inside a block of 64.
    "nf4": Scheme("bitsandbytes", _nf4, width=64),
    "int8": Scheme("bitsandbytes", _int8),
}


def here() -> torch.device:
    """Returns where quantised layers are made: this process's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_runs_here(kind: Quantisation, dtype: torch.dtype) -> None:
    """Tries one small layer, forward and backward."""
    scheme = SCHEMES[kind]
    if find_spec(scheme.package) is None:
        raise MissingExtra(f"model.quantisation: {kind} needs {scheme.package}", "quantised")
    try:
        layer = scheme.layer(nn.Linear(TRIAL_WIDTH, TRIAL_WIDTH, bias=False), dtype, here())
        settle_quantised(layer)
        off = share_off(layer, dtype)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, ImportError) as error:
        raise UserError(
            f"model.quantisation: {kind} does not run on this {here().type} in {str(dtype).removeprefix('torch.')} "
            f"({one_line(str(error), 200)}); take another kind, or null"
        ) from error
    if not off <= MOST_OFF:
        raise UserError(f"model.quantisation: {kind} multiplies wrongly on this {here().type} ({off:.1%} off); {NEXT}")


def check_gradients(model: nn.Module) -> None:
    """Checks that one quantised layer of each class and shape trains as its dequantised weight would."""
    checked: set[tuple[str, int, int]] = set()
    for name, layer, kind in quantised_in(model):
        alike = class_path(layer), layer.in_features, layer.out_features
        if alike in checked:
            continue
        checked.add(alike)
        off = share_off(layer, kind.dtype(layer) if layer.bias is None else layer.bias.dtype)
        if not off <= MOST_OFF:
            raise UserError(
                f"{name.removesuffix('.base')}: output or gradient of a {type(layer).__name__} is {off:.1%} off "
                f"that of its dequantised weight; {NEXT}"
            )


def share_off(layer: Any, dtype: torch.dtype) -> float:
    """Compares a quantised layer's product and input gradient with its dequantised weight's; returns a ratio of norms.

    It runs in training mode, after a pass in eval mode: packages prepare weights for inference there.
    """
    weight, was_training = dequantised(layer).float(), layer.training
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, width, generator=draw).to(weight.device, dtype) for width in weight.shape[::-1])
    with torch.no_grad():
        layer.eval()(x)
    y = layer.train()(x.requires_grad_())
    layer.train(was_training)
    dx = torch.autograd.grad(y, x, dy)[0] if y.requires_grad else torch.zeros_like(x)
    bias = None if layer.bias is None else layer.bias.detach().float()
    pairs = ((y.detach(), F.linear(x.detach().float(), weight, bias)), (dx, dy.float() @ weight))
    return max(float((quantised.float() - right).norm() / right.norm().clamp_min(1e-30)) for quantised, right in pairs)


@dataclass(frozen=True)
class QuantisedLayers:
    """Full names of a language model's linear layers: the quantised ones, and those too narrow for it."""

    quantised: tuple[str, ...]
    too_narrow: tuple[str, ...]


def quantised_layers(config: Mapping[str, Any], kind: str, source: str) -> QuantisedLayers:
    """Selects the layers to quantise: the language model's linears, not those of vision, projector or output head."""
    if config.get("quantization_config"):
        raise UserError(f"{source} is stored quantised; leave model.quantisation null, or take the weights before it")
    model = _language_skeleton(config, source)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    fits = {
        name: module.in_features % SCHEMES[kind].width == 0
        for name, module in decoder.named_modules(prefix=prefix)
        if type(module) is nn.Linear and module is not head
    }
    if not any(fits.values()):
        raise UserError(
            f"{source}: none of its language model's {len(fits)} linear layers can be quantised by {kind} (widths that "
            f"are multiples of {SCHEMES[kind].width}); set model.quantisation to another kind, or null"
        )
    names = {fit: tuple(name for name, layer_fits in fits.items() if layer_fits == fit) for fit in (True, False)}
    return QuantisedLayers(quantised=names[True], too_narrow=names[False])


def _language_skeleton(config: Mapping[str, Any], source: str) -> Any:
    model = skeleton(config)
    if model is None:
        raise UserError(
            f"{source}: transformers has no class {short_repr(config.get('architectures'))} that it could quantise"
        )
    return model


def kept_whole(config: Mapping[str, Any], layers: tuple[str, ...], source: str) -> list[str]:
    """Names the outermost modules that hold linear layers and no quantised one, as transformers asks for them."""
    from transformers.pytorch_utils import Conv1D

    parts = [name.split(".") for name in layers]
    above = {".".join(part[:count]) for part in parts for count in range(len(part) + 1)}
    return [
        name
        for name, module in _language_skeleton(config, source).named_modules()
        if name not in above
        and name.rpartition(".")[0] in above
        and any(isinstance(layer, nn.Linear | Conv1D) for layer in module.modules())
    ]


def quantised_values(weight: Float[Tensor, "out in_"], kind: str, dtype: torch.dtype) -> Float[Tensor, "out in_"]:
    """Returns a weight's float32 values on the CPU after it is loaded in `dtype` and quantised."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        return dequantised(SCHEMES[kind].layer(linear, dtype, here())).float().cpu()


class QuantisedWeights(BaseWeights):
    """Reads a base's folder with the values that its layers have under `model.quantisation`."""

    def __init__(self, folder: Path, kind: Quantisation, dtype: torch.dtype) -> None:
        check_runs_here(kind, dtype)
        super().__init__(folder)
        self._kind, self._dtype = kind, dtype
        self._quantised = {f"{name}.weight" for name in quantised_layers(self.config, kind, str(folder)).quantised}

    def read(self, name: str) -> Tensor:
        """Reads one tensor, quantised and back where its layer is; see `BaseWeights.read`."""
        tensor = super().read(name)
        return quantised_values(tensor, self._kind, self._dtype) if name in self._quantised else tensor


def as_trained(folder: Path, recipes: Mapping[str, Mapping[str, Any]]) -> BaseWeights:
    """Opens a base with the values that adapters were trained on: quantised and back if their recipes say so."""
    values = {name: (recipe.get("quantisation"), recipe.get("dtype")) for name, recipe in recipes.items()}
    kinds = {(kind, dtype if kind else None) for kind, dtype in values.values()}
    if len(kinds) > 1:
        raise UserError(
            f"these adapters were trained on different values of the base: {short_repr(values, 200)}; merge one at "
            "a time, or all into the stored values with --base-values stored"
        )
    kind, dtype = kinds.pop()
    if kind is None:
        return BaseWeights(folder)
    if kind not in SCHEMES or dtype is None:
        raise UserError(
            f"recipe.json says quantisation {short_repr(kind)} in {short_repr(dtype)}; known are {', '.join(SCHEMES)}"
        )
    return QuantisedWeights(folder, kind, getattr(torch, dtype))
