"""A vision-language model that is no LLaVA: evaluated as its run tested it, and trained in parts of several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from dora_vl import cli
from dora_vl.adapters.folder import load_adapter, read_weights
from dora_vl.core import trained_parts
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.training.run import run
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import decoder_run, json_of, trained, write_run, write_tiny_data

CPU: dict[str, object] = {"use_cpu": True, "max_steps": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second block of four samples has no picture."""
    return write_tiny_data(tmp_path_factory.mktemp("any-model"), samples=24, text_only_blocks=4)


def test_evaluate_gives_the_answers_of_the_run_s_own_test(data: Path, tmp_path: Path) -> None:
    evaluation = {"file": str(data), "batch_size": 5, "max_new_tokens": 4, "forgetting": False}
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    run(decoder_run(write_run(tmp_path / "run.yaml", base, data, training=CPU, evaluation=evaluation)))
    options = [
        "--adapter",
        tmp_path / "run" / "adapter",
        "--benchmarks",
        f"exact_match={data}",
        "--to",
        tmp_path / "to",
    ]
    options += ["--images", data.parent, "--max-new-tokens", "4", "--batch-size", "7"]
    cli.main(["evaluate", *map(str, options)])
    theirs = read_predictions(tmp_path / "to" / "predictions.jsonl")["exact_match"]
    own = read_predictions(tmp_path / "run" / "predictions.jsonl")[data.stem]
    assert {name: row.prediction for name, row in theirs.items()} == {n: row.prediction for n, row in own.items()}
    entry = json_of(tmp_path / "to" / "metrics.json")["sets"]["exact_match"]
    assert entry["metrics"] == json_of(tmp_path / "run" / "metrics.json")["sets"][data.stem]["metrics"]


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


def test_every_part_trains_at_its_rank(data: Path, tmp_path: Path) -> None:
    base = write_tiny("qwen3_vl_moe", tmp_path / "base")
    changes = {"adapter": PARTS, "optim": {"projector_learning_rate": None, "rates": RATES}, "training": CPU}
    folder = trained(write_run(tmp_path / "run.yaml", base, data, **changes))
    weights = read_weights(folder / "adapter")
    short = {name.removeprefix("base_model.model.model."): tensor for name, tensor in weights.items()}
    experts = short["language_model.layers.0.mlp.experts.gate_up_proj.lora_A.weight"]
    assert tuple(experts.shape) == (4, 2, 32)
    assert len(short["visual.blocks.0.attn.qkv.lora_A.weight"]) == 4
    assert len(short["language_model.layers.1.self_attn.q_proj.lora_A.weight"]) == 3
    assert len(short["visual.merger.linear_fc1.lora_A.weight"]) == 3
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    embedding: Any = model.get_input_embeddings().weight
    assert not torch.equal(short["language_model.embed_tokens.weight"], embedding)
    load_adapter(model, folder / "adapter")
    names = {part.part for part in trained_parts(model)}
    assert names == {"dora", "experts", "vision", "projector", "tokens"}
