"""The random states of a rank (Python's, numpy's, torch's, the GPU's) in a checkpoint's JSON, and back."""

from __future__ import annotations

import hashlib
import logging
import random
from typing import Any

import numpy as np
import torch

from dora_vl.training.state_files import StateFiles

logger = logging.getLogger(__name__)


def random_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"random-{rank}.json"


def random_states(device: torch.device) -> dict[str, Any]:
    """This rank's states, bytes in hexadecimal."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _hexadecimal(torch.get_rng_state()),
    }
    return states | ({"cuda": _hexadecimal(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {})


def restore_random_states(
    files: StateFiles, *, rank: int, written_by: int, device: torch.device, drawn_from: tuple[int, int]
) -> None:
    """Goes on with this rank's states, or from drawn ones where the checkpoint was written by fewer ranks.

    Args:
        files: the checkpoint's.
        rank: this one.
        written_by: ranks that wrote the checkpoint.
        device: this rank's.
        drawn_from: the run's seed, and the step.

    Raises:
        UserError: the file is missing or broken.
    """
    if rank >= written_by:
        seed_all(*drawn_from, rank)
        return
    found = files.json(random_file(rank))
    try:
        version, words, gauss = found["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = found["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(_of_hexadecimal(found["torch"]))
        if device.type == "cuda" and "cuda" in found:
            torch.cuda.set_rng_state(_of_hexadecimal(found["cuda"]), device)
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise files.damaged(f"{random_file(rank)} holds no random states") from error


def tell_drawn(*, ranks: int, written_by: int, drawn_from: tuple[int, int]) -> None:
    """Says on the first rank which random states are new."""
    if ranks > written_by:
        logger.info(
            "resume: %d ranks were not there; their random states are drawn from seed %d and step %d",
            ranks - written_by,
            *drawn_from,
        )


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seeds what had no state: a hash of the run's seed, the step and the rank."""
    drawn = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    random.seed(drawn)
    np.random.seed(int.from_bytes(drawn[:4], "little"))
    torch.manual_seed(int.from_bytes(drawn[:8], "little", signed=True))


def _hexadecimal(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _of_hexadecimal(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
