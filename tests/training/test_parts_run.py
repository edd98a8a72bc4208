"""Named parts in a run's YAML, over a mixture of experts with pictures: trained and merged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from dora_vl.adapters.folder import load_adapter, read_weights
from dora_vl.core import merge_dora, strip_adapters, trained_parts
from dora_vl.evaluation import merge_command
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import write_run, write_tiny_data

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


def test_the_plan_says_what_trains_and_what_does_not(there: Path) -> None:
    only = {"targets": ["language"], "rank": 3, "parts": {"vision": PARTS["parts"]["vision"]}}
    changes = {"adapter": only, "optim": {"rates": {"vision": 1e-4}}, "training": {**CPU, "max_steps": 1}}
    run(DecoderPipeline(read_run_file(settings(there, "table", **changes))))
    plan = json.loads((there / "table" / "plan.json").read_text())
    trained, frozen = ({row[0]: row[1:] for row in plan[name]["rows"]} for name in ("trained", "not_adapted"))
    assert trained["dora.A"][0::3] == ["8", "3"]
    assert trained["vision.B"][-2:] == ["4", "0.0001"]
    assert trained["projector"][-1] == "0.001"
    assert frozen["experts that are one tensor"][-1].endswith("experts.gate_up_proj")
    assert frozen["linear layers"][-1] == "lm_head.weight"


def test_a_merged_folder_is_the_adapted_model(there: Path, adapter: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    merge_command.add_arguments(parser)
    list(merge_command.run(parser.parse_args(["--adapter", str(adapter), "--to", str(tmp_path / "merged")])))
    model = base(there)
    load_adapter(model, adapter)
    merge_dora(model, keep_base=False)
    strip_adapters(model)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    changed = 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            merged[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        changed += not torch.equal(tensor, base(there).state_dict()[name]) if "experts." in name else 0
    assert changed == 4
