"""An adapter's way into vLLM's slots: `magnitude` beside A and B in a layer's weights, then the layer's gains.

Written against the classes of vllm/lora without importing them: `patches` puts these functions into their places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dora_vl.errors import shown_names
from dora_vl.serving.vllm.layer import EXPORT, DoRALayer, UnservableAdapter

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
    return {name: found for name, weights in adapter.loras.items() if (found := magnitudes_in(weights))}


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
        inputs: Tensor,
        lora_b_weights: Tensor,
        output_tensor: Tensor,
        lora_indices_tensor: Tensor,
        scaling: float = 1.0,
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


def difference(places: Iterable[Place] = PLACES) -> str | None:
    """The first place that this vLLM does not have as it is written down; None where all are as they were."""
    for place in places:
        where = f"{place.module}.{place.name}"
        try:
            member: Any = import_module(place.module)
            for part in place.name.split("."):
                member = getattr(member, part)
        except (ImportError, AttributeError):
            return f"{where} is not there"
        names = tuple(inspect.signature(member).parameters) if callable(member) else ()
        if place.parameters is not None and names != place.parameters:
            return f"{where} takes ({', '.join(names)}), not ({', '.join(place.parameters)})"
        code = getattr(inspect.unwrap(getattr(member, "__func__", member)), "__code__", None)
        if missing := set(place.reads) - set(() if code is None else code.co_names):
            return f"{where} does without {', '.join(sorted(missing))}"
    return None
