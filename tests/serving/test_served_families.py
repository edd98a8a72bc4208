"""Mixed batches of other families: a projector for each picture, adapted towers, language models, PEFT's."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.assistant import inputs_on_device, prompt_batch, prompt_sample
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving.decoding import Sampling
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel, UnknownModel, open_served
from dora_vl.serving.options import ServerSettings
from tests.adapters.peft_folders import moved_peft
from tests.backbones.tiny_image_text import coloured_video, write_tiny, write_tiny_video
from tests.backbones.tiny_language import write_tiny_language
from tests.serving.test_joined_decoding import SELDOM
from tests.serving.tiny_served import (
    RED,
    WIDE,
    alone,
    answer_alone,
    answers,
    batches_of,
    served,
    spread,
    with_recipe,
    write_adapter,
    write_adapters,
)
from tests.training.tiny_run import write_tiny_llava

PICTURES = [
    ([Turn("user", "What colour is it?")], PromptMedia()),
    ([Turn("user", "<image>\nSay the colour.")], PromptMedia(pictures=(RED,))),
    ([Turn("user", "<image>\n<image>\nSay it.")], PromptMedia(pictures=(WIDE, RED))),
]
WORDS = [
    ([Turn("user", text)], PromptMedia()) for text in ("What colour is it?", "Say the colour.", "the correct answer")
]


def check(
    base: Path, adapters: Mapping[str, Path], conversations: Any, monkeypatch: Any, *, template: str | None = None
) -> list[list[str | None]]:
    """Every question to every adapter and the base, all at once: each answer as alone; returns the batches."""
    names = ("base", *adapters)
    questions = [(name, turns, seen) for turns, seen in conversations for name in names]
    with Engine(served(base, adapters, template=template), ServerSettings(batch=64, window_ms=500)) as engine:
        batches = batches_of(engine, monkeypatch)
        predictions = answers(engine, questions)
    assistants = {name: alone(base, adapters.get(name), template=template) for name in names}
    expected = [answer_alone(assistants[name], turns, seen) for name, turns, seen in questions]
    assert predictions == expected
    answers_of = {name: [text for q, text in zip(questions, expected, strict=True) if q[0] == name] for name in names}
    assert len({tuple(text) for text in answers_of.values()}) == len(names)
    return [[share and share[0] for share in batch] for batch in batches]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread(write_tiny_llava(tmp_path_factory.mktemp("llava") / "base"))


def test_each_picture_of_a_llava_has_its_own_rows_projector(llava: Path, tmp_path: Path, monkeypatch: Any) -> None:
    projector = {"projector": ("model.multi_modal_projector.*",)}
    targets = ("*language_model*.q_proj",)
    settings = {
        "whole": {"targets": targets, "also_train": projector, "rank": 2, "alpha": 5.0},
        "adapted": {"targets": (*targets, "*multi_modal_projector.linear_2"), "rank": 3, "alpha": 7.0},
        "language": {"targets": targets, "rank": 4, "alpha": 3.0},
        "bias": {"targets": targets, "also_train": {"p": ("*multi_modal_projector.linear_1.bias",)}, "rank": 2},
    }
    adapters = write_adapters(llava, tmp_path, settings)
    (batch,) = check(llava, adapters, PICTURES, monkeypatch)
    assert len(set(batch)) == 5


@pytest.mark.parametrize("family", ["qwen2_5_vl", *SELDOM])
def test_adapted_towers_are_served_with_their_own_pictures(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    base = spread(write_tiny(family, tmp_path / "base"))
    model = AutoModelForImageTextToText.from_pretrained(base)
    language = next(name for name, _ in model.named_modules() if name.endswith("q_proj") and "vision" not in name)
    linears = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    seeing = [name for name in linears if "visual" in name or "vision" in name or "connector" in name]
    vision = [name for name in seeing if "patch" not in name]
    prefix = language.partition("layers")[0]
    settings = {
        "vision": {"targets": (f"{prefix}*.q_proj", vision[-1]), "rank": 2, "alpha": 5.0},
        "tower": {"targets": (f"{prefix}*.q_proj",), "also_train": {"vision": (f"{vision[0]}.weight",)}, "rank": 3},
        "language": {"targets": (f"{prefix}*.q_proj",), "rank": 4, "alpha": 3.0},
    }
    adapters = write_adapters(base, tmp_path / "adapters", settings)
    batches = check(base, adapters, PICTURES, monkeypatch)
    assert len(batches) == 3  # the base's vision and two others
    assert set(batches[0]) == {None, "vision", "tower", "language"}  # words of all join the first


def test_pictures_and_videos_that_look_alike_are_batches_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    base = spread(write_tiny_video("glm4v", tmp_path / "base"))
    settings = {"one": {"targets": ("*language_model*.q_proj",), "rank": 2, "alpha": 5.0}}
    adapters = write_adapters(base, tmp_path / "adapters", settings)
    video = ([Turn("user", "<video>\nWhat moves?")], PromptMedia(videos=(coloured_video(4),)))
    batches = check(base, adapters, [*PICTURES[:2], video], monkeypatch)
    assert [len(batch) for batch in batches] == [4, 2]  # words and pictures, then videos


def test_an_adapter_is_asked_as_its_recipe_says(llava: Path, tmp_path: Path, monkeypatch: Any) -> None:
    targets = ("*language_model*.q_proj", "*language_model*.down_proj")
    templates, settings = {"one": "vicuna_v1", "two": "mistral_instruct"}, {"targets": targets, "rank": 2, "alpha": 5.0}
    adapters = write_adapters(llava, tmp_path, dict.fromkeys(templates, settings))
    for name, template in templates.items():
        with_recipe(adapters[name], llava, image_aspect="pad", template=template)
    model = open_served(None, adapters)
    assert model.names == ("base", "one", "two")
    with Engine(model, ServerSettings(window_ms=500)) as engine:
        batches = batches_of(engine, monkeypatch)
        turns, seen = PICTURES[1]
        predictions = answers(engine, [(name, turns, seen) for name in model.names])
        prepared = [engine.prepare(name, turns, Sampling(max_new_tokens=1), seen) for name in model.names]
    assert len(batches) == 1
    lengths = [len(request.sample.input_ids) for request in prepared]
    assert lengths[0] == lengths[1] != lengths[2]
    expected = [answer_alone(alone(llava, adapters[name]), turns, seen) for name in ("one", "two")]
    assert predictions[1:] == expected
    with_recipe(adapters["two"], llava, image_aspect="pad", template=templates["two"], base_sha256="0" * 64)
    with pytest.raises(UserError):
        open_served(None, adapters)
    assert open_served(None, adapters, any_base=True).names == model.names


def test_a_language_model_with_adapters_of_peft(tmp_path: Path, monkeypatch: Any) -> None:
    base = write_tiny_language(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    moved_peft(model, seed=3, r=3, lora_alpha=8).save_pretrained(tmp_path / "peft")
    plain = {"use_dora": False, "target_modules": ["v_proj", "up_proj"], "r": 5}
    moved_peft(AutoModelForCausalLM.from_pretrained(base), seed=4, **plain).save_pretrained(tmp_path / "lora")
    own = write_adapter(base, tmp_path / "own", seed=5, targets=("*.o_proj", "lm_head"), rank=2, alpha=5.0)
    adapters = {"peft": tmp_path / "peft", "lora": tmp_path / "lora", "own": own}
    (batch,) = check(base, adapters, WORDS, monkeypatch, template="vicuna_v1")
    assert len(set(batch)) == 4


def test_adapters_of_another_kind_or_base_are_refused(tmp_path: Path, base: Path, folders: dict[str, Path]) -> None:
    language = write_tiny_language(tmp_path / "language")
    other = write_adapter(language, tmp_path / "other", seed=1, targets=("*.q_proj",), rank=2)
    foreign = shutil.copytree(folders["one"], tmp_path / "foreign")
    with_recipe(foreign, base, base_sha256="0" * 64)
    wrong = {"other": other, "base": folders["one"], "gone": tmp_path / "gone", "foreign": foreign}
    for name, folder in wrong.items():
        with pytest.raises(UserError):
            served(base, {"one": folders["one"], name: folder})
    model = served(base, {"one": folders["one"], "two": folders["one"]})
    with pytest.raises(UnknownModel):
        model.entry("gone")
    assert model.names == ("base", "one", "two")


def shares_answered(base: Path, adapters: Mapping[str, Path], shares: Any, monkeypatch: Any) -> list[list[Any]]:
    """A question with a picture to shares of adapters, all at once: each answer as alone; returns the batches."""
    with Engine(served(base, adapters), ServerSettings(batch=64, window_ms=500)) as engine:
        questions = [(name, *PICTURES[1]) for name, _ in shares]
        strengths = [strength for _, strength in shares]
        singly = zip(questions, strengths, strict=True)
        expected = [answers(engine, [question], [strength])[0] for question, strength in singly]
        batches = batches_of(engine, monkeypatch)
        assert answers(engine, questions, strengths) == expected
    assert len(set(expected)) > 2
    return batches


def test_a_projector_at_strengths_of_the_rows_own(llava: Path, tmp_path: Path, monkeypatch: Any) -> None:
    settings = {"targets": ("*language_model*.q_proj",), "also_train": {"p": ("model.multi_modal_projector.*",)}}
    adapters = write_adapters(llava, tmp_path, {"whole": {**settings, "rank": 2, "alpha": 5.0}})
    shares = [("base", 1.0), ("whole", 0.4), ("whole", 1.0), ("whole", 1.5), ("whole", 0.0)]
    (batch,) = shares_answered(llava, adapters, shares, monkeypatch)
    assert batch == [None, ("whole", 0.4), ("whole", 1.0), ("whole", 1.5), None]


def test_a_tower_at_several_strengths_are_batches_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    base = spread(write_tiny("internvl", tmp_path / "base"))
    targets = ("*vision*.0.*q_proj", "*language_model*.q_proj")
    adapters = write_adapters(base, tmp_path / "adapters", {"vision": {"targets": targets, "rank": 2, "alpha": 5.0}})
    shares = [("base", 1.0), ("vision", 0.5), ("vision", 1.0), ("vision", 0.0)]
    batches = shares_answered(base, adapters, shares, monkeypatch)
    assert batches == [[None, None], [("vision", 0.5)], [("vision", 1.0)]]


@torch.inference_mode()
def test_base_rows_of_a_mixed_batch_have_the_bases_bits(base: Path, model: ServedModel) -> None:
    sample = prompt_sample(model.assistant.encoder, *PICTURES[1])
    inputs = inputs_on_device(prompt_batch(model.assistant.encoder, [sample] * 3), "cpu")
    plain = alone(base, None).backbone.model(**inputs).logits
    with model.holding([model.entry("base"), model.entry("one"), model.entry("four")], [1, 1, 1]):
        mixed = model.backbone.model(**inputs).logits
    assert torch.equal(mixed[0], plain[0])
    assert not torch.allclose(mixed[1], plain[1], atol=1e-2)
