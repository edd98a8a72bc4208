"""docs/your_videos.md: its code draws clips, and its commands run as they stand, on a tiny SmolVLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.evaluation.predictions import read_predictions
from tests.backbones.tiny_image_text import write_tiny
from tests.start.page_commands import ROOT, block, run_commands

pytest.importorskip("av", reason="pip install '.[video]'")
pytest.importorskip("num2words", reason="SmolVLM's processor asks for it")
PAGE = ROOT / "docs" / "your_videos.md"
SHORT = ("--training.max_steps", "2", "--training.use_cpu", "true", "--evaluation.limit", "4")


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block(PAGE, "drawn"), "drawn", "exec"), {})
    base = write_tiny("smolvlm", tmp_path / "base")
    output, checked, _, answered = run_commands(PAGE, tmp_path, more={0: ("--model", str(base)), 2: SHORT})
    assert "clips/questions.csv: question/answer, 60 rows (video, question, answer), 60 usable" in output
    assert "videos: 60 in clips, MP4 60" in output
    assert "12 rows about 12 videos" in output
    assert "nothing found" in checked
    assert "clips/001.mp4 (8 frames, 0.1 to 1.8 s, " in answered
    assert "which way does the ball roll?" in answered
    assert "with adapter:" in answered
    assert "without adapter:" in answered
    assert (tmp_path / "runs/clips/adapter/adapter_model.safetensors").is_file()
    own, *_ = read_predictions(tmp_path / "runs/clips/predictions.jsonl").values()
    assert len(own) == 4
