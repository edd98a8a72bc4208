"""Fixtures: the tiny model and data, made once a session."""

from functools import partial
from pathlib import Path

import pytest

from tests.training.tiny_run import MakeRun, write_run, write_tiny_data, write_tiny_llava


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_run(tmp_path: Path, tiny_llava: Path, tiny_data: Path) -> MakeRun:
    return partial(write_run, tmp_path / "run.yaml", tiny_llava, tiny_data)


@pytest.fixture
def run_file(make_run: MakeRun) -> Path:
    return make_run(training={"use_cpu": True})
