"""A composed folder opens like a downloaded one, with plain transformers too, and answers the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.model import open_backbone
from dora_vl.backbones.specs import ComposeSpec, SmallLanguageModel
from dora_vl.backbones.tower_sources import compose_llava
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import UserError
from tests.backbones.conftest import VISION
from tests.backbones.tiny_language import SIZES

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module", params=["tied", "untied"])
def language_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_tokenizer: PreTrainedTokenizerFast
) -> Path:
    folder = tmp_path_factory.mktemp("language")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_saved_without_image(new_tokenizer, folder))
    torch.manual_seed(0)
    tied = {"vocab_size": len(tokenizer), "tie_word_embeddings": request.param == "tied"}
    config = LlamaConfig(**{**SIZES, **tied})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _saved_without_image(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<image>"', '"<other>"'))
    return folder


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    torch.manual_seed(1)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder)
    return folder


@pytest.fixture
def make_spec(language_folder: Path, vision_folder: Path) -> Callable[..., ComposeSpec]:
    def make(**changes: object) -> ComposeSpec:
        settings: dict[str, object] = {
            "vision_library": "transformers",
            "vision_name": str(vision_folder),
            "image_mean": MEAN,
            "image_std": STD,
            "language_model": str(language_folder),
        }
        return ComposeSpec(**{**settings, **changes})  # pyright: ignore

    return make


def test_clip_and_llama_open_with_plain_transformers(make_spec: Callable[..., ComposeSpec], tmp_path: Path) -> None:
    compose_llava(make_spec(), tmp_path / "llava")
    starts = {".".join(key.split(".")[:2]) for key in load_file(tmp_path / "llava" / "model.safetensors")}
    assert starts - {"language_model.lm_head"} == {  # as published LLaVAs have them
        "language_model.model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "vision_tower.vision_model",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]
    for path in (tmp_path / "llava").glob("*.json"):  # nothing of this machine is in it
        assert str(tmp_path.parent) not in path.read_text(), path.name
    backbone = open_backbone(str(tmp_path / "llava"))
    image = backbone.config.image_token_id
    ids = torch.tensor([[1, 300, image, image, image, image, 310]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    ours = backbone.generate(ids, torch.ones_like(ids), pixel_values=pixels, max_new_tokens=5).tolist()
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    kinds = config["model_type"], config["text_config"]["model_type"], config["vision_config"]["model_type"]
    assert kinds == ("llava", "llama", "clip_vision_model")  # whose classes are transformers' own
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert plain.generate(input_ids=ids, pixel_values=pixels, **options)[:, ids.shape[1] :].tolist() == ours


def test_the_parts_are_the_given_ones(make_spec, tmp_path, language_folder, vision_folder) -> None:
    compose_llava(make_spec(projector_seed=3), tmp_path / "llava")
    model = open_backbone(str(tmp_path / "llava")).model
    language = LlamaForCausalLM.from_pretrained(language_folder)
    vision = CLIPVisionModel.from_pretrained(vision_folder)
    rows = language.config.vocab_size
    embedding = model.model.language_model.embed_tokens.weight
    assert len(embedding) % 64 == 0
    assert model.config.image_token_id == len(load_tokenizer(str(language_folder)))
    assert torch.equal(embedding[:rows], language.model.embed_tokens.weight)
    torch.testing.assert_close(embedding[rows], language.model.embed_tokens.weight.mean(0))
    assert torch.equal(model.lm_head.weight[:rows], language.lm_head.weight)
    assert (model.lm_head.weight is embedding) == language.config.tie_word_embeddings
    for name, value in vision.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value)
    torch.manual_seed(3)
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, torch.nn.Linear(16, 32).weight)


def test_a_grid_tower_and_the_processor(make_spec: Callable[..., ComposeSpec], tmp_path: Path) -> None:
    tower = {"vision_library": "timm", "vision_name": "test_efficientnet", "vision_weights": "random"}
    spec = make_spec(**tower, grid_pool=2, image_size=96, dtype="bfloat16")
    compose_llava(spec, tmp_path / "llava")
    backbone = open_backbone(str(tmp_path / "llava"), dtype=torch.bfloat16)
    assert backbone.config.image_seq_length == 4
    assert (backbone.config.vision_feature_layer, backbone.config.vision_feature_select_strategy) == (-1, "full")
    assert {weight.dtype for weight in backbone.model.parameters()} == {torch.bfloat16}
    processor = AutoProcessor.from_pretrained(tmp_path / "llava", backend="pil")
    inputs = processor(text="a <image> b", images=torch.zeros(3, 60, 40).numpy(), return_tensors="pt")
    assert int((inputs["input_ids"] == backbone.config.image_token_id).sum()) == 4
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert torch.isfinite(loaded.float()(**inputs).logits).all()


def test_refusals(make_spec: Callable[..., ComposeSpec], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError):
        compose_llava(make_spec(), tmp_path / "there")
    with pytest.raises(UserError):
        compose_llava(make_spec(language_model=str(tmp_path / "nothing")), tmp_path / "llava")
    with pytest.raises(UserError):
        open_backbone(str(tmp_path / "nothing"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.fixture
def small(tmp_path: Path) -> SmallLanguageModel:
    file = tmp_path / "texts.jsonl"
    write_examples(file, [Example(id="1", question="what color is it?", answers=(Answer(text="light blue"),))])
    return SmallLanguageModel(
        texts=(str(file),),
        words=("[INST]",) * 2,
        vocabulary=290,
        width=16,
        layers=2,
        heads=2,
        feedforward=8,
        init_std=0.2,
    )


def test_a_small_llama_is_made_with_its_vocabulary(make_spec, small, tmp_path) -> None:
    for name, seed in {"first": 3, "again": 3, "other": 4}.items():
        compose_llava(make_spec(language_model=None, small=small, projector_seed=seed), tmp_path / name)
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = "language_model.model.layers.1.mlp.up_proj.weight"
    assert first[drawn].shape == (8, 16)
    assert first[drawn].std() == pytest.approx(0.2, rel=0.25)
    assert not torch.equal(first[drawn], other[drawn])
    tokenizer = load_tokenizer(str(tmp_path / "first"))
    assert tokenizer("light blue").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("light blue").input_ids[-1] != tokenizer.eos_token_id
    assert tokenizer.tokenize("[INST]<image>") == ["[", "INST", "]", "<image>"]
    backbone = open_backbone(str(tmp_path / "first"))
    image = backbone.config.image_token_id
    ids = torch.tensor([[0, image, image, image, image, 270]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    assert backbone.generate(ids, torch.ones_like(ids), pixel_values=pixels, max_new_tokens=3).shape[0] == 1
