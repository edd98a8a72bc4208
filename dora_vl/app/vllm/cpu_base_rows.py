"""A fault of vLLM's CPU kernels: rows of the base (slot -1) are given the adapter of the last slot.

vllm/lora/ops/torch_ops/lora_ops.py:74 (0.32.0) takes a row's A by `lora_b_weights[lora_indices_tensor]`, where -1 is
the last one. With a slot left empty nobody sees it; with all full the base answers as that slot's A and B would.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

KERNELS = "vllm.lora.ops.torch_ops.lora_ops"
USERS = ("vllm.lora.ops.torch_ops", "vllm.lora.punica_wrapper.punica_cpu")
"""Modules that have the function by name."""
SHRINK = "bgmv_shrink"


def mend() -> bool:
    """Has the product with A leave nothing in rows of the base; whether there was something to mend."""
    kernels = import_module(KERNELS)
    if not is_faulty(getattr(kernels, SHRINK)):
        return False
    mended = without_base_rows(getattr(kernels, SHRINK))
    for module in (kernels, *map(import_module, USERS)):
        _replace(module, mended)
    return True


def is_faulty(shrink: Any) -> bool:
    """Whether a row of slot -1 gets anything."""
    rows, weights, output = torch.ones(1, 2), torch.ones(1, 1, 1, 2), torch.zeros(1, 1)
    shrink(rows, weights, output, torch.tensor([-1]), 1.0)
    return bool(output.any())


def without_base_rows(shrink: Any) -> Any:
    """The same product, with zeros in rows of slot -1: B then adds nothing, whichever B it is."""

    def bgmv_shrink(
        inputs: Tensor,
        lora_b_weights: Tensor,
        output_tensor: Tensor,
        lora_indices_tensor: Tensor,
        scaling: float = 1.0,
    ) -> None:
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0

    return bgmv_shrink


def _replace(module: ModuleType, mended: Any) -> None:
    setattr(module, SHRINK, mended)
