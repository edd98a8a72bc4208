"""The benchmark of killed runs: what it compares can fail, and it kills, resumes and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.kill_case import CASES, SAMPLES, STEP_SAMPLES, Case
from benchmarks.kill_compared import closely, exactly, once_an_epoch
from benchmarks.kills import Killer, summary

ROOT = Path(__file__).parents[2]


def run_folder(folder: Path, *, losses: tuple[float, ...] = (2.0, 1.5), weight: float = 1.0, samples: int = 8) -> Path:
    (folder / "adapter").mkdir(parents=True)
    lines = [{"step": step, "loss": loss, "samples_per_second": step} for step, loss in enumerate(losses, 1)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "metrics.json").write_text(json.dumps({"train_samples": samples, "train_seconds": weight}))
    save_file({"a": np.array([weight, 0.5], np.float32)}, folder / "adapter" / "adapter_model.safetensors")
    return folder


def test_two_runs_that_are_the_same(tmp_path: Path) -> None:
    assert exactly(run_folder(tmp_path / "one"), run_folder(tmp_path / "other")) == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"losses": (2.0, 1.5000001)}, "losses differ"),
        ({"losses": (2.0,)}, "losses differ"),
        ({"weight": 1.0000001}, "a differs"),
        ({"samples": 12}, "metrics differ"),
    ],
)
def test_the_last_bit_counts(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    assert told in exactly(run_folder(tmp_path / "one"), run_folder(tmp_path / "other", **change))


def test_what_is_left_behind_is_told(tmp_path: Path) -> None:
    (run_folder(tmp_path / "other") / ".writing").mkdir()
    assert exactly(run_folder(tmp_path / "one"), tmp_path / "other") == "left behind: .writing"


def test_of_another_shape_rounding_is_allowed_and_no_more(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one")
    assert closely(one, run_folder(tmp_path / "near", losses=(2.0, 1.50005))) == ""
    assert "losses differ by 0.0002" in closely(one, run_folder(tmp_path / "far", losses=(2.0, 1.5002)))
    assert "steps differ" in closely(one, run_folder(tmp_path / "short", losses=(2.0,)))


def noted(folder: Path, part: str, steps: dict[int, list[int]], ranks: int) -> None:
    notes = folder.with_name(f"{folder.name}-notes") / part
    notes.mkdir(parents=True)
    for rank in range(ranks):
        lines = [{"step": step, "ids": [str(one) for one in ids[rank::ranks]]} for step, ids in steps.items()]
        (notes / f"samples-{rank}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.mark.parametrize("twice", [False, True])
def test_a_sample_seen_twice_in_an_epoch_is_told(tmp_path: Path, twice: bool) -> None:
    folder, per_epoch = tmp_path / "run", SAMPLES // STEP_SAMPLES
    order = list(range(SAMPLES)) + list(reversed(range(SAMPLES)))
    steps = {step + 1: order[step * STEP_SAMPLES : (step + 1) * STEP_SAMPLES] for step in range(2 * per_epoch)}
    noted(folder, "killed", {step: ids for step, ids in steps.items() if step <= 3}, ranks=1)
    later = {step: list(ids) for step, ids in steps.items() if step > 2}  # the third was taken again
    if twice:
        later[6][0] = later[5][0]
    noted(folder, "resumed", later, ranks=2)
    assert bool(once_an_epoch(folder, Case("llava", "none", 1))) is twice


def test_a_change_of_shape_is_one() -> None:
    draws = Random(0)
    for case in CASES:
        other = Killer._other(case, draws)
        assert other.kind == case.kind
        assert (other.engine, other.ranks) != (case.engine, case.ranks)
        assert Case.named(other.name) == other


def test_the_summary_counts_kills_in_files() -> None:
    kills = [
        {"run": "a", "outcome": "same", "killed": True, "phase": "save"},
        {"run": "a", "outcome": "losses differ", "killed": True, "phase": "any moment"},
        {"run": "b", "outcome": "same", "killed": True, "phase": "removal"},
    ]
    found = summary(kills)
    assert (found["same"], found["of"], found["killed"], found["in_a_save_or_removal"]) == (2, 3, 3, 2)
    assert found["lines"][:2] == ["a: 1 of 2", "b: 1 of 1"]


@pytest.mark.slow
def test_it_kills_resumes_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "kills.json"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for count in (2, 3):
        command = [sys.executable, "-m", "benchmarks.kills", "--count", str(count), "--only", "llava", "none", "1"]
        done = subprocess.run(
            [*command, "--json", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        found = json.loads(path.read_text())
        assert [one["number"] for one in found["kills"]] == list(range(count))
        assert found["killed"] == found["same"] == count
