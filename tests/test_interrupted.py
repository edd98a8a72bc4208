"""Ctrl-C and SIGTERM end a command in one line with 130 and 143, whatever it was about to do; real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

ROOT = Path(__file__).parents[1]
CHILD = """
import os, signal, sys
number, point = int(sys.argv[1]), sys.argv[2]
class AtImport:
    def find_spec(self, module, path=None, target=None):
        if module == point:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, AtImport())
from dora_vl.cli import main
main(sys.argv[3:])
"""
LINES = {signal.SIGINT: "stopped by Ctrl-C", signal.SIGTERM: "stopped by SIGTERM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose steps would take minutes, so that no signal comes after its end."""
    folder = tmp_path_factory.mktemp("interrupted")
    base, records = write_tiny_llava(folder / "base"), write_tiny_data(folder / "data")
    write_run(folder / "run.yaml", base, records, training={"use_cpu": True, "max_steps": 9_999, "output_dir": "run"})
    return folder


def started(folder: Path, *words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "module", "line"),
    [
        (signal.SIGINT, "dora_vl.run.launch", "train run.yaml"),
        (signal.SIGTERM, "numpy", "train run.yaml"),  # torch imports it where an exception is lost
        *(
            pytest.param(number, *case, marks=pytest.mark.slow)
            for number, *case in (
                (signal.SIGINT, "numpy", "train run.yaml"),
                (signal.SIGINT, "torch", "train run.yaml"),
                (signal.SIGTERM, "transformers", "train run.yaml"),
                (signal.SIGINT, "dora_vl.training.trainer", "train run.yaml"),
                (signal.SIGINT, "dora_vl.evaluation.test", "init data --model base"),
                (signal.SIGTERM, "dora_vl.training.pipeline", "estimate run.yaml"),
                (
                    signal.SIGINT,
                    "dora_vl.evaluation.open_model",
                    "ask --model base --image data/red-0.png --question q",
                ),
            )
        ),
    ],
)
def test_whatever_is_imported(folder: Path, number: signal.Signals, module: str, line: str) -> None:
    process = started(folder, "-c", CHILD, int(number), module, *line.split())
    _, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (128 + number, LINES[number] + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", LINES)
@pytest.mark.parametrize("after", ["records converted", "what trains", "at the fullest moment"])
def test_whatever_is_read(folder: Path, number: signal.Signals, after: str) -> None:
    """Between the last of these lines and the first step a signal may find the trainer's own handler already."""
    cache = {"HF_DATASETS_CACHE": str(folder / f"cache-{number}-{after[:4]}")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cache.items():
            patch.setenv(name, value)
        process = started(folder, "-m", "dora_vl.cli", "train", "run.yaml", "--overwrite=true")
    assert process.stderr is not None
    lines: list[str] = []
    for text in process.stderr:
        lines.append(text)
        if after in text:
            process.send_signal(number)
            break
    lines += process.stderr.readlines()
    assert process.wait(300) == 128 + number, lines
    assert not any("Traceback" in text for text in lines)
    assert sum("stopped by" in text for text in lines) == 1
