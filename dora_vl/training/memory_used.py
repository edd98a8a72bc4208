"""What a run holds in memory, for its log."""

from __future__ import annotations

import psutil
import torch

from dora_vl.training.memory_estimate import GIB


def memory_gib(device: torch.device) -> float:
    """GiB of the rank that holds most; every rank must call it.

    On a GPU the most that torch had allocated since the last call, on a CPU what the process holds now.
    """
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        used = psutil.Process().memory_info().rss
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        most = torch.tensor(used, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        used = int(most)
    return used / GIB
