"""A loss, gradient or weight that is no number: named, left out, and no adapter is taken for whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_vl.core import TrainedPart
from dora_vl.errors import UserError
from dora_vl.run.folder import read_log
from dora_vl.training.faults import check_base_weights, check_trained_weights
from dora_vl.training.trainer import AdapterTrainer
from tests.training.launched import launch
from tests.training.tiny_run import MakeRun, assert_same_weights, json_of, logged, trained, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run_file(make_run: MakeRun) -> Path:
    return make_run(
        data={"group_by_modality_length": False}, training={"use_cpu": True, "train_sampling_strategy": "sequential"}
    )


def change_loss(
    monkeypatch: pytest.MonkeyPatch, steps: Sequence[int], change: Callable[[AdapterTrainer, Tensor], Tensor]
) -> None:
    """At these steps (from 0) the training loss is another."""
    compute = AdapterTrainer.compute_loss

    def changed(self: AdapterTrainer, *options: Any, **named: Any) -> Tensor:
        value: Tensor = compute(self, *options, **named)
        trains = cast(nn.Module, self.model).training and self.state.global_step in steps
        return change(self, value) if trains else value

    monkeypatch.setattr(AdapterTrainer, "compute_loss", changed)


def watched(trainer: AdapterTrainer, noted: Tensor, value: Tensor) -> Tensor:
    """The loss, of which the watch has noted another one."""
    trainer.faults._losses[-1] = noted.detach()
    return value


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, loss: bool) -> None:
    """The loss is NaN, or its gradient alone."""

    def spoilt(trainer: AdapterTrainer, value: Tensor) -> Tensor:
        if loss:
            return watched(trainer, value * math.nan, value * math.nan)
        value.register_hook(lambda gradient: gradient * math.nan)
        return value

    change_loss(monkeypatch, steps, spoilt)


@pytest.mark.parametrize("loss", [True, False])
def test_a_step_that_is_no_number_is_left_out_and_the_run_ends_with_its_samples(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, loss: bool
) -> None:
    constant = "--training.lr_scheduler_type=constant"
    sound, folder = trained(run_file, "--training.max_steps=3", constant, name="sound"), run_file.with_suffix("")
    spoil(monkeypatch, 3, loss=loss)
    with pytest.raises(UserError):
        trained(run_file, constant)
    assert not (folder / "adapter").exists()
    assert not (folder / "metrics.json").exists()
    assert_same_weights(folder / "checkpoint-4", sound)  # as the step before left them
    (line,) = read_log(folder / "faults.jsonl")
    assert line["step"] == 4
    assert line["fault"] == ("loss" if loss else "gradient")
    assert line["samples"] == ([f"sample-{number}" for number in range(12, 16)] if loss else [])  # of the fourth step


@pytest.mark.slow
def test_ten_such_steps_in_a_row_end_it_all_the_same(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, *range(2, 40), loss=False)
    with pytest.raises(UserError):
        trained(run_file, "--optim.not_finite=skip", "--training.max_steps=40")
    assert read_log(run_file.with_suffix("") / "faults.jsonl")[-1]["step"] == 12


def test_a_run_that_skips_counts_and_a_resumed_one_goes_on_after_the_step(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as spoilt:
        spoil(spoilt, 3, loss=True)
        with pytest.raises(UserError):
            trained(run_file)
    spoil(monkeypatch, 4, loss=True)
    folder = trained(run_file, "--resume=last", "--optim.not_finite=skip")
    numbers = json_of(folder / "metrics.json")
    assert [numbers[name] for name in ("train_steps", "steps_left_out", "train_samples")] == [6, 2, 24]
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(folder).values())


def test_a_base_with_a_weight_that_is_no_number_is_refused_before_the_first_step(
    run_file: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llava, tmp_path / "broken")
    weights = load_file(base / "model.safetensors")
    spoilt = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    weights[spoilt][3, 5] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        trained(run_file, f"--model.base={base}")
    assert not (run_file.with_suffix("") / "log.jsonl").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_are_read_whatever_their_number_type(value: float) -> None:
    last = nn.Linear(5, 2).to(torch.bfloat16)
    model = nn.Sequential(nn.Linear(3, 5).to(torch.bfloat16), last)
    check_base_weights(model, "base")
    part = TrainedPart("dora.A", {"1.weight": cast(nn.Parameter, last.weight)}, weight_decay=True)
    check_trained_weights([part], step=7, kept=None)
    with torch.no_grad():
        cast(nn.Linear, model[0]).weight.fill_(3e38)  # finite, though their float32 sum is not
    check_base_weights(model, "base")
    with torch.no_grad():
        last.weight[1, 2] = value
    with pytest.raises(UserError):
        check_base_weights(model, "base")
    with pytest.raises(UserError):
        check_trained_weights([part], step=7, kept="checkpoint-5")


@pytest.mark.slow
def test_without_zero_the_engine_s_log_holds_the_norm_before_clipping(run_file: Path) -> None:
    clipped, folder = ("--training.max_steps=2", "--training.max_grad_norm=0.01"), run_file.parent / "engine"
    launch(run_file, *clipped, f"--training.output_dir={folder}", "--training.deepspeed=zero0", ranks=1)
    plain, engine = (
        [line["grad_norm"] for line in logged(run, "grad_norm")] for run in (trained(run_file, *clipped), folder)
    )
    assert engine == pytest.approx(plain, rel=1e-3)
    assert len(engine) == 2
    assert min(engine) > 0.02


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero2"), (2, "zero3")])
def test_a_picture_whose_features_are_no_numbers_under_the_launcher(
    make_run: MakeRun, tmp_path: Path, ranks: int, zero: str
) -> None:
    run_file = make_run(
        data={"group_by_modality_length": False, "cache_features": True, "feature_cache": str(tmp_path / "features")},
        training={"deepspeed": zero, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2},
    )
    launch(run_file, "--training.max_steps=1", ranks=ranks)
    spoil_features(tmp_path / "features")
    launch(run_file, "--overwrite=true", ranks=ranks, succeeds=False)
    assert read_log(tmp_path / "run" / "faults.jsonl")[0]["fault"] == "loss"
    assert not (tmp_path / "run" / "adapter").exists()
    saved = weights_of(next((tmp_path / "run").glob("checkpoint-*")))
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


def spoil_features(folder: Path) -> None:
    """Makes every stored feature NaN; the store's own account of its shards stays."""
    for shard in folder.rglob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            tensors, index = load_file(shard), opened.metadata()
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        save_file(tensors, shard, index)
    assert json.loads((next(folder.rglob("*.json"))).read_text())
