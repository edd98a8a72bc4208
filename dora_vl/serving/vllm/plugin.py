"""The entry point that vLLM calls in each of its processes: changes a vLLM that has every function it replaces.

An adapter's way into vLLM's slots: `magnitude` beside A and B in a layer's weights, then the layer's gains. Written
against the classes of vllm/lora without importing them. `VLLM_PLUGINS` chooses plugins by name; its own is `dora_vl`.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dora_vl.errors import short_names
from dora_vl.serving.vllm.layer import EXPORT, LORA_B, DoRALayer, UnservableAdapter, as_factor, take_magnitudes

log = logging.getLogger("vllm.dora_vl")  # below vLLM's own, whose handler and level it so has
TESTED = ("0.32.0", "0.33.0")
"""The versions that the plugin was run with; 0.33.0's Python code was run over the CPU kernels of 0.32.0."""
PATCH_POINTS = {
    "peft_helper:PEFTHelper.from_dict": "config_dict",
    "peft_helper:PEFTHelper._validate_features": "self",
    "lora_model:parse_fine_tuned_lora_name": "name weights_mapper",
    "lora_model:LoRAModel.from_lora_tensors": "lora_model_id tensors peft_helper weights_mapper *",
    "lora_model:LoRAModel._should_skip_module": "module_name skip_prefixes",
    "lora_weights:PackedLoRALayerWeights.pack": "loras",
    "model_manager:LoRAModelManager._create_merged_loras_inplace": "self lora_model",
    "model_manager:LoRAModelManager._get_lora_layer_weights": "self lora_model module_name",
    "model_manager:LoRAModelManager.activate_adapter": "self lora_id",
    "ops.torch_ops.lora_ops:bgmv_shrink": "inputs lora_b_weights output_tensor lora_indices_tensor scaling",
    "utils:_all_lora_classes": "",
    "layers:RowParallelLinearWithLoRA": "",
    "layers.base_linear:BaseLinearLayerWithLoRA.create_lora_weights": "self max_loras lora_config model_config",
    "layers.base_linear:BaseLinearLayerWithLoRA.apply": "self x bias",
}
"""Maps what is replaced or called in vllm.lora to the arguments that it must take; after a star it may take others."""


@cache
def register() -> None:
    """Lets vLLM serve DoRA adapters, or leaves it as it is with one line that says why; once, however often called."""
    version = str(import_module("vllm").__version__)
    try:  # vLLM's own look at an adapter's config may let `use_dora` pass
        helper = import_module(HELPER).PEFTHelper
        config = helper.from_dict({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "use_dora": True})
        if config.use_dora and not config._validate_features():
            log.info("dora_vl: vLLM %s takes DoRA adapters itself; its own way is left to it", version)
            return
    except (ImportError, AttributeError, TypeError, ValueError):
        pass
    if missing := missing_points():
        log.warning(
            "dora_vl: DoRA adapters are not served: vLLM %s has not, or with other arguments, %s", version, missing
        )
        return
    if version.split("+")[0] not in TESTED:
        log.warning(
            "dora_vl: vLLM %s was never run with DoRA adapters (%s were); it has all that this needs, so it is tried; "
            "compare some answers with those of `dora-vl ask`",
            version,
            ", ".join(TESTED),
        )
    accept_configs(import_module(HELPER).PEFTHelper)
    keep_magnitudes(import_module("vllm.lora.lora_model"))
    pack_magnitudes(import_module("vllm.lora.lora_weights").PackedLoRALayerWeights)
    give_gains_to_slots(import_module("vllm.lora.model_manager").LoRAModelManager)
    wrap_layers(import_module("vllm.lora.utils"), import_module("vllm.lora.layers"))
    if fix_base_rows():
        log.info(
            "dora_vl: %s.%s of vLLM %s gives rows of the base the last slot's adapter; mended", KERNELS, SHRINK, version
        )


def missing_points() -> list[str]:
    """Returns those of `PATCH_POINTS` that this vLLM has not, or that do not take these arguments."""
    return [point for point, arguments in PATCH_POINTS.items() if not _takes(point, arguments)]


def _takes(point: str, arguments: str) -> bool:
    module, _, path = point.partition(":")
    try:
        value: Any = import_module(f"vllm.lora.{module}")
        for name in path.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError):
        return False
    if not arguments:
        return True
    needed, taken = {*arguments.split()}, {*inspect.signature(value).parameters}
    return needed - {"*"} <= taken if "*" in needed else needed == taken


KERNELS = "vllm.lora.ops.torch_ops.lora_ops"
SHRINK = "bgmv_shrink"


def fix_base_rows() -> bool:
    """Mends vLLM's product with A on CPUs, which gives tokens of the base the adapter of the last slot.

    vllm/lora/ops/torch_ops/lora_ops.py:74 (0.32.0) takes a token's A by `lora_b_weights[lora_indices_tensor]`, where
    -1, the base, is the last slot. While a slot is empty nobody sees it. Returns whether there was something to mend.
    """
    kernels = import_module(KERNELS)
    shrink = getattr(kernels, SHRINK)
    x, weights, output = torch.ones(1, 2), torch.ones(1, 1, 1, 2), torch.zeros(1, 1)
    shrink(x, weights, output, torch.tensor([-1]), 1.0)
    if not output.any():
        return False

    def bgmv_shrink(
        inputs: Tensor, lora_b_weights: Tensor, output_tensor: Tensor, lora_indices_tensor: Tensor, scaling: float = 1.0
    ) -> None:
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0  # B then adds nothing, whichever B it is

    users = ("vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")  # they have imported the function itself
    for module in (kernels, *map(import_module, users)):
        setattr(module, SHRINK, bgmv_shrink)
    return True


# The plugin's functions in place of vLLM's. Each calls the function that it replaces, so that nothing changes for
# adapters without magnitudes. Files and lines are those of vLLM 0.32.0.

HELPER = "vllm.lora.peft_helper"
WHOLE_MODULES = f"It holds whole trained modules beside A and B: {EXPORT}."


def accept_configs(helper: Any) -> None:
    """Accepts `use_dora`, and says what to do about whole modules (vllm/lora/peft_helper.py:53)."""
    refused = helper._validate_features

    def _validate_features(self: Any) -> list[str]:
        config = copy.copy(self)
        config.use_dora = False
        reasons = refused(config)
        config.modules_to_save = None
        return [*reasons, WHOLE_MODULES] if len(refused(config)) < len(reasons) else reasons

    helper._validate_features = _validate_features


def keep_magnitudes(module: Any) -> None:
    """Takes magnitudes out of the tensors and puts them beside their layer's A and B (vllm/lora/lora_model.py:120).

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
    """Makes weights that join q, k and v keep the magnitudes of these parts (vllm/lora/lora_weights.py:135)."""
    pack = packed.pack.__func__

    def pack_with_magnitudes(cls: Any, loras: Any) -> Any:
        weights = pack(cls, loras)
        parts = [getattr(part, "magnitude", None) for part in loras]  # one that is not adapted, or has none, is a gap
        weights.magnitude = parts if any(part is not None for part in parts) else None
        return weights

    packed.pack = classmethod(pack_with_magnitudes)


def give_gains_to_slots(manager: Any) -> None:
    """Computes gains for each new adapter, and writes them with A and B (vllm/lora/model_manager.py:838, :346)."""
    merge, activate = manager._create_merged_loras_inplace, manager.activate_adapter

    def _create_merged_loras_inplace(self: Any, lora_model: Any) -> None:
        before = {name: parts for name, weights in lora_model.loras.items() if (parts := magnitudes_in(weights))}
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
            for name, module in self.modules.items():
                if isinstance(module, DoRALayer):  # of every layer, so that none keeps those of the adapter before
                    module.put_dora(slot, getattr(self._get_lora_layer_weights(adapter, name), "dora_minus_one", None))
        return fresh

    manager._create_merged_loras_inplace = _create_merged_loras_inplace
    manager.activate_adapter = activate_adapter


def is_elsewhere(model: torch.nn.Module, name: str) -> bool:
    """Tells whether a layer is on another rank of a pipeline: the layer it would be in is not here."""
    from vllm.distributed import get_pp_group  # pyright: ignore[reportMissingImports]

    try:
        model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return get_pp_group().world_size > 1
    return False


def wrap_layers(module: Any, layers: Any) -> None:
    """Puts `DoRALayer` in front of each wrapper of a linear layer, under its own name (vllm/lora/utils.py:79)."""
    linear = import_module("vllm.lora.layers.base_linear").BaseLinearLayerWithLoRA

    def with_gains(wrapper: type) -> type:
        if not issubclass(wrapper, linear):
            return wrapper
        own: dict[str, Any] = {"__module__": wrapper.__module__, "__doc__": wrapper.__doc__}
        if issubclass(wrapper, layers.RowParallelLinearWithLoRA):
            own |= {"shards_inputs": True, "sum_of_ranks": staticmethod(sum_over_ranks)}
        return type(wrapper.__name__, (DoRALayer, wrapper), own)

    module._all_lora_classes = tuple(map(with_gains, module._all_lora_classes))


def sum_over_ranks(part: Tensor) -> Tensor:
    """Returns the sum over a row-parallel layer's ranks."""
    from vllm.distributed import tensor_model_parallel_all_reduce  # pyright: ignore[reportMissingImports]

    return tensor_model_parallel_all_reduce(part)


# Magnitudes of packed weights, and gains in slots.


def magnitudes_in(weights: Any) -> list[Tensor]:
    """Returns the magnitudes of a layer's weights: one, or those of the parts that were packed into one."""
    magnitudes = getattr(weights, "magnitude", None)
    parts = magnitudes if isinstance(magnitudes, list) else [magnitudes]
    return [part for part in parts if part is not None]


def compute_gains(
    modules: Mapping[str, Any],
    before: Mapping[str, list[Tensor]],
    lookup: Callable[[str], Any],
    *,
    max_rank: int,
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> None:
    """Computes every layer's gains once, when vLLM has packed an adapter's weights and before it takes it in.

    Args:
        modules: the wrapped layers, by vLLM's names.
        before: the magnitudes of each layer, by vLLM's name of it, before the adapter's weights were packed.
        lookup: returns the adapter's packed weights of a layer, or None.
        elsewhere: returns True for a layer on another rank of a pipeline.
    """
    layers = {name: module for name, module in modules.items() if isinstance(module, DoRALayer)}
    served = {name: weights for name in layers if magnitudes_in(weights := lookup(name))}
    applied = {id(magnitude) for weights in served.values() for magnitude in magnitudes_in(weights)}
    lost = [
        name for name, magnitudes in before.items() if not {*map(id, magnitudes)} <= applied and not elsewhere(name)
    ]
    if lost:
        raise UnservableAdapter(
            f"vLLM applies no magnitudes to {len(lost)} of the adapter's layers: {short_names(sorted(lost))} "
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
