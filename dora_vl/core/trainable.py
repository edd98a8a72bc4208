"""Lists what trains, decided once at injection, for the optimizer, the saver and the loader.

A projector at a learning rate of 2e-5 makes steps that bfloat16 rounds away. So what trains is float32, the rest of a
half-precision model stays as it is, and the modules in between cast at their doors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_vl.core.config import MAIN_PART
from dora_vl.core.functional import accumulation_dtype
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.quantised import QuantisedLinear, is_quantised
from dora_vl.errors import UserError

Gather = Callable[[Iterable[Tensor]], AbstractContextManager[Any]]
"""Makes tensors whole inside a `with` block, also those in shards over ranks (`dora_vl.run.launch`)."""
_ATTRIBUTE = "_dora_vl_trained"
_ROWS = re.compile(r"(.+)\[(-?\d+)?:(-?\d+)?\]")
FACTORS = {"A": "lora_A", "B": "lora_B", "d": "lambda_d", "b": "lambda_b", "magnitude": "magnitude"}
"""Maps the end of a trained part's name, such as `A` of `dora.A`, to the layers' own name of the tensor; `d` and `b`
are DVoRA's vectors."""


@dataclass(frozen=True)
class TrainedPart:
    """Parameters that train under one learning rate.

    A part whose tensors differ in weight decay (a projector's matrices and its biases) appears twice, under one
    name. Vectors never decay: magnitudes, biases and norm scales have no direction to shrink towards.
    """

    name: str
    """Parts of adapted layers are called `dora.A`, `vision.magnitude`..., those of whole weights `projector`..."""
    parameters: dict[str, nn.Parameter]
    weight_decay: bool
    adapts: bool = False
    """True marks what adapted layers add, False weights of the model's own."""

    @property
    def part(self) -> str:
        """Names the part as a run's settings do: `dora` for `targets`, `vision`, `projector`."""
        return self.name.rpartition(".")[0] if self.adapts else self.name

    @property
    def factor(self) -> str | None:
        """Returns `A`, `B`, `magnitude`... for adapted layers; None for whole weights."""
        return self.name.rpartition(".")[2] if self.adapts else None


class _PartNames(NamedTuple):
    name: str
    parameters: tuple[str, ...]
    weight_decay: bool
    adapts: bool


class TrainedList(NamedTuple):
    """Lists by name what trains and what is kept, decided once per model."""

    parts: tuple[_PartNames, ...]
    also_keep: tuple[str, ...]


def no_gather(tensors: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Gathers nothing, because the parameters are whole already."""
    return nullcontext(list(tensors))


def match_names(names: Iterable[str], patterns: Iterable[str], what: str) -> list[str]:
    """Lists the names that some full-name glob matches, in order."""
    names = list(names)
    hits: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            nearest = get_close_matches(pattern.replace("*", ""), names, n=3, cutoff=0.0)
            hint = f"; did you mean '*.{pattern}'?" if any(name.endswith(f".{pattern}") for name in names) else ""
            raise UserError(f"{what}: pattern {pattern!r} matches none of {len(names)} names, such as {nearest}{hint}")
        hits.update(matched)
    return [name for name in names if name in hits]


def choose_trained(
    model: nn.Module,
    *,
    full_modules: Iterable[str],
    also_train: Mapping[str, tuple[str, ...]],
    also_keep: tuple[str, ...],
    gather: Gather,
    part_of: Callable[[str], str] = lambda layer: MAIN_PART,
) -> None:
    """Freezes everything, then makes the adapters, `full_modules`' own weights and the extras train."""
    model.requires_grad_(False)
    # By part and factor: `dora.A`, `dora.B`, ... before `vision.A`.
    by_part: dict[str, list[str]] = {f"{MAIN_PART}.{factor}": [] for factor in FACTORS}
    for layer, module in adapted_layers(model):
        for factor, leaf in FACTORS.items():
            if module._parameters.get(leaf) is not None:
                by_part.setdefault(f"{part_of(layer)}.{factor}", []).append(f"{layer}.{leaf}")
    adapting = frozenset(by_part)
    full = set(full_modules)
    by_part["full"] = [name for name in own_parameters(model) if name.rpartition(".")[0] in full]
    if full and not by_part["full"]:
        raise UserError(f"targets match {sorted(full)[:3]}, which hold no parameters; name modules with weights")
    adapter_tensors = {f"{layer}.{leaf}" for layer, _ in adapted_layers(model) for leaf in FACTORS.values()}
    candidates = [name for name in own_parameters(model) if name not in adapter_tensors]
    for part, patterns in also_train.items():
        by_part[part] = match_names(candidates, patterns, f"also_train.{part}")
    _refuse_untrainable(model, by_part)
    keep = _kept_names(all_tensors(model), also_keep)
    if not full:  # a full run's masters are its optimizer's, for these weights as for all others
        _train_in_float32(model, [name for part in also_train for name in by_part[part]], gather)
    parameters, parts = own_parameters(model, remove_duplicate=False), []
    for part, names in by_part.items():
        adapts = part in adapting
        with gather([parameters[name] for name in names]):
            # A stack of experts' magnitudes is a stack of vectors.
            stacks = {name for name in names if adapts and name.endswith(".magnitude")}
            matrices = tuple(name for name in names if parameters[name].ndim > 1 and name not in stacks)
        vectors = tuple(name for name in names if name not in set(matrices))
        decays = (matrices, True), (vectors, False)
        parts += [_PartNames(part, tensors, decay, adapts) for tensors, decay in decays if tensors]
    setattr(model, _ATTRIBUTE, TrainedList(tuple(parts), keep))
    for part in trained_parts(model):
        for parameter in part.parameters.values():
            parameter.requires_grad_(True)


def refuse_unmatched(model: nn.Module, also_train: Mapping[str, tuple[str, ...]], also_keep: tuple[str, ...]) -> None:
    """Raises a `UserError` if a pattern would match nothing, before the model is changed."""
    for part, patterns in also_train.items():
        match_names((name for name, _ in model.named_parameters()), patterns, f"also_train.{part}")
    _kept_names(all_tensors(model), also_keep)


def trained_parts(model: nn.Module) -> tuple[TrainedPart, ...]:
    """Lists what trains, as `apply_dora` or `load_adapter` decided it for this model."""
    parameters = own_parameters(model, remove_duplicate=False)
    return tuple(
        TrainedPart(part.name, {name: parameters[name] for name in part.parameters}, part.weight_decay, part.adapts)
        for part in trained_list(model).parts
    )


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns frozen tensors that the adapter folder carries too; a name may end in rows, which `kept_rows` takes."""
    tensors = all_tensors(model)
    return {name: tensors[split_rows(name)[0]] for name in trained_list(model).also_keep}


def split_rows(name: str) -> tuple[str, slice]:
    """Splits a kept tensor's name into the tensor's name and its rows: `shared.weight[-200:]`, or all."""
    match = _ROWS.fullmatch(name)
    if match is None:
        return name, slice(None)
    return match[1], slice(int(match[2]) if match[2] else None, int(match[3]) if match[3] else None)


def kept_rows(name: str, tensor: Tensor) -> Tensor:
    """Returns, as a view, the rows of a whole (gathered) tensor that its listed name selects."""
    rows = split_rows(name)[1]
    return tensor if rows == slice(None) else tensor[rows]


def _kept_names(names: Iterable[str], patterns: Iterable[str]) -> tuple[str, ...]:
    """Lists full names for the globs of `also_keep`, each with its pattern's rows."""
    names, kept = list(names), []
    for pattern in patterns:
        glob, rows = split_rows(pattern)
        ending = pattern.removeprefix(glob) if rows != slice(None) else ""
        kept += [f"{name}{ending}" for name in match_names(names, (glob,), "also_keep")]
    return tuple(dict.fromkeys(kept))


def is_adapted(model: nn.Module) -> bool:
    """Tells whether `apply_dora` or `load_adapter` has adapted the model."""
    return _ATTRIBUTE in vars(model)


def forget_trained(model: nn.Module) -> None:
    """Makes the model count as not adapted, once its own layers are back."""
    vars(model).pop(_ATTRIBUTE, None)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yields every adapted layer with its full name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield name, module


def trained_list(model: nn.Module) -> TrainedList:
    """Returns what trains in an adapted model, by name."""
    if not is_adapted(model):
        raise ValueError("the model has no adapter; call apply_dora(model, config) or load_adapter(model, folder)")
    return vars(model)[_ATTRIBUTE]


def own_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Lists parameters by their names before adaptation; an adapted quantised layer holds the original as a child."""
    inside = {f"{name}.base": name for name, layer in adapted_layers(model) if isinstance(layer, QuantisedLinear)}
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        owner, dot, leaf = name.rpartition(".")
        parameters[f"{inside.get(owner, owner)}{dot}{leaf}"] = parameter
    return parameters


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Lists parameters, under each of their names, and buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _refuse_untrainable(model: nn.Module, by_part: Mapping[str, list[str]]) -> None:
    """Refuses what would train twice, or not at all: an adapted layer's frozen weight, and quantised integers."""
    owner: dict[str, str] = {}
    frozen = {id(layer.weight): name for name, layer in adapted_layers(model)}
    parameters = own_parameters(model)
    for part, names in by_part.items():
        for name in names:
            if name in owner:
                raise UserError(f"parameter {name} would train twice, in {owner[name]!r} and in {part!r}")
            if layer := frozen.get(id(parameters[name])):
                raise UserError(f"{part}: {name} is the frozen weight of the adapted layer {layer}; take one out")
            if not parameters[name].is_floating_point():
                raise UserError(
                    f"{part}: {name} is quantised and cannot train; adapt its layer, or load the base whole"
                )
            owner[name] = part


_ORIGINAL_DTYPES = "_dora_vl_before_float32"
"""A module that `_train_in_float32` changed holds here its parameters' original dtypes, and the hooks that cast."""


_BIAS = "_dora_vl_bias"
"""A quantised layer holds its trained bias here while it computes."""


def _train_in_float32(model: nn.Module, names: Iterable[str], gather: Gather) -> None:
    """Makes the named parameters float32; their modules compute in float32 and return their original dtype.

    A module computes in one dtype, so its frozen parameters follow, and so does whatever else holds a parameter tied
    to a trained one; an adapted layer casts a trained bias itself, and only that bias changes. The weight of a
    quantised layer is codes, so its bias is added after it. A module that trains whole casts at its own doors, and what
    is inside computes in float32 with it; where parts stay frozen, the module casts only its output, and what is inside
    casts for itself. Parameters are replaced, not converted: a sharded one cannot change its dtype.
    """
    parameters = own_parameters(model, remove_duplicate=False)
    trained = {id(parameters[name]) for name in names}
    leaves: dict[nn.Module, list[str]] = {}
    while True:
        for module in model.modules():
            tensors = dict(module.named_parameters(recurse=False))
            if any(id(parameter) in trained for parameter in tensors.values()):
                has_own_dtypes = isinstance(module, AdaptedLayer) or is_quantised(module)
                cast_all = not has_own_dtypes and next(module.children(), None) is None
                leaves[module] = [leaf for leaf, parameter in tensors.items() if cast_all or id(parameter) in trained]
        tied = {id(module._parameters[leaf]) for module, tensors in leaves.items() for leaf in tensors}
        if tied <= trained:
            break
        trained |= tied
    whole = {module for module in leaves if all(id(parameter) in trained for parameter in module.parameters())}
    inside = {inner for module in whole for inner in module.modules() if inner is not module}
    module_dtypes = {module: next(module.parameters(recurse=False)).dtype for module in leaves}
    for module, dtype in module_dtypes.items():
        dtypes, hooks = vars(module).setdefault(_ORIGINAL_DTYPES, ({}, []))
        for leaf in leaves[module]:
            parameter = module.get_parameter(leaf)
            wide = accumulation_dtype(parameter.dtype)
            if parameter.dtype != wide:
                dtypes[leaf] = parameter.dtype
                _replace(model, parameter, wide, gather)
        if module not in inside:
            hooks += _casting_hooks(module, dtype, inputs=module in whole)


def _casting_hooks(module: nn.Module, dtype: torch.dtype, *, inputs: bool) -> list[RemovableHandle]:
    """Makes a module that computes in float32 take and return its original dtype; returns the hooks."""
    if is_quantised(module):
        taken_off = module.register_forward_pre_hook(_take_bias_off)
        return [taken_off, module.register_forward_hook(_add_bias, always_call=True)]
    if isinstance(module, AdaptedLayer) or dtype == accumulation_dtype(dtype):
        return []
    hooks = [module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)] if inputs else []
    return [*hooks, module.register_forward_hook(partial(_cast_output, dtype=dtype))]


def train_in_own_dtype(model: nn.Module) -> None:
    """Undoes `_train_in_float32`: its parameters are rounded to their original dtypes, and nothing casts any more.

    Shards of ZeRO-3 have no values here to round; modules that hold some stay as they are.
    """
    for module in model.modules():
        tensors = dict(module.named_parameters(recurse=False))
        if any(parameter.numel() == 0 for parameter in tensors.values()):
            continue
        dtypes, hooks = vars(module).pop(_ORIGINAL_DTYPES, ({}, []))
        for leaf, dtype in dtypes.items():
            _replace(model, tensors[leaf], dtype, no_gather)
        for hook in hooks:
            hook.remove()


def _replace(model: nn.Module, old: nn.Parameter, dtype: torch.dtype, gather: Gather) -> None:
    with gather([old]):
        new = nn.Parameter(old.detach().to(dtype).clone(), old.requires_grad)
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is old:
                module.register_parameter(leaf, new)


def _cast_inputs(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    widened = {name: _cast(value, torch.float32) for name, value in kwargs.items()}
    return tuple(_cast(value, torch.float32) for value in inputs), widened


def _cast_output(module: nn.Module, inputs: tuple[Any, ...], output: Any, *, dtype: torch.dtype) -> Any:
    return _cast(output, dtype)


def _take_bias_off(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Hides a trained bias while a quantised layer computes: bitsandbytes would round it to the input's dtype."""
    vars(module)[_BIAS] = module._parameters["bias"]
    module._parameters["bias"] = None


def _add_bias(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Puts the bias back, also after an error, and adds it in its own dtype."""
    bias = module._parameters["bias"] = vars(module).pop(_BIAS)
    return (output.to(bias.dtype) + bias).to(output.dtype) if isinstance(output, Tensor) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
