"""QDoRA through the scripts: trained over a quantised base, resumed, asked, merged to plain weights, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from dora_vl.adapters.folder import read_weights
from dora_vl.adapters.quantised_base import SCHEMES
from dora_vl.backbones.model import open_backbone
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.ask_command import open_picture
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictor import Shown
from dora_vl.run.reading import read_run_file
from tests.backbones.tiny_image_text import write_tiny
from tests.training.launched import launch
from tests.training.tiny_run import (
    assert_same_weights,
    decoder_run,
    json_of,
    logged_losses,
    merged,
    refused,
    trained,
    write_run,
    write_tiny_data,
    write_tiny_llava,
)

CPU: dict[str, object] = {"use_cpu": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
KINDS = ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(SCHEMES) if kind != "nf4")]
TURNS = [Turn("user", "<image>\nSay the colour.")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny bases of two kinds, and data in which every second block of four samples has no picture."""
    folder = tmp_path_factory.mktemp("quantised")
    write_tiny("qwen2_5_vl", folder / "qwen2_5_vl", width=64)
    write_tiny_llava(folder / "llava", width=64)
    write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    Image.new("RGB", (21, 15), "red").save(folder / "red.png")
    return folder


def settings(root: Path, base: str, name: str, **changes: Any) -> Path:
    sections = {**changes, "training": {**CPU, **changes.get("training", {})}}
    return write_run(root / f"{name}.yaml", root / base, root / "data" / "train.json", **sections)


def adapter_of(root: Path, kind: str) -> Path:
    """The adapter of a run, made once."""
    pytest.importorskip(SCHEMES[kind].package)
    adapter = root / f"qwen2_5_vl-{kind}" / "adapter"
    if not adapter.is_dir():
        trained(settings(root, "qwen2_5_vl", f"qwen2_5_vl-{kind}", model={"quantisation": kind}))
    return adapter


def logits_of(assistant: Assistant, picture: Path) -> torch.Tensor:
    sample = assistant.prompts.sample(TURNS, Shown(pictures=(open_picture(picture),)))
    with torch.no_grad():
        return assistant.backbone.model(input_ids=sample.input_ids[None], **sample.inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_the_decoder_and_the_whole_projector(root: Path, kind: str) -> None:
    adapter = adapter_of(root, kind)
    weights = read_weights(adapter)
    assert sum("lora_B" in name for name in weights) == 14
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    assert any("merger" in name for name in weights)
    recipe = json_of(adapter / "recipe.json")
    assert (recipe["quantisation"], recipe["adapter"]["method"]) == (kind, "dora")
    losses = logged_losses(adapter.parent)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_plain_model_is_the_trained_one(root: Path, tmp_path: Path, kind: str) -> None:
    adapter = adapter_of(root, kind)
    opened = open_model(ModelRequest(adapter=adapter, with_base=True))
    assert isinstance(opened.adapted, Assistant)
    ours = logits_of(opened.adapted, root / "red.png")
    plain = AutoModelForImageTextToText.from_pretrained(merged(adapter, tmp_path / "merged")).eval()
    assert "quantization_config" not in json_of(tmp_path / "merged" / "config.json")
    assistant = Assistant(type(opened.adapted.backbone)(plain), opened.adapted.prompts)
    # LLM.int8 rounds inputs as well, which no plain model does.
    tolerance = 0.05 * float(ours.abs().max()) if kind == "int8" else 1e-4
    torch.testing.assert_close(logits_of(assistant, root / "red.png"), ours, rtol=0, atol=tolerance)
    assert isinstance(opened.base, Assistant)
    alone = open_backbone(str(root / "qwen2_5_vl"), quantisation=kind)  # pyright: ignore[reportArgumentType]
    untouched = logits_of(Assistant(alone.eval(), opened.adapted.prompts), root / "red.png")
    torch.testing.assert_close(logits_of(opened.base, root / "red.png"), untouched, rtol=0, atol=1e-6)
    assert float((untouched - ours).abs().max()) > 1e-2
    stored = AutoModelForImageTextToText.from_pretrained(merged(adapter, tmp_path / "b", "--base-values", "stored"))
    other = Assistant(type(opened.adapted.backbone)(stored.eval()), opened.adapted.prompts)
    assert float((logits_of(other, root / "red.png") - logits_of(assistant, root / "red.png")).abs().max()) > 1e-3


def test_a_resumed_run_ends_where_a_whole_one_does(root: Path) -> None:
    whole, path = adapter_of(root, "nf4").parent, settings(root, "qwen2_5_vl", "half", model={"quantisation": "nf4"})
    folder = trained(path)
    trained(path, f"--resume={folder / 'checkpoint-2'}")
    assert_same_weights(folder, whole, atol=1e-6)


@pytest.mark.slow
def test_zero_2_trains_what_one_process_trains(root: Path) -> None:
    path = settings(root, "qwen2_5_vl", "zero2", model={"quantisation": "nf4"}, training={"deepspeed": "zero2"})
    launch(path, ranks=1)
    assert_same_weights(root / "zero2", adapter_of(root, "nf4").parent, atol=1e-5)


@pytest.mark.parametrize("base", ["qwen2_5_vl", "llava"])
def test_zero_3_is_refused_before_weights_are_read(root: Path, base: str) -> None:
    path = settings(root, base, f"zero3-{base}", model={"quantisation": "nf4"}, training={"deepspeed": "zero3"})
    refused(decoder_run(path))
    with pytest.raises(UserError):
        read_run_file(path, "--model.quantisation=fp3")
