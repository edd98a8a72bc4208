"""Whether the fused kernels stand in for the eager operations: on CUDA, where Triton is there.

The kernels' modules, `triton_*.py`, are imported from here alone, and only once they are wanted.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

SWITCH = "DORA_VL_TRITON"
"""Set to 0 in the environment before the first pass, the eager operations are used everywhere."""
OLDEST_CAPABILITY = (8, 0)
"""Of the GPU: the first with bfloat16 matrix products."""
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Of activations and weights that the kernels know."""


def fused_kernels(tensor: Tensor) -> ModuleType | None:
    """The passes over [rows, out] for an activation like `tensor`, or None: the eager operations then."""
    if not are_wanted(tensor.device, tensor.dtype):
        return None
    from dora_vl.core.fast import triton_kernels

    return triton_kernels


def dropout_kernels(tensor: Tensor) -> ModuleType | None:
    """The passes with a mask that is drawn inside, or None."""
    if not are_wanted(tensor.device, tensor.dtype):
        return None
    from dora_vl.core.fast import triton_dropout

    return triton_dropout


def norm_kernels(tensor: Tensor) -> ModuleType | None:
    """The norms of V's rows for a frozen weight like `tensor`, or None."""
    if not are_wanted(tensor.device, tensor.dtype):
        return None
    from dora_vl.core.fast import triton_norms

    return triton_norms


def are_wanted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run for this device and dtype, decided once for each."""
    return not _left_out and decided(device, dtype)


_left_out: list[object] = []


@contextmanager
def without_kernels() -> Iterator[None]:
    """The eager operations inside the block, for comparisons; a backward pass belongs into the block of its forward."""
    _left_out.append(None)
    try:
        yield
    finally:
        _left_out.pop()


@cache
def decided(device: torch.device, dtype: torch.dtype) -> bool:
    """`are_wanted`, from the environment and the card."""
    on_gpu = device.type == "cuda"
    wanted = on_gpu or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    if not wanted or os.environ.get(SWITCH) == "0" or importlib.util.find_spec("triton") is None:
        return False
    return dtype in DTYPES and (not on_gpu or torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY)
