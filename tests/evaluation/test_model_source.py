"""What an adapter folder says it is: a fact in its recipe, its base's config where an older one says nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dora_vl import DoRAConfig, apply_dora, save_adapter
from dora_vl.adapters.adapter import content_hash
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.adapters.read import read_adapter
from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.model import open_backbone
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.open_model import ModelRequest, find_source, prompts_of
from tasks import image_qa
from tests.backbones.tiny_language import write_tiny_language
from tests.serving.tiny_served import write_adapter
from tests.training.tiny_run import write_tiny_llava

WORDING = {"template": "tokenizer", "image_aspect": "pad"}


def folders(where: Path, model_type: str, **recipe: object) -> Path:
    """A base of a config alone, and an adapter folder that names it."""
    (where / "base").mkdir()
    (where / "base" / "config.json").write_text(json.dumps({"model_type": model_type}))
    (where / "adapter").mkdir()
    save_file({"a": torch.zeros(1)}, where / "adapter" / "adapter_model.safetensors")
    common = {"base": str(where / "base"), "revision": None, "dtype": "float32", "max_tokens": 64}
    stated = {**common, "base_sha256": content_hash(where / "base"), **recipe}
    (where / "adapter" / "recipe.json").write_text(json.dumps(stated))
    return where / "adapter"


@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [
        ("llama", {}),
        ("qwen2_5_vl", {**WORDING, "attn_implementation": "hub/kernel"}),
        ("qwen2_5_vl", {**WORDING, "attn_implementation": {"": "sdpa", "text_config": [1]}}),
        ("bert", {}),
    ],
)
def test_what_cannot_be_asked_is_refused(model_type: str, recipe: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        find_source(ModelRequest(adapter=folders(tmp_path, model_type, **recipe)))


def test_attention_is_the_recipe_s_and_another_machine_s_is_transformers_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = folders(tmp_path, "qwen2_5_vl", **WORDING, attn_implementation={"": "flash_attention_2"})
    for available, expected in ((True, {"": "flash_attention_2"}), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert find_source(ModelRequest(adapter=adapter)).attention == expected


def test_a_merged_llava_prepares_pictures_as_it_was_trained(tmp_path: Path) -> None:
    """Its base states no way, which means padded; merged once more, the later run's way holds."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 40, 3), np.uint8))
    folder = write_tiny_llava(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())

    def pixels(request: ModelRequest) -> torch.Tensor:
        return prompts_of(find_source(request)).encoder.processor.pixels(picture)

    seen = [pixels(ModelRequest(model=str(folder), template="vicuna_v1"))]
    for aspect in ("squash", "pad"):
        adapter = write_adapter(folder, tmp_path / f"{aspect}-adapter", seed=1, targets=("*.q_proj",), rank=2)
        recipe = {"base": str(folder), "revision": None, "base_sha256": content_hash(folder), "template": "vicuna_v1"}
        stated = json.dumps({**recipe, "image_aspect": aspect, "dtype": "float32", "max_tokens": 64})
        (adapter / "recipe.json").write_text(stated)
        folder = tmp_path / aspect
        merge_to_folder(read_adapter(adapter), Path(recipe["base"]), folder)
        seen.append(pixels(ModelRequest(adapter=adapter)))
        assert torch.equal(pixels(ModelRequest(model=str(folder), template="vicuna_v1")), seen[-1])
    assert torch.equal(seen[0], seen[-1])
    assert not torch.equal(seen[0], seen[1])
    assert {**json.loads((folder / "config.json").read_text()), "image_aspect": 0} == {**config, "image_aspect": 0}
    (folder / "config.json").write_text(json.dumps({**config, "image_aspect": "anyres"}))
    with pytest.raises(UserError):
        pixels(ModelRequest(model=str(folder), template="vicuna_v1"))


def test_a_language_run_s_adapter_is_asked_with_its_prompt(tmp_path: Path, capsys: Any) -> None:
    base = write_tiny_language(tmp_path / "base")
    backbone = open_backbone(str(base))
    apply_dora(backbone.model, DoRAConfig(targets=("*.q_proj", "*.up_proj"), rank=3, alpha=7.0))
    random = torch.Generator().manual_seed(1)
    for name, parameter in backbone.model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.normal_(generator=random, std=0.5)
    recipe = {"task": "commonsense", "base": str(base), "revision": None, "template": "alpaca", "image_aspect": None}
    recipe |= {"base_sha256": content_hash(base), "dtype": "float32", "max_tokens": 512}
    save_adapter(backbone.model, tmp_path / "adapter", base_model=str(base), recipe=recipe)
    options = ["--adapter", str(tmp_path / "adapter"), "--question", "Which answer?", "--max-new-tokens", "4"]
    image_qa.main([*options, "--compare-base"])
    with_adapter, without = (line.split(":", 1)[1].strip() for line in capsys.readouterr().out.splitlines()[-2:])
    encoder = open_encoder(str(base), template="alpaca", max_tokens=512)
    ids = encoder.encode_prompt([Turn("user", "Which answer?")]).input_ids[None]
    new = backbone.eval().generate(ids, torch.ones_like(ids), max_new_tokens=4)[0]
    assert " ".join(encoder.decode(new).split()) == " ".join(with_adapter.split())
    assert with_adapter != without
    with pytest.raises(SystemExit) as stopped:  # it reads one question at a time
        image_qa.main([*options, "--question", "Another?", "--conversation"])
    assert stopped.value.code == 2
