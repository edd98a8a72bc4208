"""All that a resumed run needs beside the adapter folder: written by the first rank, read by any number of ranks.

    state/tensors-00001.safetensors   value/NAME, exp_avg/NAME, ... : whole tensors of what trains
    state/state.json                  the optimizer's settings and numbers, the schedule, loss scale, counters, ranks
    state/random-RANK.json            the random states of each rank

The tensors are the same whatever wrote them, so another number of ranks, another ZeRO stage or none can go on.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dora_vl.training.checkpoint_files import StateFiles, write_numbers, write_state
from dora_vl.training.optimizer_state import (
    OptimizerPlaces,
    load_optimizer,
    load_values,
    optimizer_numbers,
    whole_tensors,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""DeepSpeed's, of its own log lines."""
MALFORMED = (KeyError, ValueError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True)
class RunningState:
    """What of a run goes into a checkpoint: what trains and its optimizer, and torch's or DeepSpeed's own state."""

    places: OptimizerPlaces
    schedule: Any
    scaler: Any = None
    engine: DeepSpeedEngine | None = None


def save_state(checkpoint: Path, running: RunningState, arguments: TrainingArguments) -> None:
    """Writes `state/`, this rank's random states apart; every rank must call it."""
    tensors = whole_tensors(running.places)
    if not arguments.should_save:
        for _ in tensors:  # taking part is all that the others do
            pass
        return
    write_state(checkpoint, tensors)
    engine, scale = running.engine, loss_scale_of(running.engine)
    scale_numbers = {} if scale is None else vars(scale)
    write_numbers(
        checkpoint,
        {
            "ranks": arguments.world_size,
            "optimizer": optimizer_numbers(running.places),
            "schedule": running.schedule.state_dict(),
            "scaler": None if running.scaler is None else running.scaler.state_dict(),
            "loss_scale": {name: value for name, value in scale_numbers.items() if isinstance(value, int | float)},
            "counters": {} if engine is None else {name: getattr(engine, name) for name in COUNTERS},
        },
    )


def load_state(checkpoint: Path, running: RunningState) -> None:
    """Goes on from a checkpoint's `state/`; every rank must call it.

    Raises:
        UserError: a file is missing or broken, or holds the state of something else.
    """
    files = StateFiles(checkpoint)
    load_values(running.places, files)
    try:
        load_optimizer(running.places, files, files.number("optimizer", dict))
        running.schedule.load_state_dict(files.number("schedule", dict))
        if running.scaler is not None and files.numbers.get("scaler") is not None:
            running.scaler.load_state_dict(files.number("scaler", dict))
        _set_known(loss_scale_of(running.engine), files.number("loss_scale", dict))
        _set_known(running.engine, files.number("counters", dict))
    except MALFORMED as error:
        raise files.damaged(f"{type(error).__name__}: {error}") from error


def load_trained(checkpoint: Path, places: OptimizerPlaces) -> None:
    """Takes what trains from a checkpoint, and leaves the optimizer alone; every rank must call it."""
    load_values(places, StateFiles(checkpoint))


def loss_scale_of(engine: DeepSpeedEngine | None) -> Any:
    """The object that DeepSpeed keeps its scale in, under one of two names; None: nothing is scaled."""
    attributes = {} if engine is None else vars(engine.optimizer)
    return attributes.get("loss_scaler", attributes.get("loss_scale_config"))


def _set_known(holder: Any, numbers: Mapping[str, Any]) -> None:
    """Sets those numbers that the object has: another ZeRO stage's has others."""
    for name, value in numbers.items():
        if holder is not None and name in vars(holder):
            setattr(holder, name, value)


def save_random_states(checkpoint: Path, rank: int, device: torch.device) -> None:
    """Writes this rank's random states (Python's, numpy's, torch's, the GPU's), bytes in hexadecimal."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    write_numbers(checkpoint, states, f"random-{rank}.json")


def load_random_states(checkpoint: Path, rank: int, device: torch.device, *, seed: int, step: int) -> None:
    """Goes on with this rank's states, or from drawn ones where the checkpoint was written by fewer ranks.

    Raises:
        UserError: their file is missing or broken.
    """
    files = StateFiles(checkpoint)
    if rank >= files.number("ranks", int):
        logger.warning("resume: rank %d was not there; its random states are drawn from seed %d", rank, seed)
        seed_all(seed, step, rank)
        return
    file = f"random-{rank}.json"
    states = files.json(file)
    try:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = states["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(states["cuda"]), dtype=torch.uint8), device)
    except (*MALFORMED, OverflowError, RuntimeError) as error:
        raise files.damaged(f"{file} holds no random states") from error


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seeds what had no state: a hash of the run's seed, the step and the rank."""
    drawn = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    random.seed(drawn)
    np.random.seed(int.from_bytes(drawn[:4], "little"))
    torch.manual_seed(int.from_bytes(drawn[:8], "little", signed=True))
