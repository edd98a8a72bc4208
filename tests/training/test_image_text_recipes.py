"""Recipes of configs/image_text run as they are on a tiny model of their family: every method, two steps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.adapters.folder import read_weights
from tests.backbones.tiny_image_text import FAMILIES, write_tiny
from tests.training.tiny_run import write_tiny_data

ROOT = Path(__file__).parents[2]
METHODS = ("dora", "lora", "qdora", "full")
CASES = [
    ("smolvlm", "256m", "smolvlm"),
    ("qwen2_5_vl", "3b", "qwen2_5_vl"),
    ("internvl3", "2b", "internvl"),
    ("qwen3_vl", "2b", "qwen3_vl"),
    ("gemma3", "4b", "gemma3"),
    ("llava_onevision", "7b", "llava_onevision"),
]
ONE_AFTER_ANOTHER = """
import json, os, sys
import deepspeed
from dora_vl.training import decoder_pipeline, run
from tasks import llava_instruct
for arguments in json.loads(sys.argv[1]):
    child = os.fork()  # DeepSpeed's groups and accelerate's settings are a process's, once for all
    if not child:
        sys.argv = ["llava_instruct.py", *arguments]
        llava_instruct.main()
        sys.stderr.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {arguments}")
"""
"""A process for all methods of a recipe: to import everything takes longer than two steps."""


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size", "family"), CASES)
def test_the_recipe_runs_with_every_method(tmp_path: Path, recipe: str, size: str, family: str) -> None:
    needs = FAMILIES[family].needs
    if needs is not None:
        pytest.importorskip(needs)
    methods = [name for name in METHODS if name != "qdora" or importlib.util.find_spec("bitsandbytes")]
    write_tiny(family, tmp_path / "base", width=64)
    write_tiny_data(tmp_path / "data", samples=8, text_only_blocks=4)
    options: dict[str, object] = {
        "config": f"image_text/{recipe}",
        "model.base": tmp_path / "base",
        "data.train": tmp_path / "data" / "train.json",
        "data.image_folder": tmp_path / "data",
        "data.workers": 0,
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.logging_steps": 1,
    }
    own = {name: {"variant": f"{size}_{name}", "training.output_dir": tmp_path / name} for name in methods}
    runs = [[f"--{name}={value}" for name, value in {**options, **changes}.items()] for changes in own.values()]
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(runs)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for method in methods:
        adapter = tmp_path / method / "adapter"
        recorded = json.loads((adapter / "recipe.json").read_text())
        expected = {"qdora": ("dora", "nf4")}.get(method, (method, None))
        assert (recorded["adapter"]["method"], recorded["quantisation"], recorded["dtype"]) == (*expected, "bfloat16")
        weights = read_weights(adapter)
        assert any("magnitude" in name for name in weights) == (expected[0] == "dora")
        assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
        assert json.loads((tmp_path / method / "metrics.json").read_text())["train_steps"] == 2
