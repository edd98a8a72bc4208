"""Writes and reads what a resumed run needs beside the adapter folder, on any number of ranks.

    state/tensors-00001.safetensors   value/NAME, exp_avg/NAME, ... : whole tensors of what trains
    state/state.json                  the optimizer's settings and numbers, the schedule, loss scale, counters, ranks
    state/random-RANK.json            the random states of each rank

The tensors do not depend on what wrote them, so a run can resume on other ranks, or under another ZeRO stage or none.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dora_vl.errors import SettingError
from dora_vl.files import read_json
from dora_vl.run.launch import as_shards, gather_to_write
from dora_vl.training.checkpoint_files import STATE, StateFiles, is_plain, write_numbers, write_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

VALUE = "value"
"""A trained tensor itself has this key, beside those of the optimizer (`exp_avg`, `step`...)."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's log lines


@dataclass(frozen=True)
class RunningState:
    """Holds what a checkpoint saves: the trained tensors and their optimizer, and torch's or DeepSpeed's own state."""

    layout: OptimizerLayout
    schedule: Any
    scaler: Any = None
    engine: DeepSpeedEngine | None = None


def save_state(checkpoint: Path, running: RunningState, arguments: TrainingArguments) -> None:
    """Writes `state/`, this rank's random states apart; every rank must call it."""
    tensors = whole_tensors(running.layout)
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
            "optimizer": optimizer_numbers(running.layout),
            "schedule": running.schedule.state_dict(),
            "scaler": None if running.scaler is None else running.scaler.state_dict(),
            "loss_scale": {name: value for name, value in scale_numbers.items() if isinstance(value, int | float)},
            "counters": {} if engine is None else {name: getattr(engine, name) for name in COUNTERS},
        },
    )


def load_state(checkpoint: Path, running: RunningState) -> None:
    """Restores a checkpoint's `state/`, whose files the manifest has verified; every rank must call it."""
    files = StateFiles(checkpoint)
    load_values(running.layout, files)
    load_optimizer(running.layout, files)
    running.schedule.load_state_dict(files.numbers["schedule"])
    if running.scaler is not None and files.numbers["scaler"] is not None:
        running.scaler.load_state_dict(files.numbers["scaler"])
    _set_known(loss_scale_of(running.engine), files.numbers["loss_scale"])
    _set_known(running.engine, files.numbers["counters"])


def loss_scale_of(engine: DeepSpeedEngine | None) -> Any:
    """Returns the object that holds DeepSpeed's loss scale, under one of two names; None if nothing is scaled."""
    attributes = {} if engine is None else vars(engine.optimizer)
    return attributes.get("loss_scaler", attributes.get("loss_scale_config"))


def _set_known(holder: Any, numbers: Mapping[str, Any]) -> None:
    """Sets only the numbers that the object has, since those of ZeRO stages differ."""
    for name, value in numbers.items():
        if holder is not None and name in vars(holder):
            setattr(holder, name, value)


def save_random_states(checkpoint: Path, rank: int, device: torch.device, kept: Mapping[str, Any]) -> None:
    """Writes this rank's random states (Python's, numpy's, torch's, the GPU's), bytes as hexadecimal, and `kept`."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "kept": kept,
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    write_numbers(checkpoint, states, f"random-{rank}.json")


def load_random_states(checkpoint: Path, rank: int, device: torch.device, *, seed: int, step: int) -> Mapping[str, Any]:
    """Restores this rank's states, or seeds new ones if fewer ranks wrote them; returns what the rank had `kept`."""
    files = StateFiles(checkpoint)
    if rank >= files.numbers["ranks"]:
        logger.warning("resume: rank %d was not there; its random states are drawn from seed %d", rank, seed)
        seed_all(seed, step, rank)
        return {}
    states = read_json(checkpoint / STATE / f"random-{rank}.json")
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(states["cuda"]), dtype=torch.uint8), device)
    return states.get("kept", {})


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seeds a rank without a state by a hash of the run's seed, the step and the rank."""
    drawn = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    random.seed(drawn)
    np.random.seed(int.from_bytes(drawn[:4], "little"))
    torch.manual_seed(int.from_bytes(drawn[:8], "little", signed=True))


# What trains and the optimizer's state as whole tensors by name, and back into any number of ranks and ZeRO stage.


@dataclass(frozen=True)
class TensorPiece:
    """The part of one trained tensor that this rank's optimizer holds; `count` 0: another rank holds all of it.

    Attributes:
        flat: number of the tensor that the optimizer steps; `start`: first element in it.
        first: first element in the whole tensor, read row by row.
        group: the ranks that hold the others; None: this rank holds all.
    """

    flat: int
    start: int
    first: int
    count: int
    group: Any = None


@dataclass(frozen=True)
class OptimizerLayout:
    """The tensors that an optimizer steps, and where in them each trained tensor is.

    torch's optimizers hold parameters. DeepSpeed's hold copies in float32, under ZeRO 1 to 3 as flat tensors of which
    every rank has a part.

    Attributes:
        optimizer: torch's, the innermost, which steps the `flats`.
        trained: what trains by name, in the same order on all ranks, which exchange tensors on `device`; `pieces` has
            the same names.
        stage3: DeepSpeed's optimizer of ZeRO-3, which lends `optimizer` its tensors for one step only.
    """

    optimizer: torch.optim.Optimizer
    flats: Sequence[Tensor]
    trained: Mapping[str, nn.Parameter]
    pieces: Mapping[str, TensorPiece]
    device: torch.device
    stage3: Any = None

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of the whole tensor."""
        # DeepSpeed notes a sharded tensor's whole shape.
        return vars(self.trained[name]).get("ds_shape", self.trained[name].shape)

    def flat_of(self, name: str) -> Tensor:
        """Returns the tensor that holds a trained tensor, or this rank's piece of it."""
        return self.flats[self.pieces[name].flat]

    def state_of(self, name: str) -> Mapping[str, Any]:
        """Returns the optimizer's state of a trained tensor; empty before its first step."""
        return self.optimizer.state.get(self.flat_of(name), {})

    def whole(self, name: str, flat: Tensor) -> Tensor:
        """Gathers a trained tensor, or its optimizer state, from `flat` onto the CPU; every rank must call it."""
        piece = self.pieces[name]
        if isinstance(flat, DTensor):
            return flat.full_tensor().cpu().view(self.shape(name))
        part = flat.flatten()[piece.start : piece.start + piece.count]
        if piece.group is None:
            return part.to("cpu", copy=True).view(self.shape(name))
        full = torch.zeros(self.shape(name).numel(), dtype=flat.dtype, device=self.device)
        full[piece.first : piece.first + piece.count] = part
        # Bytes, of which all ranks but one have zeros, add up to the same bits; floats would not (-0.0).
        torch.distributed.all_reduce(full.view(torch.uint8), group=piece.group)
        return full.cpu().view(self.shape(name))

    def put(self, name: str, full: Tensor, into: Tensor) -> None:
        """Writes this rank's piece of a whole tensor into one that has the shape of the flat tensor."""
        piece = self.pieces[name]
        if isinstance(into, DTensor):
            into.copy_(as_shards(full.view(into.shape), into))
        elif piece.count == into.numel() == full.numel():  # whatever its strides
            into.copy_(full.reshape(into.shape))
        else:
            part = full.flatten()[piece.first : piece.first + piece.count]
            into[piece.start : piece.start + piece.count] = part.to(into)

    @torch.no_grad()
    def set_value(self, name: str, full: Tensor) -> None:
        """Gives the optimizer's tensor and the model's parameter a value; every rank must call it."""
        parameter = self.trained[name]
        flat = self.flat_of(name)
        self.put(name, full, flat.data)
        if flat is not parameter:
            with gather_to_write([parameter]):
                parameter.data.copy_(full.to(parameter.device))

    @contextmanager
    def in_optimizer(self) -> Iterator[None]:
        """Surrounds `optimizer.load_state_dict`: puts ZeRO-3's tensors into the optimizer's groups."""
        if self.stage3 is not None:
            self.stage3._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            if self.stage3 is not None:
                self.stage3._clear_fp32_optimizer_param_groups()


def layout_of(optimizer: Any, trained: Mapping[str, nn.Parameter], device: torch.device) -> OptimizerLayout:
    """Finds the trained tensors in torch's optimizer or in one of DeepSpeed's."""
    inner, stage3 = optimizer, None
    if isinstance(optimizer, torch.optim.Optimizer):
        flats = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        pieces = {id(flat): TensorPiece(number, 0, 0, flat.numel()) for number, flat in enumerate(flats)}
    else:
        flats, pieces, stage3 = _in_deepspeed(optimizer)
        inner = optimizer.optimizer
    named = {name: pieces[id(parameter)] for name, parameter in trained.items()}
    partitioned = any(piece.group is not None for piece in named.values())
    if partitioned and type(inner).__module__.startswith("bitsandbytes"):
        raise SettingError(
            "training.optim",
            ": states of 8 bits belong to blocks, which ZeRO cuts through, and no checkpoint could hold them; set "
            "adamw_torch, or leave training.deepspeed out",
        )
    return OptimizerLayout(inner, flats, trained, named, device, stage3)


def _in_deepspeed(optimizer: Any) -> tuple[list[Tensor], dict[int, TensorPiece], Any]:
    """Returns the tensors that one of DeepSpeed's optimizers steps, each parameter's piece, and ZeRO-3's optimizer."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return optimizer.single_partition_of_fp32_groups, _linked(optimizer.bit16_groups), None
    if isinstance(optimizer, BF16_Optimizer):  # ZeRO-1
        return optimizer.fp32_groups_flat_partition, _linked(optimizer.bf16_groups), None
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat, _of_stage_3(optimizer), optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):  # ZeRO-0: each half has a float32 copy, the same on every rank
        flats, halves = (list(chain(*groups)) for groups in (optimizer.fp32_groups, optimizer.fp16_groups))
        return flats, {id(half): TensorPiece(number, 0, 0, half.numel()) for number, half in enumerate(halves)}, None
    raise SettingError(
        "training.optim",
        f": a checkpoint cannot hold the state of DeepSpeed's {type(optimizer).__name__}; set adamw_torch",
    )


def _linked(groups: Sequence[Sequence[Any]]) -> dict[int, TensorPiece]:
    """Reads ZeRO 1 and 2: one flat tensor per group; parameters know which elements this rank has (`_hp_mapping`)."""
    pieces = {}
    for number, group in enumerate(groups):
        for parameter in group:
            pieces[id(parameter)] = TensorPiece(number, 0, 0, 0, parameter._dp_group)
            if (linked := parameter._hp_mapping) is not None:
                flat, half = linked.hp_fragment_address, linked.lp_fragment_address
                pieces[id(parameter)] = TensorPiece(number, flat.start, half.start, flat.numel, parameter._dp_group)
    return pieces


def _of_stage_3(optimizer: Any) -> dict[int, TensorPiece]:
    """Reads ZeRO 3: each rank has an equal part of every parameter, padded at the end."""
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise SettingError("training.deepspeed", ": a checkpoint cannot hold what is offloaded to nvme; offload to cpu")
    pieces = {}
    for parameter in chain(*optimizer.fp16_groups):
        number, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        ranks = parameter.ds_process_group
        first = torch.distributed.get_rank(ranks) * count
        count = max(0, min(count, parameter.ds_numel - first))
        pieces[id(parameter)] = TensorPiece(number, start, first if count else 0, count, ranks)
    return pieces


def whole_tensors(layout: OptimizerLayout) -> Iterator[tuple[str, Tensor]]:
    """Yields `value/NAME`, in float32 where the optimizer has it so, and `KEY/NAME`; every rank must read them all."""
    for name in layout.pieces:
        yield f"{VALUE}/{name}", layout.whole(name, layout.flat_of(name).detach())
        for key, value in sorted(layout.state_of(name).items()):
            if isinstance(value, Tensor) and value.shape == layout.flat_of(name).shape:  # a number for each element
                yield f"{key}/{name}", layout.whole(name, value)
            elif isinstance(value, Tensor):
                yield f"{key}/{name}", value.to("cpu", copy=True).contiguous()


def optimizer_numbers(layout: OptimizerLayout) -> dict[str, Any]:
    """Returns the rest of the optimizer's state: its groups' settings, and what it keeps as plain numbers."""
    kept = {
        name: {key: value for key, value in layout.state_of(name).items() if not isinstance(value, Tensor)}
        for name in layout.pieces
    }
    groups = layout.optimizer.param_groups
    return {
        "groups": [{k: value for k, value in group.items() if k != "params" and is_plain(value)} for group in groups],
        "numbers": {name: numbers for name, numbers in kept.items() if numbers},
    }


def load_values(layout: OptimizerLayout, files: StateFiles) -> None:
    """Restores the values of what trains; every rank must call it."""
    stored = {name.removeprefix(f"{VALUE}/") for name in files.names() if name.startswith(f"{VALUE}/")}
    if missing := sorted(set(layout.pieces) ^ stored):
        raise SettingError(
            "resume",
            f": the checkpoint does not fit this run: {len(set(layout.pieces) - stored)} trained tensors are not "
            f"in it, {len(stored - set(layout.pieces))} are not trained here, such as {missing[0]}",
        )
    if layout.stage3 is not None:
        layout.stage3.checkpoint_event_prologue()
    for name in layout.pieces:
        layout.set_value(name, files.tensor(f"{VALUE}/{name}"))
    if layout.stage3 is not None:  # which gathers the small parameters anew that it keeps whole on every rank
        layout.stage3.checkpoint_event_epilogue()


def load_optimizer(layout: OptimizerLayout, files: StateFiles) -> None:
    """Restores the optimizer's state; every rank must call it."""
    groups, kept = files.numbers["optimizer"]["groups"], files.numbers["optimizer"]["numbers"]
    with layout.in_optimizer():
        optimizer = layout.optimizer
        number_of = {id(flat): number for number, flat in enumerate(layout.flats)}
        optimizer.load_state_dict(
            {
                "state": _states(layout, files, kept),
                "param_groups": [
                    {**_restored(group, saved), "params": [number_of[id(flat)] for flat in group["params"]]}
                    for group, saved in zip(optimizer.param_groups, groups, strict=True)
                ],
            }
        )


def _restored(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group's settings, with the values of the checkpoint in their own kinds."""
    values = {key: value for key, value in saved.items() if key in group}
    return {**group, **{key: tuple(v) if isinstance(group[key], tuple) else v for key, v in values.items()}}


def _states(layout: OptimizerLayout, files: StateFiles, kept: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Maps the number of each tensor that the optimizer steps to its state."""
    states: dict[int, dict[str, Any]] = {}
    for entry in sorted(files.names()):
        key, _, name = entry.partition("/")
        if key != VALUE:
            _add(states.setdefault(layout.pieces[name].flat, {}), key, name, layout, files)
    for name, numbers in kept.items():
        state = states.setdefault(layout.pieces[name].flat, {})
        state |= {key: _agreed(state.get(key), value, key) for key, value in numbers.items()}
    # DeepSpeed's keeps its steps as an integer, where torch has a tensor; by its name, since it need not be installed.
    if any(kind.__name__ == "DeepSpeedCPUAdam" for kind in type(layout.optimizer).__mro__):
        return {number: {**state, "step": int(state["step"])} for number, state in states.items() if "step" in state}
    return states


def _add(state: dict[str, Any], key: str, name: str, layout: OptimizerLayout, files: StateFiles) -> None:
    """Adds one of a trained tensor's states to that of the tensor which holds its piece."""
    value, flat = files.tensor(f"{key}/{name}"), layout.flat_of(name)
    if value.shape != layout.shape(name):
        state[key] = _agreed(state.get(key), value, key)
        return
    if key not in state:
        state[key] = torch.zeros_like(flat, dtype=value.dtype)
    layout.put(name, value, state[key])


def _agreed(before: Any, value: Any, key: str) -> Any:
    """Returns one number for all tensors of a flat tensor; the largest where they had different ones."""
    if before is None or isinstance(value, bool | None) or float(before) == float(value):
        return value
    logger.warning("resume: %s was %g for some tensors, %g for others; ZeRO has one for all", key, before, value)
    return max(before, value)
