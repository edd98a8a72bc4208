"""How a run is started: by the verb or a script, with little settings; and what an entry loads and sets before that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl import cli
from dora_vl.errors import SPINS, UserError
from dora_vl.run.reading import read_run
from dora_vl.run.settings import RunConfig
from dora_vl.training import train_command
from tasks import commonsense
from tests.training.tiny_run import json_of, write_tiny_data, write_tiny_llava

ROOT = Path(__file__).parents[2]
SCRIPTS = ("llava_instruct", "vlbart_image", "vlbart_video", "commonsense", "image_qa", "video_qa")


def printed(code: str, **stated: str) -> list[str]:
    """The words of a program's last line."""
    environment = {name: value for name, value in os.environ.items() if name not in SPINS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), **stated},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1].split()


def test_a_missing_picture_is_told_before_torch_is_imported() -> None:
    code = """
import sys
from tasks import image_qa
try:
    image_qa.main(["--model", "none", "--image", "none.png", "--question", "q"])
except SystemExit as left:
    print(left.code, "torch" in sys.modules, "transformers" in sys.modules)
"""
    assert printed(code) == ["2", "False", "False"]


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


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, [*SPINS.values()]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", SPINS["KMP_BLOCKTIME"]]),
        ({"OMP_WAIT_POLICY": "active"}, ["None", "None"]),
    ],
)
def test_threads_do_not_spin_but_as_the_user_says(stated: dict[str, str], expected: list[str]) -> None:
    """OpenMP's library reads it when torch loads it, so no entry may import torch before."""
    code = f"""
import importlib, os, sys
before = dict(os.environ)
for name in {("dora_vl.cli", *(f"tasks.{name}" for name in SCRIPTS))}:
    importlib.import_module(name)
assert dict(os.environ) == before and "torch" not in sys.modules
sys.modules["dora_vl.cli"].main(["--version"])
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"), "torch" in sys.modules)
"""
    assert printed(code, **stated) == [*expected, "False"]


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="one core has no other")
@pytest.mark.parametrize("stated", [{}, {"OMP_NUM_THREADS": "2"}])
def test_each_thread_has_a_core_of_its_own_while_a_step_computes(
    stated: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between steps the main thread has all cores, since data workers start with its own."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = """
import os, threading
from dora_vl.errors import bind_threads
every = os.sched_getaffinity(0)
bind_threads()
from dora_vl.run.launch import own_core
core, main = own_core(), threading.get_native_id()
if core is None:
    print("unbound")
else:
    from dora_vl.training.callbacks import OwnCore
    callback = OwnCore(*core)
    threads = [os.sched_getaffinity(int(name)) for name in os.listdir("/proc/self/task") if int(name) != main]
    bound = [cores for cores in threads if cores != every]
    between = os.sched_getaffinity(0)
    callback.on_step_begin(None, None, None)
    own = os.sched_getaffinity(0)
    callback.on_step_end(None, None, None)
    print(between == every == os.sched_getaffinity(0), own < every, len(bound) > 0, any(own & cores for cores in bound))
"""
    assert printed(code, **stated) == (["unbound"] if stated else ["True", "True", "True", "False"])
