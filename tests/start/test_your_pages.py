"""docs/your_pictures.md and docs/your_videos.md: their code and commands run as they stand, on tiny bases."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.evaluation.predictions import read_predictions
from tests.backbones.tiny_image_text import write_tiny_video
from tests.start.people import write_signs
from tests.training.tiny_run import write_tiny_llava

ROOT = Path(__file__).parents[2]
DEMO_BASE = ROOT / "runs" / "demo" / "base"
SHORT = ("--training.max_steps", "2", "--training.use_cpu", "true", "--evaluation.limit", "4")


def block(page: str, mark: str) -> str:
    """The code behind a mark, `<!-- mark -->`."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (code,) = re.findall(rf"<!-- {mark} -->\n```\w*\n(.*?)```", text, re.DOTALL)
    return code


def run_page(page: str, folder: Path, base: Path, more: Sequence[str] = ()) -> list[str]:
    """Draws what the page draws; prints of its commands, one after the other; `more` goes to the training."""
    exec(compile(block(page, "drawn"), "drawn", "exec"), {})
    own = {"dora-vl": [sys.executable, "-m", "dora_vl.cli"], "python": [sys.executable]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / ".cache")}
    printed = []
    for number, line in enumerate(block(page, "commands").splitlines()):
        program, *words = shlex.split(line)
        words = [str(ROOT / word) if word.startswith("tasks/") else word for word in words]
        words = [*own[program], *words, *{0: ("--model", str(base)), 2: more}.get(number, ())]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
        printed.append(done.stdout)
    return printed


@pytest.mark.slow
def test_your_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run_page("your_pictures.md", tmp_path, write_tiny_llava(tmp_path / "base"), SHORT)
    assert "my/questions.csv: question/answer, 200 rows, 200 usable" in printed[0]
    assert "nothing found" in printed[1]
    assert "with adapter:" in printed[-1]
    assert (tmp_path / "runs/my/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not DEMO_BASE.is_dir(), reason="runs/demo/base is not there; make demo leaves it")
def test_on_what_the_demo_trained_the_answers_are_right_and_of_the_pictures(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run_page("your_pictures.md", tmp_path, DEMO_BASE)
    metrics = json.loads((tmp_path / "runs/my/metrics.json").read_text())
    (entry,) = metrics["sets"].values()
    assert (entry["n"], entry["metrics"]["accuracy"]["value"] >= 85) == (40, True)
    assert entry["baselines"]["commonest_answer"]["value"] < 85
    assert entry["baselines"]["exchanged_pictures"]["difference"]["low"] > 0
    assert "warning" not in entry["baselines"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not DEMO_BASE.is_dir(), reason="runs/demo/base is not there; make demo leaves it")
@pytest.mark.parametrize("as_pairs", [True, False])
def test_preferences_as_init_writes_them_teach_a_base_that_answers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, as_pairs: bool
) -> None:
    """`dpo` alone ends at 0 %, as does the base."""
    monkeypatch.chdir(tmp_path)
    write_signs(tmp_path / "signs", as_pairs=as_pairs)
    main(["init", "signs", "--model", str(DEMO_BASE)])
    steps = ("--training.max_steps=40", "--training.per_device_train_batch_size=8", "--watch=0")
    main(["train", "runs/signs/run.yaml", *steps, "--evaluation.forgetting=false"])
    (entry,) = json.loads((tmp_path / "runs/signs/metrics.json").read_text())["sets"].values()
    assert entry["metrics"]["accuracy"]["value"] >= 70
    assert entry["baselines"]["untrained_base"]["value"] == 0


@pytest.mark.slow
def test_your_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="pip install '.[video]'")
    pytest.importorskip("num2words", reason="SmolVLM's processor asks for it")
    monkeypatch.chdir(tmp_path)
    base = write_tiny_video("smolvlm", tmp_path / "base")
    more = (*SHORT, "--data.replay", "0")  # a base with random weights writes no chat that can be learned
    output, checked, _, answered = run_page("your_videos.md", tmp_path, base, more)
    assert "clips/questions.csv: question/answer, 60 rows, 60 usable" in output
    assert "nothing found" in checked
    assert "clips/001.mp4 (8 frames, 0.1 to 1.8 s, " in answered
    assert "without adapter:" in answered
    own, *_ = read_predictions(tmp_path / "runs/clips/predictions.jsonl").values()
    assert len(own) == 4
