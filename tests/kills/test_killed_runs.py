"""Killed at any moment, a run resumes to the same bits; on other ranks or another engine to rounding.

KILLS=100 python -m pytest -m slow tests/kills
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.kills.killed_runs import SAMPLES, STEP_SAMPLES, STEPS, closely, exactly, once_an_epoch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("options", [[], ["--change"]], ids=["same", "changed"])
def test_a_killed_run_ends_as_the_one_that_was_not(options: list[str]) -> None:
    count = os.environ.get("KILLS", "6")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kills.killed_runs", "--count", count, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def run_folder(folder: Path, *, loss: float = 1.5, weight: float = 1.0) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "log.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
    (folder / "metrics.json").write_text(json.dumps({"train_samples": 8, "train_seconds": loss}))
    save_file({"a": np.array([weight, 0.5], np.float32)}, folder / "adapter" / "adapter_model.safetensors")
    return folder


def test_the_comparison_sees_the_last_bit_and_what_is_left_behind(tmp_path: Path) -> None:
    whole = run_folder(tmp_path / "whole")
    assert exactly(whole, run_folder(tmp_path / "same")) == ""
    assert "log.jsonl" in exactly(whole, run_folder(tmp_path / "loss", loss=1.5000001))
    assert "adapters" in exactly(whole, run_folder(tmp_path / "weight", weight=1.0000001))
    (tmp_path / "same" / ".a.unfinished-1-b").mkdir()
    assert ".a.unfinished-1-b" in exactly(whole, tmp_path / "same")
    assert closely(whole, run_folder(tmp_path / "near", loss=1.50005)) == ""
    assert closely(whole, run_folder(tmp_path / "far", loss=1.5002)) != ""


@pytest.mark.parametrize("twice", [False, True])
def test_a_sample_seen_twice_in_an_epoch_is_found(tmp_path: Path, twice: bool) -> None:
    order = [*range(SAMPLES), *reversed(range(SAMPLES))]
    steps = {step + 1: order[step * STEP_SAMPLES : (step + 1) * STEP_SAMPLES] for step in range(STEPS)}
    parts = {"killed": range(1, 4), "resumed": range(3, STEPS + 1)}  # the third was taken again
    if twice:
        steps[6][0] = steps[5][0]
    for part, numbers in parts.items():
        (tmp_path / part / "samples-0").mkdir(parents=True)
        lines = [json.dumps({"step": step, "samples": [str(sample) for sample in steps[step]]}) for step in numbers]
        (tmp_path / part / "samples-0" / "0.jsonl").write_text("\n".join(lines))
    assert bool(once_an_epoch(tmp_path)) is twice
