"""docs/your_pictures.md: its code and commands run as they stand, on a tiny base, and on the demo's where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.start.page_commands import ROOT, block, run_commands
from tests.training.tiny_run import write_tiny_llava

PAGE = ROOT / "docs" / "your_pictures.md"
DEMO_BASE = ROOT / "runs" / "demo" / "base"


def run_all(folder: Path, base: Path, *more: str) -> list[str]:
    exec(compile(block(PAGE, "drawn"), "drawn", "exec"), {})
    return run_commands(PAGE, folder, more={0: ("--model", str(base)), 2: more})


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_tiny_llava(tmp_path / "base")
    short = ("--training.max_steps", "2", "--training.use_cpu", "true", "--evaluation.limit", "4")
    printed = run_all(tmp_path, base, *short)
    assert "my/questions.csv: question/answer, 200 rows, 200 usable" in printed[0]
    assert "nothing found" in printed[1]
    assert "with adapter:" in printed[-1]
    assert (tmp_path / "runs/my/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not DEMO_BASE.is_dir(), reason="runs/demo/base is not there; make demo leaves it")
def test_on_what_the_demo_trained_the_answers_are_right_and_of_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_all(tmp_path, DEMO_BASE)
    metrics = json.loads((tmp_path / "runs/my/metrics.json").read_text())
    (entry,) = metrics["sets"].values()
    assert (entry["n"], entry["metrics"]["accuracy"]["value"] >= 85) == (40, True)
    assert entry["baselines"]["commonest_answer"]["value"] < 85
    assert entry["baselines"]["exchanged_pictures"]["difference"]["low"] > 0
    assert "warning" not in entry["baselines"]
