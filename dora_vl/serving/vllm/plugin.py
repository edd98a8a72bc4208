"""The entry point that vLLM calls in each of its processes: looks at this vLLM, and changes it only if it is known.

An adapter's way into vLLM's slots: `magnitude` beside A and B in a layer's weights, then the layer's gains. Written
against the classes of vllm/lora without importing them. `VLLM_PLUGINS` chooses plugins by name; its own is `dora_vl`.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dora_vl.errors import shown_names
from dora_vl.serving.vllm.layer import EXPORT, LORA_B, DoRALayer, UnservableAdapter, as_factor, take_magnitudes

log = logging.getLogger("vllm.dora_vl")  # below vLLM's own, whose handler and level it so has
UNTESTED = "DORA_VL_UNTESTED_VLLM"
"""Set to 1, it has a version tried that the plugin was never run with, if its places are the same."""
_done = False


def register() -> None:
    """Lets vLLM serve DoRA adapters, or leaves it as it is with one line that says why; once, however often called."""
    global _done
    if _done:
        return
    _done = True
    version = str(import_module("vllm").__version__)
    try:  # vLLM's own look at an adapter's config may let `use_dora` pass
        helper = import_module(HELPER).PEFTHelper
        config = helper.from_dict({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "use_dora": True})
        if config.use_dora and not config._validate_features():
            log.info("dora_vl: vLLM %s takes DoRA adapters itself; its own way is left to it", version)
            return
    except (ImportError, AttributeError, TypeError, ValueError):
        pass
    minor, *tested = (release.split("+")[0].split(".")[:2] for release in (version, *TESTED))
    if minor not in tested and os.environ.get(UNTESTED) != "1":
        reason = f"version {version} was never tried; {UNTESTED}=1 tries it"
    else:
        reason = difference()
    if reason is not None:
        log.warning(
            "dora_vl: DoRA adapters are not served and vLLM is left as it is: %s (tested with vLLM %s)",
            reason,
            ", ".join(TESTED),
        )
        return
    install()
    if mend():
        log.info(
            "dora_vl: %s.%s of vLLM %s gives rows of the base the last slot's adapter; mended", KERNELS, SHRINK, version
        )


# A fault of vLLM's CPU kernels: rows of the base (slot -1) are given the adapter of the last slot.
#
# vllm/lora/ops/torch_ops/lora_ops.py:74 (0.32.0) takes a row's A by `lora_b_weights[lora_indices_tensor]`, where -1 is
# the last one. With a slot left empty nobody sees it; with all full the base answers as that slot's A and B would.


KERNELS = "vllm.lora.ops.torch_ops.lora_ops"
USERS = ("vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")
"""Modules that have the function by name."""
SHRINK = "bgmv_shrink"


def mend() -> bool:
    """Has the product with A leave nothing in rows of the base; whether there was something to mend."""
    kernels = import_module(KERNELS)
    shrink = getattr(kernels, SHRINK)
    rows, weights, output = torch.ones(1, 2), torch.ones(1, 1, 1, 2), torch.zeros(1, 1)
    shrink(rows, weights, output, torch.tensor([-1]), 1.0)
    if not output.any():
        return False

    def bgmv_shrink(
        inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
    ) -> None:
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0  # B then adds nothing, whichever B it is

    for module in (kernels, *map(import_module, USERS)):
        setattr(module, SHRINK, bgmv_shrink)
    return True


# The places of vLLM that the plugin changes or reads, and whether a vLLM has them as they were when it was tested.


@dataclass(frozen=True)
class Place:
    """A function, method or tuple of vLLM.

    Attributes:
        parameters: of its signature, in order; None for what is no function.
        reads: names that its code must use: attributes that are made there, or what it must look up anew.
    """

    module: str
    name: str
    parameters: tuple[str, ...] | None = None
    reads: tuple[str, ...] = ()


TESTED = ("0.32.0", "0.33.0")
"""Versions that the plugin was run with; others of the same minor version are tried if their places are the same.

0.33.0 was its Python code over the CPU kernels of 0.32.0: no CPU build of it was to be had."""
HELPER = "vllm.lora.peft_helper"
MODEL = "vllm.lora.lora_model"
WEIGHTS = "vllm.lora.lora_weights"
MANAGER = "vllm.lora.model_manager"
CLASSES = "vllm.lora.utils"
LAYERS = "vllm.lora.layers"
PUNICA = "vllm.lora.punica_wrapper.punica_base"
LINEAR = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
    "ColumnParallelLinearWithShardedLoRA",
    "QKVParallelLinearWithShardedLoRA",
    "MergedColumnParallelLinearWithShardedLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
    "MergedQKVParallelLinearWithShardedLoRA",
    "RowParallelLinearWithShardedLoRA",
)
"""The wrappers of `LAYERS` that get gains; a later vLLM's further ones get none, and magnitudes there are refused."""
LAYER_NAMES = ("base_layer", "input_size", "tp_size", "device")
FROM_TENSORS = ("tensors", "peft_helper", "device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")
PLACES = (
    Place(HELPER, "PEFTHelper._validate_features", ("self",), ("use_dora", "modules_to_save")),
    Place(HELPER, "PEFTHelper.validate_legal", ("self", "lora_config"), ("_validate_features",)),
    Place(WEIGHTS, "LoRALayerWeights.from_config", None, ("get_rank_and_scaling",)),  # rank_pattern, alpha_pattern
    Place(MODEL, "parse_fine_tuned_lora_name", ("name", "weights_mapper")),
    Place(MODEL, "LoRAModel.from_lora_tensors", ("lora_model_id", *FROM_TENSORS), ("parse_fine_tuned_lora_name",)),
    Place(MODEL, "LoRAModel._should_skip_module", ("module_name", "skip_prefixes")),
    Place(WEIGHTS, "PackedLoRALayerWeights.pack", ("loras",), ("optimize",)),
    Place(MANAGER, "LoRAModelManager._create_merged_loras_inplace", ("self", "lora_model"), ("pack", "optimize")),
    Place(MANAGER, "LoRAModelManager._add_adapter", ("self", "lora"), ("_create_merged_loras_inplace",)),
    Place(MANAGER, "LoRAModelManager.activate_adapter", ("self", "lora_id"), ("lora_index_to_id", "set_lora")),
    Place(MANAGER, "LoRAModelManager._get_lora_layer_weights", ("self", "lora_model", "module_name")),
    Place(
        MANAGER,
        "LoRAModelManager.__init__",
        None,
        ("lora_index_to_id", "_registered_adapters", "modules", "lora_config"),
    ),
    Place(CLASSES, "_all_lora_classes"),
    Place(CLASSES, "from_layer", None, ("_all_lora_classes", "create_lora_weights")),
    Place(LAYERS, "base_linear.BaseLinearLayerWithLoRA.__init__", ("self", "base_layer"), LAYER_NAMES),
    Place(LAYERS, "base_linear.BaseLinearLayerWithLoRA.apply", ("self", "x", "bias")),
    Place(
        LAYERS,
        "base_linear.BaseLinearLayerWithLoRA.create_lora_weights",
        ("self", "max_loras", "lora_config", "model_config"),
        ("output_slices", "n_slices", "output_size"),
    ),
    Place(LAYERS, "RowParallelLinearWithLoRA.slice_lora_a", ("self", "lora_a"), ("tp_rank",)),
    Place(LAYERS, "ColumnParallelLinearWithLoRA.slice_lora_b", ("self", "lora_b"), ("tp_rank",)),
    Place(LAYERS, "MergedColumnParallelLinearWithLoRA.slice_lora_b", ("self", "lora_b"), ("output_slices",)),
    *(Place(LAYERS, f"{name}.apply", ("self", "x", "bias")) for name in LINEAR),
    Place("vllm.model_executor.layers.linear", "LinearBase.__init__", None, ("params_dtype", "quant_method")),
    Place(KERNELS, SHRINK, ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor", "scaling")),
    Place(PUNICA, "PunicaWrapperBase.__init__", None, ("_token_lora_indices",)),
    Place(PUNICA, "PunicaWrapperBase._update_base_metadata", None, ("_token_lora_indices", "copy_")),
)
"""As they are in vLLM 0.32.0; docs/export.md says what the plugin does in each file."""


def difference(symbols: Iterable[Place] = PLACES) -> str | None:
    """The first symbol that this vLLM does not have as it is written down; None where all are as they were."""
    for symbol in symbols:
        where = f"{symbol.module}.{symbol.name}"
        try:
            member: Any = import_module(symbol.module)
            for part in symbol.name.split("."):
                member = getattr(member, part)
        except (ImportError, AttributeError):
            return f"{where} is not there"
        names = tuple(inspect.signature(member).parameters) if callable(member) else ()
        if symbol.parameters is not None and names != symbol.parameters:
            return f"{where} takes ({', '.join(names)}), not ({', '.join(symbol.parameters)})"
        code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
        if missing := set(symbol.reads) - set(() if code is None else code.co_names):
            return f"{where} does without {', '.join(sorted(missing))}"
    return None


# The plugin's functions in vLLM's places, each as `places` lists it.
#
# What was there is called from what takes its place, so that adapters without magnitudes go the way they went. Files
# and lines are those of vLLM 0.32.0.


WHOLE_MODULES = f"It holds whole trained modules beside A and B: {EXPORT}."


def install() -> None:
    """Puts all of them in; once a process."""
    accept_configs(import_module(HELPER).PEFTHelper)
    keep_magnitudes(import_module(MODEL))
    pack_magnitudes(import_module(WEIGHTS).PackedLoRALayerWeights)
    give_gains_to_slots(import_module(MANAGER).LoRAModelManager)
    wrap_layers(import_module(CLASSES), import_module(LAYERS))


def accept_configs(helper: Any) -> None:
    """vllm/lora/peft_helper.py:53: `use_dora` is no reason to refuse; whole modules are told what to do about."""
    refused = helper._validate_features

    def _validate_features(self: Any) -> list[str]:
        config = copy.copy(self)
        config.use_dora = False
        reasons = refused(config)
        config.modules_to_save = None
        return [*reasons, WHOLE_MODULES] if len(refused(config)) < len(reasons) else reasons

    helper._validate_features = _validate_features


def keep_magnitudes(module: Any) -> None:
    """vllm/lora/lora_model.py:120: magnitudes are taken out of the tensors and put beside their layer's A and B.

    The names of a file are looked at before (:259) with this module's `parse_fine_tuned_lora_name`.
    """
    parse, model = module.parse_fine_tuned_lora_name, module.LoRAModel
    from_tensors = model.from_lora_tensors.__func__

    def parse_fine_tuned_lora_name(name: str, weights_mapper: Any = None) -> Any:
        return parse(as_factor(name), weights_mapper)

    def from_lora_tensors(
        cls: Any, lora_model_id: int, tensors: dict[str, Tensor], peft_helper: Any, *rest: Any, **named: Any
    ) -> Any:
        magnitudes = take_magnitudes(tensors, use_dora=peft_helper.use_dora)
        adapter = from_tensors(cls, lora_model_id, tensors, peft_helper, *rest, **named)
        left_out = named.get("skip_prefixes") or []
        for layer, magnitude in magnitudes.items():
            if not cls._should_skip_module(layer, left_out):
                name, _ = parse(layer + LORA_B, named.get("weights_mapper"))
                adapter.loras[name].magnitude = magnitude
        return adapter

    module.parse_fine_tuned_lora_name = parse_fine_tuned_lora_name
    model.from_lora_tensors = classmethod(from_lora_tensors)


def pack_magnitudes(packed: Any) -> None:
    """vllm/lora/lora_weights.py:135: what stands for q, k and v in one keeps the magnitudes of its parts."""
    pack = packed.pack.__func__

    def pack_with_magnitudes(cls: Any, loras: Any) -> Any:
        weights = pack(cls, loras)
        weights.magnitude = magnitude_of_parts(loras)
        return weights

    packed.pack = classmethod(pack_with_magnitudes)


def give_gains_to_slots(manager: Any) -> None:
    """vllm/lora/model_manager.py:838 and :346: gains when an adapter is taken in, and with A and B into its slot."""
    merge, activate = manager._create_merged_loras_inplace, manager.activate_adapter

    def _create_merged_loras_inplace(self: Any, lora_model: Any) -> None:
        before = magnitudes_of(lora_model)
        merge(self, lora_model)
        compute_gains(
            self.modules,
            before,
            lambda name: self._get_lora_layer_weights(lora_model, name),
            max_rank=self.lora_config.max_lora_rank,
            elsewhere=lambda name: is_elsewhere(self.model, name),
        )

    def activate_adapter(self: Any, lora_id: int) -> bool:
        fresh = activate(self, lora_id)
        if fresh:
            adapter = self._registered_adapters[lora_id]
            slot = self.lora_index_to_id.index(lora_id)
            write_gains(self.modules, slot, lambda name: self._get_lora_layer_weights(adapter, name))
        return fresh

    manager._create_merged_loras_inplace = _create_merged_loras_inplace
    manager.activate_adapter = activate_adapter


def is_elsewhere(model: torch.nn.Module, name: str) -> bool:
    """Whether a layer is on another rank of a pipeline: what it would stand in is not here."""
    from vllm.distributed import get_pp_group  # pyright: ignore[reportMissingImports]

    try:
        model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return get_pp_group().world_size > 1
    return False


def wrap_layers(module: Any, layers: Any) -> None:
    """vllm/lora/utils.py:79: each wrapper of a linear layer with `DoRALayer` in front, under its own name."""
    linear = {getattr(layers, name) for name in LINEAR}

    def with_gains(wrapper: type) -> type:
        if wrapper not in linear:
            return wrapper
        own: dict[str, Any] = {"__module__": wrapper.__module__, "__doc__": wrapper.__doc__}
        if issubclass(wrapper, layers.RowParallelLinearWithLoRA):
            own |= {"shards_inputs": True, "sum_of_ranks": staticmethod(sum_over_ranks)}
        return type(wrapper.__name__, (DoRALayer, wrapper), own)

    module._all_lora_classes = tuple(with_gains(item) for item in module._all_lora_classes)


def sum_over_ranks(part: Tensor) -> Tensor:
    """The sum over a row-parallel layer's ranks."""
    from vllm.distributed import tensor_model_parallel_all_reduce  # pyright: ignore[reportMissingImports]

    return tensor_model_parallel_all_reduce(part)


# Magnitudes of packed weights, and gains in slots.

Lookup = Callable[[str], Any]
"""An adapter's weights of a layer, by vLLM's name of the layer; None where it has none."""


def magnitudes_in(weights: Any) -> list[Tensor]:
    """The magnitudes of a layer's weights: one, or those of the parts that were packed into one."""
    magnitudes = getattr(weights, "magnitude", None)
    parts = magnitudes if isinstance(magnitudes, list) else [magnitudes]
    return [part for part in parts if part is not None]


def magnitude_of_parts(parts: Iterable[Any]) -> list[Tensor | None] | None:
    """What packed weights keep of their parts; a part that is not adapted, or has no magnitude, leaves a gap."""
    magnitudes = [getattr(part, "magnitude", None) for part in parts]
    return magnitudes if any(magnitude is not None for magnitude in magnitudes) else None


def magnitudes_of(adapter: Any) -> dict[str, list[Tensor]]:
    """The magnitudes of each of an adapter's layers, by vLLM's name of the layer."""
    return {name: magnitudes for name, weights in adapter.loras.items() if (magnitudes := magnitudes_in(weights))}


def compute_gains(
    modules: Mapping[str, Any],
    before: Mapping[str, list[Tensor]],
    lookup: Lookup,
    *,
    max_rank: int,
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> None:
    """Computes every layer's gains once, when vLLM has packed an adapter's weights and before it takes it in.

    Args:
        modules: the wrapped layers, by vLLM's names.
        before: `magnitudes_of` of the adapter before its weights were packed.
        lookup: the adapter's weights as packed.
        elsewhere: whether a layer is on another rank of a pipeline.
    """
    layers = {name: module for name, module in modules.items() if isinstance(module, DoRALayer)}
    served = {name: weights for name in layers if magnitudes_in(weights := lookup(name))}
    applied = {id(magnitude) for weights in served.values() for magnitude in magnitudes_in(weights)}
    lost = [
        name for name, magnitudes in before.items() if not {*map(id, magnitudes)} <= applied and not elsewhere(name)
    ]
    if lost:
        raise UnservableAdapter(
            f"vLLM applies no magnitudes to {len(lost)} of the adapter's layers: {shown_names(sorted(lost))} "
            f"(experts, embeddings, output heads, and what it keeps in a class of its own); {EXPORT}"
        )
    for name, weights in served.items():
        factors = weights.lora_a if isinstance(weights.lora_a, list) else [weights.lora_a]
        highest = max(len(factor) for factor in factors if factor is not None)
        if highest > max_rank:
            raise UnservableAdapter(
                f"{name} has rank {highest}, above --max-lora-rank {max_rank}; start vLLM with a higher one"
            )
    for name, weights in served.items():
        weights.dora_minus_one = layers[name].dora_gains(name, weights).cpu()


def write_gains(modules: Mapping[str, Any], slot: int, lookup: Lookup) -> None:
    """Writes an adapter's gains into a slot of every layer, so that none keeps those of the adapter before."""
    for name, module in modules.items():
        if isinstance(module, DoRALayer):
            module.put_dora(slot, getattr(lookup(name), "dora_minus_one", None))
