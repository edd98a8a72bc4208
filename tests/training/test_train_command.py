"""How light the scripts are: help comes soon, and asking a model loads nothing of another kind's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dora_vl import cli
from dora_vl.errors import SPINS, UserError
from dora_vl.run.reading import read_run
from dora_vl.run.settings import RunConfig
from dora_vl.training import train_command
from tasks import commonsense
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import json_of, write_tiny_data, write_tiny_llava

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
    ("settings", "by_script", "by_command"),
    [
        ("model: {base: b}\ndata: {train: t.json}", "commonsense", "image_text"),
        ("task: llava\nmodel: {base: b}\ndata: {train: t.json}", "llava", "llava"),
    ],
)
def test_scripts_and_the_command_differ_in_the_task_of_settings_that_name_none(
    settings: str, by_script: str, by_command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(f"{settings}\ntraining: {{output_dir: run}}\n")
    started: list[RunConfig] = []

    def record(config: RunConfig) -> None:
        started.append(config)
        raise UserError("started")

    monkeypatch.setattr(train_command, "pipeline_of", record)
    words = [f"--config={tmp_path / 'run.yaml'}", "--adapter.rank", "7"]
    monkeypatch.setattr(sys, "argv", ["commonsense.py", *words])
    with pytest.raises(SystemExit):
        commonsense.main()
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "run.yaml"), *words[1:]])
    assert started == [read_run(words, task="commonsense"), read_run(words)]
    assert [config.task for config in started] == [by_script, by_command]


def test_base_data_and_output_folder_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, records = write_tiny_llava(tmp_path / "base"), write_tiny_data(tmp_path, samples=16)
    monkeypatch.chdir(tmp_path)
    settings = f"model: {{base: {base}}}\ndata: {{train: {records.name}}}\ntraining: {{output_dir: run}}\n"
    Path("run.yaml").write_text(settings)
    cli.main(["train", "run.yaml", "--training.max_steps", "2"])
    assert json_of(tmp_path / "run" / "metrics.json")["train_steps"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


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
