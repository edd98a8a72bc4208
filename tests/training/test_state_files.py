"""A checkpoint's state comes back as it was written, whatever cuts the optimizer's tensors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from safetensors.torch import load_file

from dora_vl.errors import SettingError, UserError
from dora_vl.training.checkpoint import (
    OptimizerLayout,
    Piece,
    layout_of,
    load_optimizer,
    load_random_states,
    load_values,
    optimizer_numbers,
    save_random_states,
    seed_all,
    whole_tensors,
)
from dora_vl.training.checkpoint_files import StateFiles, write_numbers, write_state

CPU = torch.device("cpu")
Trained = dict[str, torch.nn.Parameter]


def trained() -> Trained:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 4), "b.bias": (5,), "c.weight": (2, 2)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def optimizer_of(tensors: list[torch.nn.Parameter], groups: int) -> torch.optim.Optimizer:
    """With a group for the first tensors, and one for the last."""
    cut = len(tensors) - 1 if groups == 2 else len(tensors)
    parts = [{"name": "first", "params": tensors[:cut], "lr": 0.1}, {"name": "last", "params": tensors[cut:]}]
    return torch.optim.AdamW(parts[:groups], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)


def step(optimizer: torch.optim.Optimizer, tensors: list[torch.nn.Parameter], times: int) -> None:
    for number in range(times):
        for tensor in tensors:
            tensor.grad = torch.sin(tensor.detach() * 3 + number)
        optimizer.step()


def whole_places(tensors: Trained, *, steps: int) -> OptimizerLayout:
    """As without DeepSpeed."""
    optimizer = optimizer_of(list(tensors.values()), 2)
    step(optimizer, list(tensors.values()), steps)
    return layout_of(optimizer, tensors, CPU)


def flat_places(tensors: Trained) -> OptimizerLayout:
    """As ZeRO lays tensors out: the first two in one flat tensor, in another order and padded; the third alone."""
    flats = [torch.nn.Parameter(torch.zeros(20)), torch.nn.Parameter(torch.zeros(4))]
    pieces = dict(zip(tensors, (Piece(0, 6, 0, 12), Piece(0, 0, 0, 5), Piece(1, 0, 0, 4)), strict=True))
    return OptimizerLayout(optimizer_of(flats, 2), flats, tensors, pieces, CPU)


def saved(checkpoint: Path, layout: OptimizerLayout, **sizes: int) -> None:
    write_state(checkpoint, whole_tensors(layout), **sizes)
    write_numbers(checkpoint, {"optimizer": optimizer_numbers(layout)})


def loaded(checkpoint: Path, layout: OptimizerLayout) -> None:
    files = StateFiles(checkpoint)
    load_values(layout, files)
    load_optimizer(layout, files)


def test_flat_tensors_and_whole_ones_are_the_same_state(tmp_path: Path) -> None:
    tensors, flat_tensors, back = trained(), trained(), trained()
    layout = whole_places(tensors, steps=3)
    saved(tmp_path / "whole", layout, file_bytes=50)
    assert len(list((tmp_path / "whole" / "state").glob("*.safetensors"))) > 3
    for tensor in (*flat_tensors.values(), *back.values()):
        tensor.data.zero_()
    flat = flat_places(flat_tensors)
    loaded(tmp_path / "whole", flat)
    saved(tmp_path / "flat", flat)
    again = whole_places(back, steps=0)
    loaded(tmp_path / "flat", again)
    saved(tmp_path / "back", again)
    for name, tensor in tensors.items():
        assert torch.equal(flat_tensors[name], tensor)
        assert torch.equal(back[name], tensor)
    first, last = (load_file(tmp_path / folder / "state" / "tensors-00001.safetensors") for folder in ("flat", "back"))
    assert first.keys() == last.keys()
    assert len(first) == 12  # value, exp_avg, exp_avg_sq and step of three
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert layout.optimizer.param_groups[1]["lr"] == again.optimizer.param_groups[1]["lr"] == 0.01
    assert again.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    for current in (layout, again):  # and what follows is the same too
        step(current.optimizer, list((tensors if current is layout else back).values()), 2)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


class WholeSteps(DeepSpeedCPUAdam):
    """DeepSpeed's Adam without its C++, which only a step needs."""

    def __init__(self, parts: list[dict[str, object]]) -> None:
        torch.optim.Optimizer.__init__(self, parts, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": False})


def test_an_optimizer_that_counts_in_integers_gets_integers(tmp_path: Path) -> None:
    saved(tmp_path, whole_places(trained(), steps=3))
    tensors = trained()
    first, *last = tensors.values()
    counting = WholeSteps([{"name": "first", "params": [first, last[0]]}, {"name": "last", "params": last[1:]}])
    loaded(tmp_path, layout_of(counting, tensors, CPU))
    steps = [counting.state[tensor]["step"] for tensor in tensors.values()]
    assert steps == [3, 3, 3]
    assert {type(step) for step in steps} == {int}


def test_a_rank_takes_its_piece_of_a_tensor_that_is_larger_than_all_it_holds() -> None:
    whole, flat = torch.arange(12.0).view(3, 4), torch.nn.Parameter(torch.zeros(5))
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    layout = OptimizerLayout(optimizer_of([flat], 1), [flat], {"a": parameter}, {"a": Piece(0, 0, 6, 5)}, CPU)
    layout.set_value("a", whole)
    assert flat.tolist() == [6.0, 7.0, 8.0, 9.0, 10.0]
    assert torch.equal(parameter, whole)


def test_tensors_that_took_fewer_steps_get_the_others_count_in_one_flat_tensor(tmp_path: Path) -> None:
    tensors = trained()
    layout = whole_places(tensors, steps=1)
    tensors["b.bias"].grad = None
    layout.optimizer.step()
    saved(tmp_path, layout)
    flat = flat_places(trained())
    loaded(tmp_path, flat)
    assert [float(flat.optimizer.state[tensor]["step"]) for tensor in flat.flats] == [2.0, 2.0]


def test_a_checkpoint_of_other_parts_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, whole_places(trained(), steps=1))
    fewer = trained()
    del fewer["b.bias"]
    with pytest.raises(SettingError) as error:
        loaded(tmp_path, whole_places(fewer, steps=0))
    assert error.value.key == "resume"


def test_random_states_come_back_and_new_ranks_draw_their_own(tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float, float]:
        return random.random(), float(np.random.normal()), float(np.random.normal()), float(torch.rand(()))

    seed_all(1, 2, 3)
    drawn()
    np.random.normal()  # an odd number of draws: numpy keeps the other of the pair
    write_numbers(tmp_path, {"ranks": 1})
    save_random_states(tmp_path, 0, CPU, {"numbers": [0.1]})
    expected = drawn()
    seed_all(9, 9, 9)
    assert load_random_states(tmp_path, 0, CPU, seed=3, step=4) == {"numbers": [0.1]}
    assert drawn() == expected
    others = []
    for rank in (1, 2, 1):
        load_random_states(tmp_path, rank, CPU, seed=3, step=4)
        others.append(drawn())
    assert others[0] == others[2]
    assert len({expected, *others}) == 3


def test_what_json_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_numbers(tmp_path, {"optimizer": object()})
