"""Asking an adapter from the command line, beside its base; what its folder says of the base, pictures and prompt."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dora_vl.adapters.adapter import content_hash
from dora_vl.adapters.foreign_formats import read_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.backbones.encoder import open_encoder
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.ask_command import open_picture
from dora_vl.evaluation.assistant import inputs_on_device
from dora_vl.evaluation.open_model import ModelRequest, find_source, open_model, prompts_of
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.run.settings_parser import read_run_file
from dora_vl.serving.model import open_served
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tasks import image_qa
from tests.backbones.tiny_language import write_tiny_language
from tests.serving.tiny_served import write_adapter
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    base, records = write_tiny_llava(folder / "llava"), write_tiny_data(folder / "data")
    path = write_run(folder / "run.yaml", base, records, training={"use_cpu": True, "max_steps": 30})
    run(DecoderPipeline(read_run_file(path)))
    return folder / "run" / "adapter"


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    for path, color in zip(paths, ("red", "blue"), strict=True):
        Image.new("RGB", (9, 12), color).save(path)
    return [str(path) for path in paths]


def ask(*arguments: str) -> None:
    image_qa.main([*arguments, "--max-new-tokens", "4"])


def test_every_question_is_put_to_every_picture(adapter: Path, pictures: list[str], capsys: Any) -> None:
    images = [part for path in pictures for part in ("--image", path)]
    ask("--adapter", str(adapter), *images, "--question", "Say the colour.", "--question", "What colour is it?")
    lines = capsys.readouterr().out.splitlines()
    headings, answers = lines[::2], lines[1::2]
    assert headings == [
        f"{path}  {question}" for question in ("Say the colour.", "What colour is it?") for path in pictures
    ]
    assert all(answer.startswith("  ") and answer.strip() for answer in answers)


def test_the_base_beside_it_is_the_base(adapter: Path, pictures: list[str], capsys: Any) -> None:
    from dora_vl.backbones.model import open_backbone

    both = open_model(ModelRequest(adapter=adapter, with_base=True))
    recipe = json.loads((adapter / "recipe.json").read_text())
    untouched = open_backbone(recipe["base"]).model.state_dict()
    shown = both.base.backbone.model.state_dict()
    assert shown.keys() == untouched.keys()
    for name, tensor in untouched.items():
        torch.testing.assert_close(shown[name], tensor, rtol=0, atol=0)
    weight = "model.language_model.layers.0.mlp.up_proj.weight"
    shared = both.adapted.backbone.model.state_dict(keep_vars=True)[weight]
    assert shared.data_ptr() == shown[weight].data_ptr()
    ask("--adapter", str(adapter), "--image", pictures[0], "--question", "Say the colour.", "--compare-base")
    _, with_adapter, without = capsys.readouterr().out.splitlines()
    assert with_adapter.startswith("  with adapter:")
    assert without.startswith("  without adapter:")
    assert with_adapter.split(":")[1].strip() != without.split(":")[1].strip()


@torch.no_grad()
def test_strength_is_that_of_the_server(adapter: Path, pictures: list[str]) -> None:
    model = open_served(None, {"one": adapter})
    turns, seen = [Turn("user", "<image>\nSay the colour.")], PromptMedia(pictures=(open_picture(Path(pictures[0])),))
    batch = model.assistant.prompts.collate([model.entry("one").prompts.sample(turns, seen)], "left")
    inputs = inputs_on_device(batch, "cpu")

    labels, seen_logits = inputs["input_ids"].clamp_min(0), []
    for strength in (0.0, 0.4, 1.0, 1.7):
        with model.rows([model.entry("one")], [1], [strength]):
            expected = model.backbone(**inputs, labels=labels, keep_logits=True).logits
        opened: Any = open_model(ModelRequest(adapter=adapter, strength=strength, with_base=True))
        actual, base = (
            assistant.backbone(**inputs, labels=labels, keep_logits=True).logits
            for assistant in (opened.adapted, opened.base)
        )
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
        seen_logits.append(actual)
        assert torch.equal(base, seen_logits[0])  # the base is the base, whatever is beside it
    assert all(not torch.allclose(first, other, atol=1e-2) for first, other in pairwise(seen_logits))


def test_pictures_together_and_a_talk(adapter: Path, pictures: list[str], monkeypatch: Any, capsys: Any) -> None:
    seen: list[tuple[list[Turn], int]] = []

    def answer(self: object, question: Example, shown: PromptMedia, **_: object) -> str:
        seen.append(([*question.turns], len(shown.pictures)))
        return "red"

    monkeypatch.setattr("dora_vl.evaluation.assistant.Assistant.answer", answer)
    images = [part for path in pictures for part in ("--image", path)]
    options = ["--together", "--conversation", "--question", "first?", "--question", "second?"]
    ask("--adapter", str(adapter), *images, *options)
    first, second = seen
    assert first == ([Turn("user", "<image>\n<image>\nfirst?")], 2)
    assert second == ([*first[0], Turn("assistant", "red"), Turn("user", "second?")], 2)


def test_typed_questions(adapter: Path, pictures: list[str], monkeypatch: Any, capsys: Any) -> None:
    typed = iter(["Say the colour.", ":image missing.png", f":image {pictures[1]}", "What colour is it?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    ask("--adapter", str(adapter), "--image", pictures[0])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3  # how to leave, and two answers
    assert printed.err.startswith("error: picture missing.png is missing")
    assert list(typed) == []


def refused(*arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        ask(*arguments, "--question", "q")


def test_an_incomplete_recipe_and_a_base_moved_or_changed(adapter: Path, pictures: list[str], tmp_path: Path) -> None:
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    recipe = json.loads((copied / "recipe.json").read_text())
    base = Path(recipe["base"])
    image = ["--adapter", str(copied), "--image", pictures[0]]

    (copied / "recipe.json").write_text(json.dumps({**recipe, "base": "runs/long/gone"}))
    refused(*image)
    ask(*image, "--question", "Say the colour.", "--base", str(base))

    other = write_tiny_llava(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "projector_bias": True}))
    refused(*image, "--base", str(other))
    ask(*image, "--question", "Say the colour.", "--base", str(other), "--any-base")

    (copied / "recipe.json").write_text(json.dumps({"base": str(base)}))
    refused(*image)


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
    adapter = write_adapter(base, tmp_path / "adapter", seed=1, targets=("*.q_proj", "*.up_proj"), rank=3, alpha=7.0)
    recipe = {"task": "commonsense", "base": str(base), "revision": None, "template": "alpaca", "image_aspect": None}
    recipe |= {"base_sha256": content_hash(base), "dtype": "float32", "max_tokens": 512}
    (adapter / "recipe.json").write_text(json.dumps(recipe))
    backbone = open_model(ModelRequest(adapter=adapter)).adapted.backbone
    options = ["--adapter", str(adapter), "--question", "Which answer?", "--max-new-tokens", "4"]
    image_qa.main([*options, "--compare-base"])
    with_adapter, without = (line.split(":", 1)[1].strip() for line in capsys.readouterr().out.splitlines()[-2:])
    encoder = open_encoder(str(base), template="alpaca", max_tokens=512)
    ids = encoder.encode_prompt([Turn("user", "Which answer?")]).input_ids[None]
    new = backbone.generate(ids, torch.ones_like(ids), max_new_tokens=4)[0]
    assert " ".join(encoder.decode(new).split()) == " ".join(with_adapter.split())
    assert with_adapter != without
    with pytest.raises(SystemExit, match="2"):  # it reads one question at a time
        image_qa.main([*options, "--question", "Another?", "--conversation"])
