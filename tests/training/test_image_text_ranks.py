"""Two ranks under ZeRO-3, with other mixtures of words and pictures on each, train what one rank trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dora_vl.adapters.folder import load_adapter, read_weights
from dora_vl.backbones.model import open_backbone
from dora_vl.core import adapted_layers
from dora_vl.core.other_layers import ExpertsProjection
from tests.backbones.tiny_families.language import LANGUAGE_MODELS
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.backbones.tiny_video import write_tiny_video
from tests.training.launched import launch
from tests.training.tiny_run import assert_same_weights, losses_of, write_run, write_tiny_data

EXPERTS = ("glm4v_moe", "gpt_oss")
"""Stored an expert at a time, and as one tensor with biases, input before output."""


def write_mixed_data(folder: Path, *, words_alone: bool = False) -> Path:
    """Blocks of two samples without and with pictures, of which some have two: a rank's batch is one block."""
    data = write_tiny_data(folder, samples=48, text_only_blocks=2)
    records = json.loads(data.read_text())
    if words_alone:
        for record in records:
            record.pop("image", None)
            record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "")
        data.write_text(json.dumps(records))
        return data
    for record in records[2::8]:
        record["image"] = [record["image"], record["image"]]
        record["conversations"][0]["value"] = "<image> and <image>\nSay the colour."
    data.write_text(json.dumps(records))
    return data


def check_ranks_agree(folder: Path, base: Path, records: Path, *, steps: int, **changes: dict[str, object]) -> None:
    """A run of two ranks under ZeRO-3 against one of one rank with twice the batch, both by the script."""
    training = {"max_steps": steps, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    shapes = {"group_by_modality_length": False, "max_tokens": 512, **changes.pop("data", {})}
    run = write_run(folder / "run.yaml", base, records, data=shapes, training=training, **changes)
    single = (f"--training.output_dir={folder / 'one'}", "--training.deepspeed=zero0")
    two = (f"--training.output_dir={folder / 'two'}", "--training.deepspeed=zero3")
    launch(run, *single, "--training.gradient_accumulation_steps=2", ranks=1)
    launch(run, *two, ranks=2)
    assert len(losses_of(folder / "one")) == steps
    torch.testing.assert_close(losses_of(folder / "two"), losses_of(folder / "one"), rtol=0, atol=1e-4)
    assert_same_weights(folder / "two", folder / "one", atol=1e-3)


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_two_ranks_of_zero3_train_what_one_rank_trains(tmp_path: Path, family: str) -> None:
    base = write_tiny(family, tmp_path / "base")
    check_ranks_agree(tmp_path, base, write_mixed_data(tmp_path / "data"), steps=8)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_of_two_ranks_that_get_other_rows(tmp_path: Path, family: str) -> None:
    """Each rank sends its own rows to each expert; the adapter of all experts is whole, and loads into the base."""
    words_alone = family in LANGUAGE_MODELS
    base = (write_tiny_language if words_alone else write_tiny)(family, tmp_path / "base")
    changes: dict[str, dict[str, object]] = {"adapter": {"targets": ["language", "experts"], "rank": 3, "alpha": 7.0}}
    if words_alone:
        changes |= {"optim": {"projector_learning_rate": None}, "model": {"attn_implementation": "eager"}}
    data = write_mixed_data(tmp_path / "data", words_alone=words_alone)
    check_ranks_agree(tmp_path, base, data, steps=8, **changes)
    loaded = open_backbone(str(base), attn_implementation="eager")
    names = load_adapter(loaded.model, tmp_path / "two" / "adapter")
    experts = [name for name, layer in adapted_layers(loaded.model) if isinstance(layer, ExpertsProjection)]
    assert set(experts) < set(names)
    weights = read_weights(tmp_path / "two" / "adapter")
    for name in experts:
        moved = weights[f"base_model.model.{name}.lora_B.weight"]
        assert len(moved) == 4
        assert all(bool(expert.any()) for expert in moved)  # every expert was trained


MIXED = (0, 4, 2, 6, 1, 5, 3, 7, 2, 6, 1, 5, 8, 3, 9, 10)
"""A micro-batch of two each: words | videos, pictures | both, videos | pictures, words and both | picture and video."""


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video"])
def test_ranks_that_have_videos_words_or_pictures_in_turn(tmp_path: Path, family: str) -> None:
    pytest.importorskip("av")
    from tests.training.video_run import write_video_data

    base = write_tiny_video(family, tmp_path / "base")
    data = write_video_data(tmp_path / "data")
    records = json.loads(data.read_text())
    data.write_text(json.dumps([{**records[row], "id": str(number)} for number, row in enumerate(MIXED)]))
    check_ranks_agree(tmp_path, base, data, steps=4, data={"video_frames": 4, "max_bad_share": 0.0})
