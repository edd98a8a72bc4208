"""docs/your_pictures.md: its code and commands run as they stand, on a tiny base, and on the demo's where it is."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.tiny_run import write_tiny_llava

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "your_pictures.md").read_text(encoding="utf-8")
DEMO_BASE = ROOT / "runs" / "demo" / "base"


def block(mark: str) -> str:
    """The code behind a mark."""
    (found,) = re.findall(rf"<!-- {mark} -->\n```\w*\n(.*?)```", TEXT, re.DOTALL)
    return found


def programs() -> list[list[str]]:
    """Each command as words, with the programs of this environment and checkout in the place of those in a path."""
    own = {"dora-vl": [sys.executable, "-m", "dora_vl.cli"], "python": [sys.executable]}
    lines = [shlex.split(line) for line in block("commands").splitlines()]
    return [
        [*own[words[0]], *(str(ROOT / one) if one.startswith("tasks/") else one for one in words[1:])]
        for words in lines
    ]


def run_all(folder: Path, base: Path, *more: str) -> list[str]:
    """What each command prints, one after the other, in `folder`; `more` goes to the training."""
    exec(compile(block("drawn"), "drawn", "exec"), {})
    said = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / ".cache")}
    for number, words in enumerate(programs()):
        words += ["--model", str(base)] if number == 0 else [*more] if number == 2 else []
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
        said.append(done.stdout)
    return said


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_tiny_llava(tmp_path / "base")
    short = ("--training.max_steps", "2", "--training.use_cpu", "true", "--evaluation.limit", "4")
    told, checked, _, answered = run_all(tmp_path, base, *short)
    assert "my/questions.csv: question/answer, 200 rows (image, question, answer), 200 usable" in told
    assert "nothing found" in checked
    assert "with adapter:" in answered
    assert (tmp_path / "runs/my/adapter/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not DEMO_BASE.is_dir(), reason="runs/demo/base is not there; make demo builds it")
def test_on_the_demo_s_base_the_answers_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    *_, answered = run_all(tmp_path, DEMO_BASE)
    metrics = json.loads((tmp_path / "runs/my/metrics.json").read_text())
    assert metrics["accuracy"] >= 0.85
    assert "the" in answered
