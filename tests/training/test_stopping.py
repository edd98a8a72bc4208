"""What ends a run, saved and named: a signal, validations without a lower loss, a number that is none."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.adapters.files import complete_checkpoints
from dora_vl.cli import main
from dora_vl.core import TrainedPart
from dora_vl.errors import SettingError, UserError
from dora_vl.run.folder import read_log
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.callbacks import StopOnSignal
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.faults import check_base_weights, check_trained_weights
from dora_vl.training.run import run, train
from dora_vl.training.trainer import AdapterTrainer
from tests.training.launched import ROOT, free_port, launch
from tests.training.test_run import send_at_step
from tests.training.tiny_run import MakeRun, assert_same_weights, json_of, logged, losses_of, trained, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been(make_run: MakeRun, tmp_path: Path) -> None:
    run_file = make_run(adapter={"dropout": 0.2}, training={"max_steps": 60, "deepspeed": "zero3"})
    whole = tmp_path / "whole"
    launch(run_file, f"--training.output_dir={whole}", ranks=2)

    folder = tmp_path / "run"
    stop_after_two_steps(run_file, folder)
    (checkpoint,) = complete_checkpoints(folder)
    assert not (folder / "adapter").exists()  # nothing that looks like the result of a whole run
    assert (checkpoint / "adapter" / "adapter_model.safetensors").is_file()
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size < 1_000_000  # three copies of 6,208 float32 trained numbers, not the base

    launch(run_file, "--resume=last", ranks=2)
    torch.testing.assert_close(losses_of(folder), losses_of(whole), atol=1e-6, rtol=0)
    assert_same_weights(folder, whole, atol=1e-6)


def stop_after_two_steps(run_file: Path, folder: Path) -> None:
    """Sends what a terminal's Ctrl-C sends: SIGINT to every process of the group; who stopped is told once."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, *launcher, "tasks/llava_instruct.py", "--config", str(run_file)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(read_log(folder / "log.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert stderr.count("stopped by SIGINT; --resume last resumes from there") == 1


def test_a_signal_ends_a_run_with_its_status_once_the_step_is_saved(make_run, tmp_path, monkeypatch) -> None:
    run_file = make_run(training={"use_cpu": True})
    before = [signal.getsignal(number) for number in StopOnSignal.SIGNALS]
    send_at_step(monkeypatch, 2)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(run_file)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [checkpoint.name for checkpoint in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert [signal.getsignal(number) for number in StopOnSignal.SIGNALS] == before


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    stop, before = StopOnSignal(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop.on_train_begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


STEPS, EVERY, PATIENCE = 40, 2, 3


@pytest.fixture
def validating(make_run: MakeRun, tiny_data: Path) -> Path:
    """Validates on answers that are never right, so that their loss falls with the words' form and rises afterwards."""
    records = json.loads(tiny_data.read_text())
    for record in records:
        record["conversations"][-1]["value"] = "chat between"
    other = tiny_data.with_name("other.json")
    other.write_text(json.dumps(records))
    training: dict[str, Any] = {"use_cpu": True, "max_steps": STEPS, "eval_strategy": "steps", "eval_steps": EVERY}
    written = make_run(
        data={"validation": str(other)},
        optim={"early_stopping": PATIENCE},
        training={**training, "learning_rate": 0.02, "lr_scheduler_type": "constant"},
    )
    written.write_text(written.read_text().replace("  save_strategy: 'no'\n", ""))
    return written


def reason(validating: Path, *words: str) -> int | None:
    return train(DecoderPipeline(read_run_file(validating, *words)))[0]


def validations(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in logged(folder, "eval_loss")]


def test_a_run_ends_and_keeps_the_best(validating: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert reason(validating, f"--training.output_dir={whole}") is None
    losses = validations(whole)
    best, _ = min(losses, key=lambda pair: pair[1])
    last, _ = losses[-1]
    assert (last - best, last < STEPS) == (PATIENCE * EVERY, True)
    assert json.loads((whole / "metrics.json").read_text())["train_steps"] == last
    assert_same_weights(whole, whole / f"checkpoint-{best}")


@pytest.mark.slow
def test_a_stopped_run_goes_on_counting(validating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert reason(validating, f"--training.output_dir={whole}") is None
    losses = validations(whole)
    best, _ = min(losses, key=lambda pair: pair[1])
    send_at_step(monkeypatch, best + EVERY + 1)  # one validation without a lower loss is counted by then
    assert reason(validating, f"--training.output_dir={stopped}") is not None
    monkeypatch.undo()
    for _ in range(2):  # its end is its end
        assert reason(validating, f"--training.output_dir={stopped}", "--resume=last") is None
        assert validations(stopped) == losses
        assert_same_weights(stopped, whole)
    assert complete_checkpoints(stopped)[-1].name == f"checkpoint-{losses[-1][0]}"


def test_it_needs_something_to_validate_on(make_run: MakeRun, tiny_data: Path, tmp_path: Path) -> None:
    run_file = make_run(optim={"early_stopping": 2}, training={"use_cpu": True})
    for words in ([], [f"--data.validation={tiny_data}", "--training.eval_strategy=no"]):
        with pytest.raises(SettingError) as refused:
            run(DecoderPipeline(read_run_file(run_file, *words)))
        assert refused.value.key == "optim.early_stopping"
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingError) as refused:
        read_run_file(run_file, "--optim.early_stopping=0")
    assert refused.value.key == "optim.early_stopping"


@pytest.fixture
def in_order(make_run: MakeRun) -> Path:
    return make_run(
        data={"group_by_modality_length": False}, training={"use_cpu": True, "train_sampling_strategy": "sequential"}
    )


Change = Callable[[AdapterTrainer, Tensor], Tensor]


def change_loss(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int], change: Change) -> None:
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
def test_a_step_that_is_no_number_is_left_out_and_the_run_ends_with_its_samples(in_order, monkeypatch, loss) -> None:
    constant = "--training.lr_scheduler_type=constant"
    sound, folder = trained(in_order, "--training.max_steps=3", constant, name="sound"), in_order.with_suffix("")
    spoil(monkeypatch, 3, loss=loss)
    with pytest.raises(UserError):
        trained(in_order, constant)
    assert not (folder / "adapter").exists()
    assert not (folder / "metrics.json").exists()
    assert_same_weights(folder / "checkpoint-4", sound)  # as the step before left them
    (line,) = read_log(folder / "faults.jsonl")
    assert line["step"] == 4
    assert line["fault"] == ("loss" if loss else "gradient")
    assert line["samples"] == ([f"sample-{number}" for number in range(12, 16)] if loss else [])  # of the fourth step


@pytest.mark.slow
def test_ten_such_steps_in_a_row_end_it_all_the_same(in_order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, *range(2, 40), loss=False)
    with pytest.raises(UserError):
        trained(in_order, "--optim.not_finite=skip", "--training.max_steps=40")
    assert read_log(in_order.with_suffix("") / "faults.jsonl")[-1]["step"] == 12


def test_a_run_that_skips_counts_and_a_resumed_one_goes_on_after_the_step(in_order, monkeypatch) -> None:
    with monkeypatch.context() as spoilt:
        spoil(spoilt, 3, loss=True)
        with pytest.raises(UserError):
            trained(in_order)
    spoil(monkeypatch, 4, loss=True)
    folder = trained(in_order, "--resume=last", "--optim.not_finite=skip")
    numbers = json_of(folder / "metrics.json")
    assert [numbers[name] for name in ("train_steps", "steps_left_out", "train_samples")] == [6, 2, 24]
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(folder).values())


def test_a_base_with_a_weight_that_is_no_number_is_refused_before_the_first_step(
    in_order: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llava, tmp_path / "broken")
    weights = load_file(base / "model.safetensors")
    spoilt = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    weights[spoilt][3, 5] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        trained(in_order, f"--model.base={base}")
    assert not (in_order.with_suffix("") / "log.jsonl").exists()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_are_read_whatever_their_number_type(value: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(torch.bfloat16)
    weights = [cast(nn.Parameter, layer.weight) for layer in model]
    part = TrainedPart("dora.A", {"1.weight": weights[1]}, weight_decay=True)
    with torch.no_grad():
        weights[0].fill_(3e38)  # finite, though their float32 sum is not
    check_base_weights(model, "base")
    check_trained_weights([part], step=7, folder=tmp_path)
    with torch.no_grad():
        weights[1][1, 2] = value
    with pytest.raises(UserError):
        check_base_weights(model, "base")
    with pytest.raises(UserError):
        check_trained_weights([part], step=7, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero2"), (2, "zero3")])
def test_a_picture_whose_features_are_no_numbers_under_the_launcher(make_run, tmp_path, ranks, zero) -> None:
    in_order = make_run(
        data={"group_by_modality_length": False, "cache_features": True, "feature_cache": str(tmp_path / "features")},
        training={"deepspeed": zero, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2},
    )
    launch(in_order, "--training.max_steps=1", ranks=ranks)
    spoil_features(tmp_path / "features")
    launch(in_order, "--overwrite=true", ranks=ranks, succeeds=False)
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
