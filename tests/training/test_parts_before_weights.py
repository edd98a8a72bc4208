"""A pattern or rate of a part that is not there ends a run before any weight is read, whatever the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep import generated_commonsense
from dora_vl.errors import UserError
from dora_vl.run.reading import read_settings
from dora_vl.run.settings import CommonsenseRunConfig, RunConfig, VlBartRunConfig
from dora_vl.training.decoder_pipeline import CommonsensePipeline, DecoderPipeline
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.run import train
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.backbones.tiny_language import write_tiny_language
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import all_subtasks, write_vlbart_data, write_vlbart_run


def llava(folder: Path, changes: dict[str, Any]) -> Pipeline:
    base = write_tiny_llava(folder / "base")
    path = write_run(folder / "run.yaml", base, write_tiny_data(folder / "data"), **changes)
    return DecoderPipeline(read_settings(["--config", str(path)], RunConfig))


def commonsense(folder: Path, changes: dict[str, Any]) -> Pipeline:
    write_tiny_language(folder / "base")
    generated_commonsense.main(["--to", str(folder / "data")])
    sections = {
        "model": {"base": str(folder / "base"), "dtype": "float32"},
        "data": {"train": [str(folder / "data" / "train.json")]},
        "training": {"output_dir": str(folder / "run")},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**sections, **changes}))
    return CommonsensePipeline(read_settings(["--config", str(path)], CommonsenseRunConfig))


def vlbart(folder: Path, changes: dict[str, Any]) -> Pipeline:
    path = write_vlbart_run(folder / "run.yaml", write_vlbart_data(folder / "data"), ("vqav2",), **changes)
    return VlBartPipeline(read_settings(["--config", str(path)], VlBartRunConfig), all_subtasks(), name="tiny")


@pytest.mark.parametrize("make", [llava, commonsense, vlbart], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"targets": ["*.nosuch_proj"]}},
        {"adapter": {"also_train": {"norms": ["*.norrm.*"]}}},
        {"adapter": {"parts": {"eyes": {"targets": ["*.eyes.*"]}}}},
        {"optim": {"rates": {"dorra": 1e-4}}},
    ],
    ids=["targets", "also_train", "parts", "rates"],
)
def test_no_weight_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path, dict[str, Any]], Pipeline],
    changes: dict[str, Any],
) -> None:
    task = make(tmp_path, changes)
    monkeypatch.setattr(task, "load", lambda: pytest.fail("weights are read"))
    with pytest.raises(UserError):
        train(task)
    assert not list(tmp_path.rglob("settings.json")), "the run has no folder yet that would be in a second try's way"
