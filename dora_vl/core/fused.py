"""Whether the fused kernels stand in for the eager operations of `functional.py`: on CUDA, where Triton is there."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

SWITCH = "DORA_VL_TRITON"
"""Set to 0 in the environment before the first pass, the eager operations are used everywhere."""
OLDEST_CAPABILITY = (8, 0)
"""Of the GPU: the first with bfloat16 matrix products."""


def fused_kernels(tensor: Tensor) -> ModuleType | None:
    """The module of kernels for an activation like `tensor`, or None: the eager operations then."""
    return _chosen(tensor.device, tensor.dtype)


@cache
def _chosen(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    on_gpu = device.type == "cuda"
    wanted = on_gpu or os.environ.get("TRITON_INTERPRET") == "1"
    if not wanted or os.environ.get(SWITCH) == "0" or importlib.util.find_spec("triton") is None:
        return None
    if on_gpu and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return None
    from dora_vl.core import triton_kernels

    return triton_kernels if dtype in triton_kernels.DTYPES else None
