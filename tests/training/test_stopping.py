"""A signal stops a run at a step's end, saved, for all ranks, and it goes on from there; also under the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.adapters.files import complete_checkpoints
from dora_vl.cli import main
from dora_vl.run.folder import read_log
from dora_vl.training.callbacks import StopOnSignal
from tests.training.launched import ROOT, free_port, launch
from tests.training.test_run import send_at_step
from tests.training.tiny_run import MakeRun, assert_same_weights, losses_of

STEPS = 60


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been(make_run: MakeRun, tmp_path: Path) -> None:
    run_file = make_run(adapter={"dropout": 0.2}, training={"max_steps": STEPS, "deepspeed": "zero3"})
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
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
    ]
    process = subprocess.Popen(
        [*command, "tasks/llava_instruct.py", "--config", str(run_file)],
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


def test_a_signal_ends_a_run_with_its_status_once_the_step_is_saved(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
