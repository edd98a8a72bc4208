"""The plugin that runs PEFT's tests under `accelerate_peft`, held by a few tests of its own in PEFT's place."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.peft_suite import suite_command

ROOT = Path(__file__).parents[2]
LITTLE_SUITE = """
import pytest
import torch
from peft import LoraConfig, LoHaConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn


def kinds(model):
    return {type(module).__name__ for module in model.modules() if hasattr(module, "base_layer")}


def base():
    return nn.Sequential(nn.Linear(4, 3))


@pytest.mark.parametrize("name", ["Vanilla LoRA", "Vanilla AdaLoRA", "Vanilla IA3"])
def test_is_linear(name):
    assert kinds(get_peft_model(base(), LoraConfig(target_modules=["0"]))) == {"Linear"}


def test_round_trip(tmp_path):
    model = get_peft_model(base(), LoraConfig(target_modules=["0"], use_dora=True))
    model.save_pretrained(tmp_path)
    assert kinds(PeftModel.from_pretrained(base(), tmp_path)) == {"AcceleratedLinear"}


def test_lora_injected():
    model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), base())
    assert kinds(model) == {"AcceleratedLinear"}


def test_lora_broken_fixture(no_such_fixture):
    pass


@pytest.mark.skip
def test_lora_skipped():
    pass


def test_another_method():
    assert kinds(get_peft_model(base(), LoHaConfig(target_modules=["0"]))) == {"Linear"}
"""
OUTCOMES = {
    "test_is_linear[Vanilla LoRA]": ("passed", "failed", 1),
    "test_round_trip": ("failed", "passed", 2),
    "test_lora_injected": ("failed", "passed", 1),
    "test_lora_broken_fixture": ("error", "error", 0),
    "test_lora_skipped": ("skipped", "skipped", 0),
}
"""Test -> its outcome plain and accelerated, and the layers accelerated in it; others are not about LoRA or DoRA."""


FILE = "tests/test_lora_variants.py"
BROKEN = f"{FILE}::test_lora_broken_fixture"


@pytest.fixture
def peft(tmp_path):
    (tmp_path / "peft" / "tests").mkdir(parents=True)
    (tmp_path / "peft" / FILE).write_text(LITTLE_SUITE)
    return tmp_path / "peft"


def lines(file: Path) -> dict[str, dict]:
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({line["test"] for line in results}) == len(results), "each test once"
    return {line["test"].removeprefix(f"{FILE}::"): line for line in results}


def test_the_plugin_selects_accelerates_and_goes_on(peft, tmp_path):
    """One test has a line from before, which stays as it is."""
    records = tmp_path / "accelerated.jsonl"
    records.write_text(json.dumps({"test": BROKEN, "outcome": "error", "layers": 0, "message": "from before"}) + "\n")
    assert ran_file(peft, records, "--accelerate") == 1
    results = lines(records)
    assert {test: (line["outcome"], line["layers"]) for test, line in results.items()} == {
        test: (accelerated, layers) for test, (_, accelerated, layers) in OUTCOMES.items()
    }
    assert results["test_lora_broken_fixture"]["message"] == "from before"
    assert "AcceleratedLinear" in results["test_is_linear[Vanilla LoRA]"]["message"]


def ran_file(peft: Path, records: Path, *words: str) -> int:
    folders = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    return subprocess.run(
        suite_command(FILE, records, words), cwd=peft, env={**os.environ, "PYTHONPATH": folders}, check=False
    ).returncode
