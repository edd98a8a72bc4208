"""Conversations with thoughts, trained and resumed: a sample for each round that the template rewrites."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_vl.evaluation.open_model import ModelRequest, find_source, prompts_of
from tests.backbones.test_chat_templates import CHAT
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.data.readers.chat_forms import FORMS, ITEMS
from tests.training.tiny_run import (
    assert_same_weights,
    decoder_run,
    json_of,
    losses_of,
    refused,
    skipped_by,
    trained,
    write_run,
)


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


@pytest.mark.parametrize(
    ("family", "thoughts"), [("qwen3", True), pytest.param("qwen3", False, marks=pytest.mark.slow), ("qwen3_vl", True)]
)
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


def test_tools_thoughts_and_marks_train_in_any_rows_and_their_preferences_too(tmp_path: Path) -> None:
    """The rows are those of ms-swift's, servers' and TRL's own forms; a base that writes no tools stops by name."""
    base = write_tiny_language("qwen3", tmp_path / "base", template=CHAT["qwen3"])
    settings: dict[str, Any] = {
        "training": {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 3},
        "data": {"max_tokens": 2048, "group_by_modality_length": False},
        "optim": {"projector_learning_rate": None},
    }
    for form in ("swift_loss", "reasoning"):
        (tmp_path / f"{form}.json").write_text(json.dumps([FORMS[form](item)[0] for item in ITEMS]))
        run_file = write_run(tmp_path / f"{form}.yaml", base, tmp_path / f"{form}.json", **settings)
        folder = trained(run_file, name=form)
        assert not skipped_by(folder)
        apart = trained(run_file, "--data.packing=plain", name=f"{form}_plain")
        torch.testing.assert_close(losses_of(apart), losses_of(folder), rtol=0, atol=1e-5)
        assert json_of(folder / "adapter" / "recipe.json")["thinking"] is (form == "reasoning")
    pairs = []
    for item in ITEMS:
        row, _ = FORMS["trl_tools"](item)
        *prompt, chosen = row["messages"]
        rejected = {**chosen, "content": "I cannot tell."}
        pairs.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "tools": row["tools"]})
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    compared = write_run(tmp_path / "c.yaml", base, tmp_path / "pairs.json", objective={"loss": "dpo"}, **settings)
    assert losses_of(trained(compared, name="compared")).tolist()[0] == pytest.approx(0.6931, abs=1e-3)
    without = write_tiny_language("qwen3", tmp_path / "without")
    refused_file = write_run(tmp_path / "refused.yaml", without, tmp_path / "reasoning.json", **settings)
    error = refused(decoder_run(refused_file))
    assert "row 1" in str(error)
    assert str(without) in str(error)
