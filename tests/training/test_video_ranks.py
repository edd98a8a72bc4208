"""Two ranks under ZeRO-3, mixed differently in every step, train what one rank trains: words, pictures, videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dora_vl.adapters.folder import read_weights
from tests.backbones.tiny_video import write_tiny_video
from tests.training.test_two_ranks import launch, losses
from tests.training.tiny_run import write_run
from tests.training.video_run import write_video_data

pytest.importorskip("av")
STEPS = 4
ORDER = (0, 4, 2, 6, 1, 5, 3, 7, 2, 6, 1, 5, 8, 3, 9, 10)
"""A micro-batch of two each: words | videos, pictures | both, videos | pictures, words and both | picture and video."""


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize(("family", "port"), [("qwen2_5_vl", 29721), ("llava_next_video", 29723)])
def test_two_ranks_of_zero3_train_what_one_rank_trains(tmp_path: Path, family: str, port: int) -> None:
    base = write_tiny_video(family, tmp_path / "base")
    data = write_video_data(tmp_path / "data")
    records = json.loads(data.read_text())
    data.write_text(json.dumps([{**records[place], "id": str(number)} for number, place in enumerate(ORDER)]))
    training = {"max_steps": STEPS, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    frames = {"group_by_modality_length": False, "video_frames": 4, "max_tokens": 512, "max_bad_share": 0.0}
    run = write_run(tmp_path / "run.yaml", base, data, data=frames, training=training)
    one_rank = ("--training.deepspeed=zero0", "--training.gradient_accumulation_steps=2")
    results = {
        "one": launch(run, f"--training.output_dir={tmp_path / 'one'}", *one_rank, ranks=1, port=port),
        "two": launch(
            run, f"--training.output_dir={tmp_path / 'two'}", "--training.deepspeed=zero3", ranks=2, port=port + 1
        ),
    }
    for result in results.values():
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == STEPS
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    for name, tensor in read_weights(tmp_path / "one" / "adapter").items():
        torch.testing.assert_close(read_weights(tmp_path / "two" / "adapter")[name], tensor, rtol=0, atol=1e-3)
