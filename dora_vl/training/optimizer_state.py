"""What trains and the optimizer's state as whole tensors by name, and back into any number of ranks and ZeRO stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dora_vl.errors import UserError
from dora_vl.training.optimizer_places import OptimizerPlaces
from dora_vl.training.state_files import StateFiles, is_plain

VALUE = "value"
"""What a trained tensor itself is called beside the optimizer's own names (`exp_avg`, `step`...)."""

logger = logging.getLogger(__name__)


def whole_tensors(places: OptimizerPlaces) -> Iterator[tuple[str, Tensor]]:
    """Yields `value/NAME`, in float32 where the optimizer has it so, and `KEY/NAME`; every rank must read them all."""
    for name in places.pieces:
        yield f"{VALUE}/{name}", places.whole(name, places.flats[places.pieces[name].flat].detach())
        for key, value in sorted(places.state_of(name).items()):
            if places.is_by_element(name, value):
                yield f"{key}/{name}", places.whole(name, value)
            elif isinstance(value, Tensor):
                yield f"{key}/{name}", value.to("cpu", copy=True).contiguous()


def optimizer_numbers(places: OptimizerPlaces) -> dict[str, Any]:
    """The rest of the optimizer's state: its groups' settings, and what it keeps as plain numbers."""
    kept = {name: _no_tensors(places.state_of(name)) for name in places.pieces}
    return {
        "groups": [_settings(group) for group in places.optimizer.param_groups],
        "numbers": {name: numbers for name, numbers in kept.items() if numbers},
    }


def _no_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params" and is_plain(value)}


def load_values(places: OptimizerPlaces, files: StateFiles) -> None:
    """Gives what trains its values; every rank must call it.

    Raises:
        UserError: the checkpoint holds other tensors than this run trains, or one of another shape.
    """
    there = {name.removeprefix(f"{VALUE}/") for name in files.names() if name.startswith(f"{VALUE}/")}
    if missing := sorted(set(places.pieces) ^ there):
        raise UserError(
            f"resume: the checkpoint does not fit this run: {len(set(places.pieces) - there)} trained tensors are not "
            f"in it, {len(there - set(places.pieces))} are not trained here, such as {missing[0]}"
        )
    with places.whole_parameters_written():
        for name in places.pieces:
            places.set_value(name, _of_shape(files, f"{VALUE}/{name}", places.shape(name)))


def load_optimizer(places: OptimizerPlaces, files: StateFiles, numbers: Mapping[str, Any]) -> None:
    """Gives the optimizer its state; every rank must call it.

    Args:
        numbers: as `optimizer_numbers` gave them.

    Raises:
        UserError: the state is not that of this optimizer.
    """
    groups, kept = numbers.get("groups"), numbers.get("numbers")
    if not isinstance(groups, list) or not isinstance(kept, dict):
        raise files.damaged("the optimizer's numbers are missing")
    with places.in_optimizer():
        optimizer = places.optimizer
        if [one.get("name") for one in optimizer.param_groups] != [one.get("name") for one in groups]:
            raise files.damaged("the optimizer has other parts here")
        number_of = {id(flat): number for number, flat in enumerate(places.flats)}
        optimizer.load_state_dict(
            {
                "state": _states(places, files, kept),
                "param_groups": [
                    {**_restored(group, saved), "params": [number_of[id(one)] for one in group["params"]]}
                    for group, saved in zip(optimizer.param_groups, groups, strict=True)
                ],
            }
        )


def _restored(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings, with the values of the checkpoint in their own kinds."""
    restored = dict(group)
    for key, value in saved.items():
        if key in group:
            restored[key] = tuple(value) if isinstance(group[key], tuple) else value
    return restored


def _states(places: OptimizerPlaces, files: StateFiles, kept: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The optimizer's state of each tensor that it steps, by its number."""
    states: dict[int, dict[str, Any]] = {}
    for name, keys in _keys_by_name(files).items():
        if name not in places.pieces:
            raise files.damaged(f"there is {keys[0]} of {name}")
        state = states.setdefault(places.pieces[name].flat, {})
        for key in keys:
            _add(state, key, name, places, files)
    for name, numbers in kept.items():
        if name not in places.pieces or not isinstance(numbers, dict):
            raise files.damaged(f"there are numbers of {name}")
        state = states.setdefault(places.pieces[name].flat, {})
        state |= {key: _agreed(state.get(key), value, key) for key, value in numbers.items()}
    if places.counts_in_integers():
        return {number: {**state, "step": int(state["step"])} for number, state in states.items() if "step" in state}
    return states


def _add(state: dict[str, Any], key: str, name: str, places: OptimizerPlaces, files: StateFiles) -> None:
    """Adds one of a trained tensor's states to that of the tensor which holds its piece."""
    found, shape, flat = files.tensor(f"{key}/{name}"), places.shape(name), places.flats[places.pieces[name].flat]
    if found.dim() and found.shape != shape != flat.shape:
        raise files.damaged(f"{key} of {name} is {list(found.shape)}, which is no piece of anything here")
    if found.shape != shape:
        state[key] = _agreed(state.get(key), found, key)
        return
    if key not in state:
        state[key] = torch.zeros(flat.shape, dtype=found.dtype, device=flat.device)
    places.put(name, found, state[key])


def _keys_by_name(files: StateFiles) -> dict[str, list[str]]:
    """The optimizer's own names for what there is of each trained tensor."""
    keys: dict[str, list[str]] = {}
    for one in sorted(files.names()):
        key, _, name = one.partition("/")
        if key != VALUE:
            keys.setdefault(name, []).append(key)
    return keys


def _agreed(before: Any, value: Any, key: str) -> Any:
    """One number for all tensors that are one flat tensor here; where they had different ones, the largest."""
    if before is None or isinstance(value, bool | None) or float(before) == float(value):
        return value
    logger.warning("resume: %s was %g for some tensors, %g for others; ZeRO has one for all", key, before, value)
    return max(before, value)


def _of_shape(files: StateFiles, name: str, shape: torch.Size) -> Tensor:
    found = files.tensor(name)
    if found.shape != shape:
        raise files.damaged(f"{name} is {list(found.shape)}, here it is {list(shape)}")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise files.damaged(f"{name} holds NaN or infinity")
    return found
