"""A checkpoint comes back as it was written: bitwise in the shape that wrote it, sample for sample in any other."""

import dataclasses
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from safetensors.torch import load_file

from dora_vl.training.checkpoint import (
    OptimizerLayout,
    TensorPiece,
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
from tests.training.recorded_run import recorded, samples_by_step
from tests.training.tiny_run import assert_same_weights, json_of, losses_of, weights_of, write_run, write_tiny_data

CPU = torch.device("cpu")
Trained = dict[str, torch.nn.Parameter]


def parameters() -> Trained:
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
    pieces = dict(
        zip(tensors, (TensorPiece(0, 6, 0, 12), TensorPiece(0, 0, 0, 5), TensorPiece(1, 0, 0, 4)), strict=True)
    )
    return OptimizerLayout(optimizer_of(flats, 2), flats, tensors, pieces, CPU)


def saved(checkpoint: Path, layout: OptimizerLayout, **sizes: int) -> None:
    write_state(checkpoint, whole_tensors(layout), **sizes)
    write_numbers(checkpoint, {"optimizer": optimizer_numbers(layout)})


def loaded(checkpoint: Path, layout: OptimizerLayout) -> None:
    files = StateFiles(checkpoint)
    load_values(layout, files)
    load_optimizer(layout, files)


def test_flat_tensors_and_whole_ones_are_the_same_state(tmp_path: Path) -> None:
    tensors, flat_tensors, back = parameters(), parameters(), parameters()
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
    saved(tmp_path, whole_places(parameters(), steps=3))
    tensors = parameters()
    first, *last = tensors.values()
    counting = WholeSteps([{"name": "first", "params": [first, last[0]]}, {"name": "last", "params": last[1:]}])
    loaded(tmp_path, layout_of(counting, tensors, CPU))
    steps = [counting.state[tensor]["step"] for tensor in tensors.values()]
    assert steps == [3, 3, 3]
    assert {type(step) for step in steps} == {int}


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


STEPS, SAVED, SAMPLES, STEP_SAMPLES = 8, 3, 24, 4  # six steps an epoch: saved within the first, ended in the second
OFTEN = {"save_strategy": "steps", "save_steps": SAVED, "save_total_limit": 9, "max_steps": STEPS}


@dataclasses.dataclass(frozen=True)
class Shape:
    ranks: int
    stage: str | None
    micro_batch: int = 2

    @property
    def cut(self) -> tuple[str, str]:
        """How a step of four samples is cut into micro-batches."""
        accumulation = STEP_SAMPLES // self.micro_batch // self.ranks
        return (
            f"--training.per_device_train_batch_size={self.micro_batch}",
            f"--training.gradient_accumulation_steps={accumulation}",
        )

    def __str__(self) -> str:
        return f"{self.ranks}-{self.stage or 'none'}-{self.micro_batch}"


ONE, TWO = Shape(1, None), Shape(2, None)
ONE_ZERO_0, ONE_ZERO_2, ONE_ZERO_3 = Shape(1, "zero0"), Shape(1, "zero2"), Shape(1, "zero3")
TWO_ZERO_0, TWO_ZERO_2, TWO_ZERO_3 = Shape(2, "zero0"), Shape(2, "zero2"), Shape(2, "zero3")


@pytest.fixture(scope="module")
def run_file(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shape")
    data = write_tiny_data(folder / "data", samples=SAMPLES)
    training = {"per_device_train_batch_size": 2, "weight_decay": 0.1, **OFTEN}
    return write_run(folder / "run.yaml", tiny_llava, data, training=training)


def trained(run_file: Path, folder: Path, shape: Shape, *overrides: str) -> None:
    recorded(run_file, folder, *shape.cut, *overrides, ranks=shape.ranks, stage=shape.stage)


def state(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    (file,) = (folder / f"checkpoint-{step}" / "state").glob("*.safetensors")
    return load_file(file)


def whole_run(run_file: Path, shape: Shape) -> Path:
    """The run without a stop, once for every test of a shape."""
    folder = run_file.parent / f"whole-{shape}"
    if not (folder / "metrics.json").is_file():
        trained(run_file, folder, shape)
    return folder


DROPOUT = ("--adapter.dropout=0.2",)
"""So that the random states count too."""
MASTERS = (
    "--model.dtype=bfloat16",
    "--training.bf16=true",
    "--adapter.method=full",
    '--adapter.targets=["model.language_model*", "lm_head"]',
)
"""A bfloat16 model, whose masters are float32, the projector's too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        *((shape, DROPOUT) for shape in (ONE, ONE_ZERO_0, ONE_ZERO_2, ONE_ZERO_3, TWO, TWO_ZERO_2, TWO_ZERO_3)),
        *((shape, MASTERS) for shape in (ONE_ZERO_0, ONE_ZERO_2, TWO_ZERO_3)),
    ],
)
def test_the_same_shape_goes_on_bitwise(run_file, tmp_path, shape, settings) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    trained(run_file, whole, shape, *settings)
    checkpoint = whole / f"checkpoint-{SAVED}"
    names = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}
    assert {name for name in names if "random" in name} == {f"state/random-{rank}.json" for rank in range(shape.ranks)}
    values = {name: tensor for name, tensor in state(whole).items() if name.startswith("value/")}
    assert {tensor.dtype for tensor in values.values()} == {torch.float32}
    if settings == MASTERS:
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in values.values())
    trained(run_file, again, shape, *settings, f"--resume={checkpoint}")
    assert torch.equal(losses_of(again), losses_of(whole)[SAVED:])
    later = {step: samples for step, samples in samples_by_step(whole).items() if step > SAVED}
    assert samples_by_step(again) == later
    assert_same_weights(again, whole)
    assert state(again).keys() == state(whole).keys()
    assert all(torch.equal(state(again)[name], tensor) for name, tensor in state(whole).items())
    assert sum(name.startswith("exp_avg_sq/") for name in state(again)) == len(values)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ONE, TWO_ZERO_2, TWO_ZERO_3], ids=str)
def test_the_best_checkpoint_is_what_ends_in_the_adapter_folder(run_file: Path, tmp_path: Path, shape: Shape) -> None:
    """Best here is the largest loss, that of the first checkpoint."""
    data = str(run_file.parent / "data" / "train.json")
    often = ("--training.eval_strategy=steps", f"--training.eval_steps={SAVED}", f"--data.validation={data}")
    best = ("--training.load_best_model_at_end=true", "--training.greater_is_better=true")
    trained(run_file, tmp_path / "run", shape, *often, *best, "--training.metric_for_best_model=loss")
    run = tmp_path / "run"
    assert json_of(run / f"checkpoint-{STEPS}" / "trainer_state.json")["best_global_step"] == SAVED
    assert_same_weights(run, run / f"checkpoint-{SAVED}")
    last = weights_of(run / f"checkpoint-{STEPS}")
    assert any(not torch.equal(weights_of(run)[name], tensor) for name, tensor in last.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "now"),
    [
        (TWO_ZERO_2, ONE),
        (TWO_ZERO_2, TWO_ZERO_3),
        (TWO_ZERO_3, ONE_ZERO_2),
        (TWO_ZERO_3, ONE),
        (ONE, TWO_ZERO_3),
        (ONE, TWO_ZERO_0),
        (TWO_ZERO_3, TWO),
    ],
    ids=str,
)
def test_another_shape_goes_on_sample_for_sample(run_file: Path, tmp_path: Path, then: Shape, now: Shape) -> None:
    whole, again = whole_run(run_file, then), tmp_path / "again"
    trained(run_file, again, now, f"--resume={whole / f'checkpoint-{SAVED}'}")
    torch.testing.assert_close(losses_of(again), losses_of(whole)[SAVED:], atol=1e-4, rtol=0)
    taken = {**samples_by_step(whole), **samples_by_step(again)}
    assert taken == samples_by_step(whole)
    first_epoch = sum((taken[step] for step in range(1, 1 + SAMPLES // STEP_SAMPLES)), Counter())
    assert set(first_epoch.values()) == {1}
    assert len(first_epoch) == SAMPLES
    ours, theirs = state(again), state(whole)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].double(), tensor.double(), atol=2e-3, rtol=0, msg=name)


@pytest.mark.slow
def test_two_ranks_go_on_with_the_order_of_one_ranks_larger_micro_batches(run_file: Path, tmp_path: Path) -> None:
    whole, again = whole_run(run_file, Shape(1, None, 4)), tmp_path / "again"
    trained(run_file, again, TWO, f"--resume={whole / f'checkpoint-{SAVED}'}")
    later = {step: samples for step, samples in samples_by_step(whole).items() if step > SAVED}
    assert samples_by_step(again) == later
