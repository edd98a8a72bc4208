"""Named parts in a run's YAML: trained and merged, or refused before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from data_prep import generated_commonsense
from dora_vl.adapters.folder import load_adapter, read_weights
from dora_vl.core import trained_parts
from dora_vl.errors import UserError
from dora_vl.run.reading import read_run_file, read_settings
from dora_vl.run.settings import CommonsenseRunConfig, RunConfig, VlBartRunConfig
from dora_vl.training.decoder_pipeline import CommonsensePipeline, DecoderPipeline
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.run import run, train
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_language import write_tiny_language
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import all_subtasks, write_vlbart_data, write_vlbart_run

PARTS: dict[str, Any] = {
    "targets": ["language"],
    "rank": 3,
    "alpha": 7.0,
    "parts": {
        "experts": {"targets": ["experts"], "rank": 2, "alpha": 5.0},
        "vision": {"targets": ["vision"], "rank": 4},
        "projector": {"targets": ["projector"], "alpha": 1.5},
    },
    "also_train": {"tokens": ["*embed_tokens.weight"]},
}
RATES = {"experts": 2e-3, "vision": 1e-4, "vision.magnitude": 3e-4, "projector": 5e-4, "tokens": 4e-4}
CPU: dict[str, object] = {"use_cpu": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_tiny("qwen3_vl_moe", folder / "base")
    write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    return folder


def settings(there: Path, name: str, **changes: Any) -> Path:
    given = {"adapter": PARTS, "optim": {"projector_learning_rate": None, "rates": RATES}, "training": CPU, **changes}
    return write_run(there / f"{name}.yaml", there / "base", there / "data" / "train.json", **given)


@pytest.fixture(scope="module")
def adapter(there: Path) -> Path:
    run(DecoderPipeline(read_run_file(settings(there, "whole"))))
    return there / "whole" / "adapter"


def base(there: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(there / "base").eval()


def test_every_part_trains_at_its_rank(there: Path, adapter: Path) -> None:
    weights = read_weights(adapter)
    short = {name.removeprefix("base_model.model.model."): tensor for name, tensor in weights.items()}
    experts = short["language_model.layers.0.mlp.experts.gate_up_proj.lora_A.weight"]
    assert tuple(experts.shape) == (4, 2, 32)
    assert len(short["visual.blocks.0.attn.qkv.lora_A.weight"]) == 4
    assert len(short["language_model.layers.1.self_attn.q_proj.lora_A.weight"]) == 3
    assert len(short["visual.merger.linear_fc1.lora_A.weight"]) == 3
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    embedding = base(there).get_input_embeddings().weight
    assert not torch.equal(short["language_model.embed_tokens.weight"], embedding)
    model = base(there)
    load_adapter(model, adapter)
    names = {part.part for part in trained_parts(model)}
    assert names == {"dora", "experts", "vision", "projector", "tokens"}


def llava(folder: Path, changes: dict[str, Any]) -> Pipeline:
    base = write_tiny_llava(folder / "base")
    path = write_run(folder / "run.yaml", base, write_tiny_data(folder / "data"), **changes)
    return DecoderPipeline(read_settings(["--config", str(path)], RunConfig))


def commonsense(folder: Path, changes: dict[str, Any]) -> Pipeline:
    write_tiny_language(folder / "base")
    generated_commonsense.main(["--to", str(folder / "data")])
    sections = {
        "model": {"base": str(folder / "base"), "dtype": "float32"},
        "data": {"train": [str(folder / "data" / "train.json")]},
        "training": {"output_dir": str(folder / "run")},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**sections, **changes}))
    return CommonsensePipeline(read_settings(["--config", str(path)], CommonsenseRunConfig))


def vlbart(folder: Path, changes: dict[str, Any]) -> Pipeline:
    path = write_vlbart_run(folder / "run.yaml", write_vlbart_data(folder / "data"), ("vqav2",), **changes)
    return VlBartPipeline(read_settings(["--config", str(path)], VlBartRunConfig), all_subtasks(), name="tiny")


@pytest.mark.parametrize("make", [llava, commonsense, vlbart], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"targets": ["*.nosuch_proj"]}},
        {"adapter": {"also_train": {"norms": ["*.norrm.*"]}}},
        {"adapter": {"parts": {"eyes": {"targets": ["*.eyes.*"]}}}},
        {"optim": {"rates": {"dorra": 1e-4}}},
    ],
    ids=["targets", "also_train", "parts", "rates"],
)
def test_no_weight_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, dict[str, Any]], Pipeline],
    changes: dict[str, Any],
) -> None:
    task = make(tmp_path, changes)
    monkeypatch.setattr(task, "load", lambda: pytest.fail("weights are read"))
    with pytest.raises(UserError):
        train(task)
    assert not list(tmp_path.rglob("settings.json")), "the run has no folder yet that would be in a second try's way"
