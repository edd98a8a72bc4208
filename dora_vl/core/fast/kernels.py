"""Chooses a file of kernels: Triton's on CUDA, C++ on a CPU; without them `functional.py` does the same."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from dora_vl.core.fast import cpu_step

SWITCH = "DORA_VL_TRITON"
"""If the environment sets it to 0 before the first pass, CUDA uses the eager operations everywhere."""
OLDEST_CAPABILITY = (8, 0)
"""The GPU needs this capability, the first with bfloat16 matrix products."""
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Activations and weights of these dtypes run in Triton's kernels."""
_left_out: list[None] = []
"""Holds an entry for each block of `without_kernels` that is open."""
_kernels: dict[tuple[torch.device, torch.dtype], ModuleType | None] = {}
"""Keeps the kernels that `triton_kernels` has found, by device and dtype; None if there are none."""


def kernels_for(tensor: Tensor, numbers: int) -> ModuleType | None:
    """Returns the module whose `output`, `gradients` and norms take tensors of this kind and size, if there is one."""
    if _left_out:
        return None
    if tensor.device.type == "cpu" and cpu_step.is_usable(tensor.dtype, numbers):
        return cpu_step
    return triton_kernels(tensor)


def triton_kernels(tensor: Tensor) -> ModuleType | None:
    """Returns Triton's kernels for activations and weights like `tensor`, imported when they are first wanted.

    The environment and the card decide, once for a device and dtype.
    """
    key = tensor.device, tensor.dtype
    if key not in _kernels:
        _kernels[key] = None
        on_gpu = tensor.device.type == "cuda"
        may_run = on_gpu or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
        is_old = on_gpu and torch.cuda.get_device_capability(tensor.device) < OLDEST_CAPABILITY
        installed = importlib.util.find_spec("triton") is not None
        if may_run and not is_old and tensor.dtype in DTYPES and os.environ.get(SWITCH) != "0" and installed:
            from dora_vl.core.fast import triton  # it needs Triton, and starts it

            _kernels[key] = triton
    return _kernels[key]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Runs eager operations inside the block, for comparisons; a backward pass must be in its forward pass's block."""
    _left_out.append(None)
    try:
        yield
    finally:
        _left_out.pop()
