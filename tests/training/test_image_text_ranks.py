"""Two ranks under ZeRO-3, one with pictures and one without, train what one rank trains: any vision-language model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dora_vl.adapters.folder import read_weights
from tests.backbones.tiny_image_text import write_tiny
from tests.training.test_two_ranks import launch, losses
from tests.training.tiny_run import write_run, write_tiny_data

STEPS = 8


def test_two_ranks_of_zero3_train_what_one_rank_trains(tmp_path: Path) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    data = write_tiny_data(tmp_path / "data", samples=48, text_only_blocks=2)
    records = json.loads(data.read_text())
    for record in records[2::8]:  # two pictures in some
        record["image"] = [record["image"], "red-0.png" if (data.parent / "red-0.png").is_file() else record["image"]]
        record["conversations"][0]["value"] = "<image> and <image>\nSay the colour."
    data.write_text(json.dumps(records))
    training = {"max_steps": STEPS, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    run = write_run(tmp_path / "run.yaml", base, data, data={"group_by_modality_length": False}, training=training)
    results = {
        "one": launch(
            run,
            f"--training.output_dir={tmp_path / 'one'}",
            "--training.deepspeed=zero0",
            "--training.gradient_accumulation_steps=2",
            ranks=1,
            port=29711,
        ),
        "two": launch(
            run, f"--training.output_dir={tmp_path / 'two'}", "--training.deepspeed=zero3", ranks=2, port=29712
        ),
    }
    for result in results.values():
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == STEPS
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    for name, tensor in read_weights(tmp_path / "one" / "adapter").items():
        torch.testing.assert_close(read_weights(tmp_path / "two" / "adapter")[name], tensor, rtol=0, atol=1e-3)
