"""Two ranks under ZeRO-3, with other mixtures of words and pictures on each, train what one rank trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dora_vl.adapters.folder import read_weights
from tests.backbones.tiny_image_text import write_tiny
from tests.training.test_two_ranks import launch, losses
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

PORTS = {"qwen2_5_vl": 29711, "llava": 29713, "smolvlm": 29715, "internvl": 29717}


def write_mixed_data(folder: Path) -> Path:
    """Blocks of two samples without and with pictures, of which some have two: a rank's batch is one block."""
    data = write_tiny_data(folder, samples=48, text_only_blocks=2)
    records = json.loads(data.read_text())
    for record in records[2::8]:
        record["image"] = [record["image"], record["image"]]
        record["conversations"][0]["value"] = "<image> and <image>\nSay the colour."
    data.write_text(json.dumps(records))
    return data


def check_ranks_agree(folder: Path, base: Path, *, steps: int, port: int) -> None:
    """A run of two ranks under ZeRO-3 against one of one rank with twice the batch, both by the script."""
    data = write_mixed_data(folder / "data")
    training = {"max_steps": steps, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    shapes = {"group_by_modality_length": False, "max_tokens": 512}
    run = write_run(folder / "run.yaml", base, data, data=shapes, training=training)
    one = (f"--training.output_dir={folder / 'one'}", "--training.deepspeed=zero0")
    two = (f"--training.output_dir={folder / 'two'}", "--training.deepspeed=zero3")
    results = [
        launch(run, *one, "--training.gradient_accumulation_steps=2", ranks=1, port=port),
        launch(run, *two, ranks=2, port=port + 1),
    ]
    for result in results:
        assert result.returncode == 0, result.stderr[-3000:]
    alone, together = losses(folder / "one"), losses(folder / "two")
    assert len(alone) == steps
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    for name, tensor in read_weights(folder / "one" / "adapter").items():
        torch.testing.assert_close(read_weights(folder / "two" / "adapter")[name], tensor, rtol=0, atol=1e-3)


def test_two_ranks_of_zero3_train_what_one_rank_trains(tmp_path: Path) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    check_ranks_agree(tmp_path, base, steps=8, port=PORTS["qwen2_5_vl"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", PORTS)
def test_twenty_steps_of_two_ranks(tmp_path: Path, family: str) -> None:
    base = write_tiny_llava(tmp_path / "base") if family == "llava" else write_tiny(family, tmp_path / "base")
    check_ranks_agree(tmp_path, base, steps=20, port=PORTS[family])
