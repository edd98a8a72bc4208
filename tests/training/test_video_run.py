"""Videos through the training script: mixed with pictures and words, saved, resumed; broken ones named; or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from dora_vl.adapters.folder import read_weights
from dora_vl.data.turns import Clip, Turn
from dora_vl.data.video import Uniform
from dora_vl.errors import SettingError
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictor import Shown
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tasks import llava_instruct
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_video import write_tiny_video
from tests.data.video_files import read_frames
from tests.training.tiny_run import decoder_run, logged_losses, refused, write_run, write_tiny_llava
from tests.training.video_run import write_video_data

pytest.importorskip("av")
CPU: dict[str, object] = {"use_cpu": True, "max_steps": 3, "per_device_train_batch_size": 4}
FRAMES: dict[str, object] = {"video_frames": 4, "max_tokens": 512, "max_bad_share": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL, and data of every kind."""
    folder = tmp_path_factory.mktemp("videos")
    write_tiny_video("qwen2_5_vl", folder / "base")
    write_video_data(folder / "data")
    return folder


def settings(root: Path, name: str, base: Path | None = None, **changes: dict[str, object]) -> Path:
    sections = {
        **changes,
        "training": {**CPU, **changes.get("training", {})},
        "data": {**FRAMES, **changes.get("data", {})},
    }
    return write_run(root / f"{name}.yaml", base or root / "base", root / "data" / "train.json", **sections)


def test_three_steps_are_trained_saved_and_opened_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = settings(root, "whole", data={"workers": 2})
    monkeypatch.setattr("sys.argv", ["llava_instruct.py", "--config", str(path)])
    llava_instruct.main()
    run_folder = root / "whole"
    assert len(logged_losses(run_folder)) == 3
    assert not (run_folder / "skipped.jsonl").is_file() or not (run_folder / "skipped.jsonl").read_text()
    weights = read_weights(run_folder / "adapter")
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    recipe = json.loads((run_folder / "adapter" / "recipe.json").read_text())
    assert (recipe["video_frames"], recipe["video_fps"]) == (4, None)
    opened = open_model(ModelRequest(adapter=run_folder / "adapter", with_base=True))
    video = read_frames(root / "data", Clip(path="red.mp4"), Uniform(4))
    answers: list[torch.Tensor] = []
    for assistant in (opened.adapted, opened.base):
        assert isinstance(assistant, Assistant)
        sample = assistant.prompts.sample([Turn("user", "<video>\nSay the colour.")], Shown(videos=(video,)))
        with torch.no_grad():
            answers.append(assistant.backbone.model(input_ids=sample.input_ids[None], **sample.inputs).logits)
    assert (answers[0] - answers[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "family",
    ["smolvlm", "llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next_video", "idefics3"))],
)
def test_other_ways_that_videos_go_in(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Frames among the pictures, videos of one length, and frames as pictures, which is said."""
    if family == "smolvlm":
        pytest.importorskip("num2words")
    ways = {"idefics3": write_tiny, "llava": lambda _, folder: write_tiny_llava(folder)}
    base = ways.get(family, write_tiny_video)(family, tmp_path / "base")
    messages: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *words: messages.append(text % words))
    run(DecoderPipeline(read_run_file(settings(root, family, base, data={"video_frames": 8}))))
    assert len(logged_losses(root / family)) == 3
    assert sum("as pictures" in message for message in messages) == (family in ways)


def test_a_broken_video_is_a_bad_sample_and_named(root: Path) -> None:
    records = json.loads((root / "data" / "train.json").read_text())
    broken = {2: "none.mp4", 6: "../data/red.mp4", 11: "cut.mp4"}
    (root / "data" / "cut.mp4").write_bytes((root / "data" / "white.mp4").read_bytes()[:-200])
    for index, name in broken.items():
        records[index]["video"] = name
    (root / "data" / "broken.json").write_text(json.dumps(records))
    data: dict[str, object] = {"train": str(root / "data" / "broken.json"), "max_bad_share": 0.5}
    run(DecoderPipeline(read_run_file(settings(root, "broken", data=data, training={"max_steps": 4}))))
    lines = [json.loads(line) for line in (root / "broken" / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert "video none.mp4 is missing" in reasons["sample-2"]
    assert "must not leave" in reasons["sample-6"]
    assert "cannot be read" in reasons["sample-11"]
    assert len(reasons) == 3


@pytest.mark.parametrize(
    ("family", "data", "key"),
    [
        ("llava_next_video", {"video_fps": 2.0}, "data.video_fps"),
        ("qwen3_vl", {"video_frames": 1}, "data.video_frames"),
        ("glm4v", {}, "data.train"),
    ],
)
def test_what_no_video_could_be_trained_with_ends_before_weights_are_read(
    root: Path, tmp_path: Path, family: str, data: dict[str, object], key: str
) -> None:
    base = write_tiny_video(family, tmp_path / "base")
    error = refused(decoder_run(settings(root, "refused", base, data=data)))
    assert isinstance(error, SettingError)
    assert error.key == key
