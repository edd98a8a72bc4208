"""What a RuntimeError of torch is about, where neither is the fault of what was being done: too little memory, another
rank's end.
"""

from __future__ import annotations

import torch
from torch.distributed import DistError

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""Of RuntimeErrors that have no type of their own: the CPU allocator's, cuBLAS's and cuDNN's, and those of CUDA itself,
whose AcceleratorError is one for all that can go wrong there."""
_COMMUNICATION = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset by peer")
"""Words of the errors that a rank gets because of another and that have no type of their own: all of gloo's and some of
NCCL's are plain RuntimeErrors."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small: for torch's allocator on a GPU, for Python and numpy, or as torch words it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY)


def is_communication(error: BaseException) -> bool:
    """Whether the library that moves the bytes says that another rank is not there."""
    if isinstance(error, DistError):  # a backend's, a store's or a connection's
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _COMMUNICATION)
