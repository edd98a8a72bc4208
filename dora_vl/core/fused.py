"""Whether the fused kernels stand in for the eager operations of `functional.py`: on CUDA, where Triton is there."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

SWITCH = "DORA_VL_TRITON"
"""Set to 0 in the environment, the eager operations are used everywhere."""
OLDEST_CAPABILITY = (8, 0)
"""Of the GPU: the first with bfloat16 matrix products."""


def fused_kernels(tensor: Tensor) -> ModuleType | None:
    """The module of kernels for an activation like `tensor`, or None: the eager operations then."""
    kernels = _loaded() if tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else None
    if kernels is None or tensor.dtype not in kernels.DTYPES or os.environ.get(SWITCH) == "0":
        return None
    return kernels if not tensor.is_cuda or _capable(tensor.device) else None


@cache
def _loaded() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from dora_vl.core import triton_kernels

    return triton_kernels


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
