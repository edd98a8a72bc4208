"""The places of vLLM that the plugin changes or reads, and whether a vLLM has them as they were when it was tested."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dora_vl.app.vllm.cpu_base_rows import KERNELS, SHRINK


@dataclass(frozen=True)
class Place:
    """A function, method or tuple of vLLM.

    Attributes:
        module: the file it stands in.
        name: in the module; members of a class with a dot.
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
            found = attribute(place.module, place.name)
        except (ImportError, AttributeError):
            return f"{where} is not there"
        if place.parameters is not None and (names := parameters_of(found)) != place.parameters:
            return f"{where} takes ({', '.join(names)}), not ({', '.join(place.parameters)})"
        if missing := set(place.reads) - set(code_names(found)):
            return f"{where} does without {', '.join(sorted(missing))}"
    return None


def attribute(module: str, name: str) -> Any:
    """A member of a module, or of what is in it.

    Raises:
        ImportError: the module is not there, or lacks something itself.
        AttributeError: it has no such member.
    """
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters_of(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters; a class method's without its class."""
    return tuple(inspect.signature(function).parameters) if callable(function) else ()


def code_names(function: Any) -> tuple[str, ...]:
    """The attributes and globals that a function's code names."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return () if code is None else code.co_names
