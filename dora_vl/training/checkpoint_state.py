"""All that a resumed run needs beside the adapter folder: written by the first rank, read by any number of ranks.

    state/tensors-00001.safetensors   value/NAME, exp_avg/NAME, ... : whole tensors of what trains
    state/state.json                  the optimizer's settings and numbers, the schedule, loss scale, counters, ranks
    state/random-RANK.json            the random states of each rank

No pickle is among them. The tensors are the same whatever wrote them, so another number of ranks, another ZeRO stage or
none can go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_vl.training.optimizer_places import OptimizerPlaces
from dora_vl.training.optimizer_state import load_optimizer, load_values, optimizer_numbers, whole_tensors
from dora_vl.training.random_states import random_file, random_states, restore_random_states, tell_drawn
from dora_vl.training.state_files import StateFiles, write_numbers, write_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import TrainingArguments

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
