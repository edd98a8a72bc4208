"""How light the scripts are: help comes soon, and asking a model loads nothing of another kind's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dora_vl import cli
from dora_vl.errors import SPINS, UserError
from dora_vl.training import train_command
from tests.backbones.tiny_image_text import write_tiny

ROOT = Path(__file__).parents[2]
TASKS = ("llava_instruct", "vlbart_image", "vlbart_video", "commonsense", "image_qa", "video_qa")
MOST_TIMES_TORCH = 2.0
"""A limit in seconds fails on a busy machine."""
LOADED = """
import json, sys
from tasks import image_qa
image_qa.main(sys.argv[1:])
print(json.dumps(sorted(name for name in sys.modules if name.startswith("dora_vl"))))
"""


def in_a_process(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_image_qa_loads_nothing_of_a_vlbart(tmp_path: Path) -> None:
    base = write_tiny("internvl", tmp_path / "base")
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    options = ["--model", str(base), "--image", str(tmp_path / "red.png"), "--question", "q", "--max-new-tokens", "2"]
    loaded: list[str] = json.loads(in_a_process("-c", LOADED, *options).splitlines()[-1])
    assert "dora_vl.evaluation.ask" in loaded
    others = ("vlbart", "subtask", "dora_vl.training")
    assert [name for name in loaded if any(part in name for part in others)] == []


def test_a_missing_picture_is_told_before_torch_is_imported() -> None:
    code = """
import sys
from tasks import image_qa
try:
    image_qa.main(["--model", "none", "--image", "none.png", "--question", "q"])
except SystemExit as left:
    print(left.code, "torch" in sys.modules, "transformers" in sys.modules)
"""
    assert in_a_process("-c", code).split() == ["2", "False", "False"]


@pytest.mark.parametrize(
    ("recipe", "variant", "task"),
    [
        ("llava/llava15", "7b_dora", "llava_instruct"),
        ("image_text/qwen2_5_vl", "3b_dora", "llava_instruct"),
        ("vlbart/image", "dora", "vlbart_image"),
        ("vlbart/video", "dora", "vlbart_video"),
        ("commonsense/llama", "llama2_7b_dora_r16", "commonsense"),
    ],
)
def test_train_starts_what_the_settings_are_of(
    recipe: str, variant: str, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(name: str, config: Any) -> None:
        raise UserError(f"{name} with rank {config.adapter.rank}")

    monkeypatch.setattr(train_command, "pipeline_of", lambda name: partial(record, name))
    with pytest.raises(SystemExit):
        cli.main(["train", recipe, "--variant", variant, "--adapter.rank", "7"])
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {task} with rank 7"


@pytest.mark.parametrize("task", [pytest.param(name, marks=pytest.mark.slow) for name in TASKS])
def test_help_comes_soon(task: str) -> None:
    """CPU seconds of the process and those that it starts, beside those of `import torch` in turns with it."""
    helped, torch_alone = (
        min(seconds)
        for seconds in zip(
            *((cpu_seconds(f"tasks/{task}.py", "--help"), cpu_seconds("-c", "import torch")) for _ in range(2)),
            strict=True,
        )
    )
    assert helped <= MOST_TIMES_TORCH * torch_alone


def cpu_seconds(*command: str) -> float:
    before = os.times()
    in_a_process(*command)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_threads_do_not_spin_but_as_the_user_says() -> None:
    """OpenMP's library reads it when torch loads it, so no entry may import torch before."""
    modules = ("dora_vl.cli", *(f"tasks.{name}" for name in TASKS))
    code = f"""
import importlib, os, sys
before = dict(os.environ)
import dora_vl
for name in {modules}:
    importlib.import_module(name)
assert dict(os.environ) == before and "torch" not in sys.modules
sys.modules["dora_vl.cli"].main(["--version"])
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"), "torch" in sys.modules)
"""
    spins = (SPINS["GOMP_SPINCOUNT"], SPINS["KMP_BLOCKTIME"])
    for stated, expected in (
        ({}, spins),
        ({"GOMP_SPINCOUNT": "7"}, ("7", spins[1])),
        ({"OMP_WAIT_POLICY": "active"}, (None, None)),
    ):
        environment = {name: value for name, value in os.environ.items() if name not in SPINS} | {
            "PYTHONPATH": str(ROOT)
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | stated,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.splitlines()[-1:] == [f"{expected[0]} {expected[1]} False"], done.stderr
