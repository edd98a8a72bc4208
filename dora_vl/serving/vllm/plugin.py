"""The entry point that vLLM calls in each of its processes: looks at this vLLM, and changes it only if it is known.

`VLLM_PLUGINS` chooses plugins by name; this one's is `dora_vl`.
"""

from __future__ import annotations

import copy
import logging
import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dora_vl.serving.vllm.adapters import (
    CLASSES,
    HELPER,
    KERNELS,
    LAYERS,
    LINEAR,
    MANAGER,
    MODEL,
    SHRINK,
    TESTED,
    WEIGHTS,
    compute_gains,
    difference,
    magnitude_of_parts,
    magnitudes_of,
    mend,
    write_gains,
)
from dora_vl.serving.vllm.layer import EXPORT, LORA_B, DoRALayer, as_factor, take_magnitudes

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
    import_module("dora_vl.serving.vllm.plugin").install()
    if mend():
        log.info(
            "dora_vl: %s.%s of vLLM %s gives rows of the base the last slot's adapter; mended", KERNELS, SHRINK, version
        )


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
