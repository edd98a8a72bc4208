"""Runs to report on, trained once: two of a tiny LLaVA with validation and a test, one of a tiny VL-BART."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dora_vl.run.settings_parser import read_run, read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import write_vlbart_data, write_vlbart_run

HOSTILE = '<script>alert(1)</script>"><img src=http://evil.example/x.png onerror=alert(2)>'


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="session")
def llava_settings(root: Path) -> Path:
    base, records = write_tiny_llava(root / "base"), write_tiny_data(root / "data")
    evaluation = {"file": str(records), "batch_size": 16, "max_new_tokens": 3, "limit": 24}
    changes: dict[str, Any] = {
        "training": {"use_cpu": True, "eval_strategy": "steps", "eval_steps": 2, "optim": "sgd"},
        "data": {"validation": str(records), "validation_limit": 9},
        "adapter": {"method": "dora"},
        "evaluation": evaluation,
    }
    return write_run(root / "first.yaml", base, records, **changes)


def trained(settings: Path, folder: Path, *overrides: str) -> Path:
    assert run(DecoderPipeline(read_run_file(settings, f"--training.output_dir={folder}", *overrides))) is None
    return folder


@pytest.fixture(scope="session")
def llava_run(llava_settings: Path, root: Path) -> Path:
    return trained(llava_settings, root / "first")


@pytest.fixture(scope="session")
def other_run(llava_settings: Path, root: Path) -> Path:
    return trained(llava_settings, root / "second", "--adapter.method=lora", "--training.learning_rate=0.2")


@pytest.fixture(scope="session")
def vlbart_run(root: Path) -> Path:
    data, tasks = write_vlbart_data(root / "vlbart"), ("vqav2", "tvqa")
    files = {task: str(data / "records" / f"{task}.jsonl") for task in tasks}
    settings = write_vlbart_run(
        root / "bart.yaml", data, tasks, evaluation={"files": files}, training={"use_cpu": True}
    )
    config = read_run([f"--config={settings}"])
    assert run(VlBartPipeline(config)) is None
    return root / "bart"


@pytest.fixture
def copied(llava_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava_run, tmp_path / "copied"))
