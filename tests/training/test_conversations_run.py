"""Conversations with thoughts, trained and resumed: a sample for each round that the template rewrites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dora_vl.evaluation.open_model import ModelRequest, find_source, prompts_of
from tests.backbones.test_chat_templates import CHAT
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.training.tiny_run import assert_same_weights, json_of, losses_of, skipped_by, trained, write_run


def write_talks(folder: Path, *, pictures: bool, thoughts: bool) -> Path:
    """Eight conversations of one to three rounds, those of pictures with one in the first or a later round."""
    folder.mkdir()
    records = []
    for index in range(8):
        turns = []
        for number in range(1 + index % 3):
            shown = "<image>\n" if pictures and number == index % 2 else ""
            thought = f"<think>\nI see {index}.\n</think>\n\n" if thoughts else ""
            turns += [("human", f"{shown}Is it red?"), ("gpt", f"{thought}It is {number}.")]
        record = {"id": str(index), "conversations": [{"from": who, "value": text} for who, text in turns]}
        if any("<image>" in text for _, text in turns):
            record["image"] = f"{index}.png"
            Image.new("RGB", (30 + index, 22), (200, 30 * index, 40)).save(folder / f"{index}.png")
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


@pytest.mark.parametrize(("family", "thoughts"), [("qwen3", True), ("qwen3", False), ("qwen3_vl", True)])
def test_they_train_and_resume_with_the_same_loss_in_any_rows(tmp_path: Path, family: str, thoughts: bool) -> None:
    sees = family == "qwen3_vl"
    template = CHAT["qwen3_vl_thinking" if sees else "qwen3"]
    base = (write_tiny if sees else write_tiny_language)(family, tmp_path / "base", template=template)
    records = write_talks(tmp_path / "data", pictures=sees, thoughts=thoughts)
    run_file = write_run(
        tmp_path / "run.yaml",
        base,
        records,
        training={"use_cpu": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1},
        optim={"projector_learning_rate": 1e-3 if sees else None},
        data={"max_tokens": 1024, "group_by_modality_length": False},
    )
    folder = trained(run_file)
    losses = losses_of(folder)
    assert len(losses) == 2
    assert not skipped_by(folder)
    apart = trained(run_file, "--data.packing=plain", name="plain")
    torch.testing.assert_close(losses_of(apart), losses, rtol=0, atol=1e-5)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "adapter")
    resumed = trained(run_file, f"--resume={again / 'checkpoint-1'}", name="again")
    assert losses_of(resumed).tolist() == losses.tolist()
    assert_same_weights(resumed, folder)
    recipe = json_of(folder / "adapter" / "recipe.json")
    assert recipe["thinking"] is (None if sees else thoughts)
    prompts = prompts_of(find_source(ModelRequest(adapter=folder / "adapter"))).encoder.prompts
    assert prompts.thinking is recipe["thinking"]
