"""A checkpoint goes on bitwise in the shape that wrote it, and to rounding, sample for sample, in any other.

Shapes are numbers of ranks, ZeRO stages or none, and how a step's samples are cut into micro-batches. Every program
here raises when it opens a pickle.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.recorded_run import recorded, samples_by_step
from tests.training.tiny_run import assert_same_weights, json_of, losses_of, weights_of, write_run, write_tiny_data

STEPS, SAVED, SAMPLES, STEP_SAMPLES = 8, 3, 24, 4  # six steps an epoch: saved within the first, ended in the second
OFTEN = {"save_strategy": "steps", "save_steps": SAVED, "save_total_limit": 9, "max_steps": STEPS}


@dataclasses.dataclass(frozen=True)
class Shape:
    ranks: int
    stage: str | None

    @property
    def cut(self) -> str:
        """How a step of four samples is cut into micro-batches of two."""
        return f"--training.gradient_accumulation_steps={2 // self.ranks}"

    def __str__(self) -> str:
        return f"{self.ranks}-{self.stage or 'none'}"


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
    recorded(run_file, folder, shape.cut, *overrides, ranks=shape.ranks, stage=shape.stage)


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
    '--adapter.targets=["model.language_model*", "lm_head", "model.multi_modal_projector*"]',
    "--optim.projector_learning_rate=null",
)
"""A bfloat16 model, whose masters are float32."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        *((shape, DROPOUT) for shape in (ONE, ONE_ZERO_0, ONE_ZERO_2, ONE_ZERO_3, TWO, TWO_ZERO_2, TWO_ZERO_3)),
        *((shape, MASTERS) for shape in (ONE_ZERO_0, ONE_ZERO_2, TWO_ZERO_3)),
    ],
)
def test_the_same_shape_goes_on_bitwise(
    run_file: Path, tmp_path: Path, shape: Shape, settings: tuple[str, ...]
) -> None:
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
@pytest.mark.timeout(900)
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("then", "now"),
    [
        pytest.param(TWO_ZERO_2, ONE, marks=pytest.mark.slow),
        pytest.param(TWO_ZERO_2, TWO_ZERO_3, marks=pytest.mark.slow),
        pytest.param(TWO_ZERO_3, ONE_ZERO_2, marks=pytest.mark.slow),
        pytest.param(TWO_ZERO_3, ONE, marks=pytest.mark.slow),
        pytest.param(ONE, TWO_ZERO_3, marks=pytest.mark.slow),
        pytest.param(ONE, TWO_ZERO_0, marks=pytest.mark.slow),
        pytest.param(TWO_ZERO_3, TWO, marks=pytest.mark.slow),
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
