"""Every recipe, a YAML of configs/ with one of its variants, loads, and is built and adapted as it says.

`configs_resolved.json` holds every value of every run, defaults included: those that most runs of a folder share once,
then what a run has else. It is changed by hand, with the recipe.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.backbones import register_towers
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.specs import ComposeSpec, VlBartSpec
from dora_vl.backbones.tower_sources import load_tower
from dora_vl.backbones.vlbart_model import VlBartConfig, VlBartForConditionalGeneration
from dora_vl.core import trained_parts
from dora_vl.run.arguments import check_deepspeed, read_deepspeed
from dora_vl.run.settings import ModelConfig, RunConfig, settings_of
from dora_vl.run.settings_parser import flattened, read_run, run_parser, variants_of
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.parts import adapt
from dora_vl.training.vlbart_pipeline import vlbart_dora_config
from tests.backbones.tiny_families.family import resolved
from tests.backbones.tiny_families.table import FAMILIES as TINY_FAMILIES
from tests.backbones.tiny_image_text import tiny_tokenizer
from tests.backbones.tiny_vlbart import BART_BASE

ROOT = Path(__file__).parents[1]


class Recipe(NamedTuple):
    path: Path
    variant: str | None

    @property
    def name(self) -> str:
        """As `llava/llava15:7b_dora`."""
        file = self.path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        return file if self.variant is None else f"{file}:{self.variant}"


FILES = sorted((ROOT / "configs").rglob("*.yaml"))
WITHOUT = ("easyvqa_smollm2_dora",)
"""Files with variants that are a run without one too."""
CONFIGS = [
    Recipe(path, variant)
    for path in FILES
    for variant in [*variants_of(path), *([None] if path.stem in WITHOUT else [])] or [None]
]
CLIP_LARGE: Any = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def sizes(hidden: int, intermediate: int, layers: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, **more}


LLAMA_7B, LLAMA_13B = sizes(4096, 11008, 32), sizes(5120, 13824, 40, num_attention_heads=40)
LLAMA3_8B = sizes(4096, 14336, 32, vocab_size=128256, num_key_value_heads=8)
SMOLLM2_135M = sizes(
    576, 1536, 30, vocab_size=49152, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
)
# The published shapes of what the files name, since a test has no network.
LANGUAGE_SHAPES = {
    "lmsys/vicuna-7b-v1.5": LLAMA_7B,
    "lmsys/vicuna-13b-v1.5": LLAMA_13B,
    "llava-hf/llava-1.5-7b-hf": LLAMA_7B,
    "llava-hf/llava-1.5-13b-hf": LLAMA_13B,
    "runs/demo/assets/smollm2": SMOLLM2_135M,
    "runs/nlvr_llava/start": SMOLLM2_135M,  # nearly: it is composed as a small one
    "runs/nlvr_llava/seen": SMOLLM2_135M,
    "runs/nlvr_llava/pretrained": SMOLLM2_135M,
    "runs/nlvr_llava/base": SMOLLM2_135M,
    "yahma/llama-7b-hf": LLAMA_7B,
    "yahma/llama-13b-hf": LLAMA_13B,
    "meta-llama/Llama-2-7b-hf": LLAMA_7B,
    "meta-llama/Meta-Llama-3-8B": LLAMA3_8B,
}
FAMILIES = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": "smolvlm",
    "HuggingFaceTB/SmolVLM-500M-Instruct": "smolvlm",
    "HuggingFaceTB/SmolVLM-Instruct": "smolvlm",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-2B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl",
    "OpenGVLab/InternVL3-2B-hf": "internvl",
    "OpenGVLab/InternVL3-8B-hf": "internvl",
    "google/gemma-3-4b-it": "gemma3",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
    "google/paligemma2-3b-pt-448": "paligemma",
}
"""The model type of each published base of configs/image_text; a tiny one of it stands in."""


def vision_config(model: ModelConfig) -> Any:
    compose = model.compose
    if not isinstance(compose, ComposeSpec) or compose.vision_name == "openai/clip-vit-large-patch14-336":
        return CLIPVisionConfig(**CLIP_LARGE, image_size=336, patch_size=14)
    tower = load_tower(dataclasses.replace(compose.tower(), weights="random", weights_in_order=False))
    return tower.model.config


def language_config(source: str, layers: int | None) -> LlamaConfig:
    """The published shape of a base, or the first layers of it."""
    return LlamaConfig(**{**LANGUAGE_SHAPES[source], **({} if layers is None else {"num_hidden_layers": layers})})


def meta_llava(config: RunConfig, layers: int | None) -> LlavaForConditionalGeneration:
    register_towers()
    model = config.model
    source = model.compose.language_model if isinstance(model.compose, ComposeSpec) else None
    text = language_config(source or model.base, layers)
    tied = text.tie_word_embeddings
    shapes = LlavaConfig(vision_config=vision_config(model), text_config=text, tie_word_embeddings=tied)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(shapes)


def meta_language_model(config: RunConfig, layers: int | None) -> PreTrainedModel:
    source = config.model.base if config.model.source is None else config.model.source.folder
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(language_config(source, layers))


def meta_vlbart(config: RunConfig) -> VlBartForConditionalGeneration:
    """bart-base's shape, or a small one; a demo's second part takes over its first part's base, which is not there."""
    compose = config.model.compose
    visual: dict[str, Any] = {}
    if isinstance(compose, VlBartSpec):
        visual = {"feature_width": compose.feature_width, "pooled_side": compose.pooled_side}
    with torch.device("meta"):
        return VlBartForConditionalGeneration(VlBartConfig(**{**BART_BASE, **visual}))


def meta_image_text(config: RunConfig, _: int | None) -> PreTrainedModel:
    """A tiny model of the base's family, which has the names of the published one's layers."""
    model_type = FAMILIES[config.model.base]
    tiny = TINY_FAMILIES[model_type]
    settings = resolved(tiny.config, tiny_tokenizer(tiny.names))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **settings))


@functools.cache
def read(recipe: Recipe) -> Any:
    chosen = [] if recipe.variant is None else [f"--variant={recipe.variant}"]
    return read_run([f"--config={recipe.path}", *chosen])


def named(name: str) -> Recipe:
    """The recipe that `llava/llava15:7b_dora` stands for."""
    return next(recipe for recipe in CONFIGS if recipe.name == name)


def adapted(config: Any, layers: int | None = None) -> Any:
    """The model of these settings on the meta device, adapted as they say; of so many language layers, or whole."""
    if config.task == "vlbart":
        model = meta_vlbart(config)
        adapt(model, vlbart_dora_config(config.adapter, model, heads=bool(config.data.closed_answers)))
        return model
    make = {"commonsense": meta_language_model, "image_text": meta_image_text, "llava": meta_llava}[config.task]
    model = make(config, layers)
    adapt(model, DecoderPipeline(config).dora_config(DecoderBackbone(model)))
    return model


def trained_count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for part in trained_parts(model) for weight in part.parameters.values())


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.name)
def test_loads_and_builds_on_the_meta_device(recipe: Recipe) -> None:
    config = read(recipe)
    if "deepspeed" in config.training:
        check_deepspeed(read_deepspeed(config.training["deepspeed"]), method=config.adapter.method)
    model = adapted(config, layers=2)  # each is like the next
    assert trained_count(model) > 0
    tower = getattr(model.model, "vision_tower", torch.nn.Identity())
    assert not any(weight.requires_grad for weight in tower.parameters())


@pytest.mark.parametrize(
    ("name", "expected"), [("7b_lora", 340_795_392), ("7b_dora", 342_155_264), ("7b_pretrain", 20_979_712)]
)
def test_trains_the_published_number_of_parameters(name: str, expected: int) -> None:
    assert trained_count(adapted(read(named(f"llava/llava15:{name}")))) == expected


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        (("*.q_proj",), "projector"),
        (("*.q_proj", "projector"), "full"),
        (("model.multi_modal_projector.linear_1",), "full"),
    ],
)
def test_a_full_run_trains_the_projector_as_other_methods_do(targets: tuple[str, ...], part: str) -> None:
    """As a part of its own, with its own rate, unless the targets hold some of it."""
    config = read(named("llava/llava15:7b_dora"))
    adapter = dataclasses.replace(config.adapter, method="full", targets=targets)
    parts = trained_parts(adapted(dataclasses.replace(config, adapter=adapter), layers=2))
    projector = {each.part for each in parts for name in each.parameters if "multi_modal_projector" in name}
    assert projector == {part}
    alone = dataclasses.replace(adapter, targets=("*.q_proj",), train_projector=False)
    assert {each.part for each in trained_parts(adapted(dataclasses.replace(config, adapter=alone), layers=2))} == {
        "full"
    }


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("llama_7b_lora_r32", 0.83),
        ("llama_7b_dora_r16", 0.43),
        ("llama_13b_dora_r32", 0.68),
        ("llama3_8b_dora_r16", 0.36),  # the paper prints .35, which leaves the magnitudes out
        ("llama3_8b_dora_r32", 0.71),
        ("llama_7b_dora_granular", 0.39),
    ],
)
def test_trains_the_papers_share_of_parameters(name: str, percent: float) -> None:
    """Tables 1 and 6, in percent of the frozen model's parameters, to the second decimal."""
    model = adapted(read(named(f"commonsense/llama:{name}")))
    trained = trained_count(model)
    frozen = sum(weight.numel() for weight in model.parameters()) - trained
    shares = (100 * trained / frozen, 100 * trained / (frozen + trained))
    assert any(abs(share - percent) < 0.0101 for share in shares), shares


@pytest.mark.parametrize(
    ("name", "trained", "total"),
    [
        ("image:lora", 8_786_688, 148_234_752),
        ("image:dora", 8_838_912, 148_262_400),
        ("video:lora", 7_607_040, 147_055_104),
        ("video:dora", 7_634_688, 147_082_752),
    ],
)
def test_trains_the_published_number_of_vlbart_parameters(name: str, trained: int, total: int) -> None:
    model = adapted(read(named(f"vlbart/{name}")))
    assert trained_count(model) == trained
    assert sum(weight.numel() for weight in model.parameters()) == total


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.name)
def test_the_table_names_it(recipe: Recipe) -> None:
    """In the second column of a row of its file, alone or among others."""
    table = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in table if line.startswith(f"| `{recipe.path.relative_to(ROOT / 'configs')}` |")]
    named = [name.strip() for row in rows for name in row[2].split(",")]
    assert named.count(f"`{recipe.variant}`" if recipe.variant else "") == 1


RESOLVED: Mapping[str, Any] = json.loads(Path(__file__).with_name("configs_resolved.json").read_text())
EXPECTED = {name: {**group["shared"], **run} for group in RESOLVED.values() for name, run in group["runs"].items()}


def test_every_recipe_is_written_down() -> None:
    assert sorted(recipe.name for recipe in CONFIGS) == sorted(EXPECTED)


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.name)
def test_resolves_to_what_is_written_down(recipe: Recipe) -> None:
    settings, expected = settings_of(read(recipe)), EXPECTED[recipe.name]
    defaults = run_parser(settings["task"]).get_defaults().as_dict()
    defaults = flattened(json.loads(json.dumps(defaults)))  # as what was read: lists for tuples
    assert (settings.pop("variant"), settings.pop("task")) == (recipe.variant, recipe.path.parent.name)
    actual = flattened(settings)
    assert {key: actual.get(key, "is not there") for key in expected} == expected
    more = {key: value for key, value in actual.items() if key not in expected}
    assert more == {key: defaults.get(key, "has no default") for key in more}, "it sets what it did not set"
