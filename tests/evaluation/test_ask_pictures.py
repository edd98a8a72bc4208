"""Asking an adapter from the command line: every picture and question, beside the base, with errors of one line."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.evaluation.ask_command import open_picture
from dora_vl.evaluation.assistant import Assistant, model_inputs
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictor import Shown
from dora_vl.run.reading import read_run_file
from dora_vl.serving.model import open_served
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tasks import image_qa
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
    assert isinstance(both.base, Assistant)
    assert isinstance(both.adapted, Assistant)
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
    turns, seen = [Turn("user", "<image>\nSay the colour.")], Shown(pictures=(open_picture(Path(pictures[0])),))
    batch = model.assistant.prompts.collate([model.entry("one").prompts.sample(turns, seen)], "left")
    inputs = model_inputs(batch, "cpu")

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


def test_pictures_together_and_a_conversation(
    adapter: Path, pictures: list[str], monkeypatch: Any, capsys: Any
) -> None:
    seen: list[tuple[list[Turn], int]] = []

    def answer(self: object, question: Example, shown: Shown, **_: object) -> str:
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
    with pytest.raises(SystemExit) as stopped:
        ask(*arguments, "--question", "q")
    assert stopped.value.code == 2


def test_an_incomplete_recipe_and_a_base_that_moved_or_changed(
    adapter: Path, pictures: list[str], tmp_path: Path
) -> None:
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
