"""All that a resumed run needs beside the adapter folder: written by the first rank, read by any number of ranks.

    state/tensors-00001.safetensors   value/NAME, exp_avg/NAME, ... : whole tensors of what trains
    state/state.json                  the optimizer's settings and numbers, the schedule, loss scale, counters, ranks
    state/random-RANK.json            the random states of each rank

No pickle is among them. The tensors are the same whatever wrote them, so another number of ranks, another ZeRO stage or
none can go on.
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


# The random states of a rank (Python's, numpy's, torch's, the GPU's) in a checkpoint's JSON, and back.


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


COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""DeepSpeed's, of its own log lines."""
MALFORMED = (KeyError, ValueError, TypeError, AttributeError, IndexError)


@dataclass(frozen=True)
class RunningState:
    """What of a run goes into a checkpoint.

    Attributes:
        places: what trains, and its optimizer.
        schedule: of the learning rate.
        scaler: torch's loss scale, where there is one.
        engine: DeepSpeed's, where there is one.
    """

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
    write_numbers(
        checkpoint,
        {
            "ranks": arguments.world_size,
            "optimizer": optimizer_numbers(running.places),
            "schedule": running.schedule.state_dict(),
            "scaler": None if running.scaler is None else running.scaler.state_dict(),
            "loss_scale": _numbers_of(loss_scale_of(running.engine)),
            "counters": {} if running.engine is None else {name: getattr(running.engine, name) for name in COUNTERS},
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
    """Takes what trains from a checkpoint, and leaves the optimizer alone; every rank must call it.

    Raises:
        UserError: as `load_state`.
    """
    load_values(places, StateFiles(checkpoint))


def save_random_states(checkpoint: Path, arguments: TrainingArguments) -> None:
    """Writes this rank's file."""
    write_numbers(checkpoint, random_states(arguments.device), random_file(arguments.process_index))


def load_random_states(checkpoint: Path, arguments: TrainingArguments, *, step: int) -> None:
    """Goes on with this rank's random states.

    Raises:
        UserError: their file is missing or broken.
    """
    files = StateFiles(checkpoint)
    written_by, drawn_from = files.number("ranks", int), (arguments.seed, step)
    restore_random_states(
        files, rank=arguments.process_index, written_by=written_by, device=arguments.device, drawn_from=drawn_from
    )
    tell_drawn(ranks=arguments.world_size, written_by=written_by, drawn_from=drawn_from)


def loss_scale_of(engine: DeepSpeedEngine | None) -> Any:
    """The object that DeepSpeed keeps its scale in, under one of two names; None: nothing is scaled."""
    held = {} if engine is None else vars(engine.optimizer)
    return held.get("loss_scaler", held.get("loss_scale_config"))


def _numbers_of(holder: Any) -> dict[str, Any]:
    return {} if holder is None else {name: one for name, one in vars(holder).items() if isinstance(one, int | float)}


def _set_known(holder: Any, numbers: Mapping[str, Any]) -> None:
    """Sets those numbers that the object has: another ZeRO stage's has others."""
    for name, value in numbers.items():
        if holder is not None and name in vars(holder):
            setattr(holder, name, value)
