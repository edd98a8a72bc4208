"""A tiny run is trained and tested: metrics, predictions and pictures are there and agree with each other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.errors import UserError
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.test import evaluate_run
from dora_vl.run.reading import read_run_file
from dora_vl.run.settings import RunConfig
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a few steps, tested on its own training questions, one of which has a broken picture."""
    folder = tmp_path_factory.mktemp("tested")
    base, records = write_tiny_llava(folder / "llava"), write_tiny_data(folder / "data", samples=24)
    questions = json.loads(records.read_text())
    for number, question in enumerate(questions):
        question["kind"] = ("even", "odd")[number % 2]
    (folder / "data" / "broken.png").write_bytes(b"no picture")
    questions[5]["image"] = "broken.png"
    (folder / "test.json").write_text(json.dumps(questions))
    path = write_run(
        folder / "run.yaml",
        base,
        records,
        training={"use_cpu": True},
        evaluation={"file": str(folder / "test.json"), "batch_size": 5, "max_new_tokens": 4},
    )
    config = read_run_file(path)
    assert run(DecoderPipeline(config)) is None
    return config


def output(config: RunConfig) -> Path:
    return Path(config.training["output_dir"])


def metrics_of(config: RunConfig) -> dict[str, Any]:
    return json.loads((output(config) / "metrics.json").read_text())


def test_metrics_agree_with_the_predictions_and_count_what_failed(tested: RunConfig) -> None:
    metrics, predictions = metrics_of(tested), read_predictions(output(tested) / "predictions.jsonl")
    right = sum(one.prediction == one.truth for one in predictions.values())
    assert (metrics["n"], len(predictions), metrics["unanswered"]) == (24, 23, 1)
    assert metrics["accuracy"] == pytest.approx(right / 24)
    assert list(metrics["failed_questions"]) == ["sample-5"]
    assert {kind: part["n"] for kind, part in metrics["by_kind"].items()} == {"even": 12, "odd": 12}
    assert metrics["train_seconds"] > 0
    assert metrics["samples_per_second"] > 0
    low, high = metrics["interval_95"]
    assert low <= metrics["accuracy"] <= high


def test_the_same_questions_are_asked_about_others_pictures(tested: RunConfig) -> None:
    entry, own = metrics_of(tested)["baselines"], read_predictions(output(tested) / "predictions.jsonl")
    others = read_predictions(output(tested) / "predictions_exchanged.jsonl")
    assert others.keys() == own.keys()
    assert all(others[name].images != own[name].images for name in own)
    right = sum(one.prediction == one.truth for one in others.values())
    assert entry["exchanged_pictures"]["value"] == pytest.approx(100 * right / 23)
    assert "warning" in entry  # a few steps of a tiny model teach it nothing
    again = DecoderPipeline(tested).test({})
    assert metrics_of(tested)["baselines"] == entry
    without = dataclasses.replace(tested.evaluation, exchange_pictures=False)
    found = DecoderPipeline(dataclasses.replace(tested, evaluation=without)).test({})
    assert found["baselines"].keys() == {"metric", "commonest_answer"}
    assert found["accuracy"] == again["accuracy"]


def test_the_pictures_are_drawn(tested: RunConfig) -> None:
    for name in ("loss_curve.png", "contact_sheet.png"):
        assert (output(tested) / name).read_bytes().startswith(b"\x89PNG")


def test_testing_again_asks_only_what_failed(tested: RunConfig) -> None:
    before = metrics_of(tested)
    again = DecoderPipeline(tested).test({})
    assert again["answers_from_earlier_run"] == 23
    assert again["accuracy"] == before["accuracy"]
    fewer = dataclasses.replace(tested, evaluation=dataclasses.replace(tested.evaluation, limit=4))
    assert DecoderPipeline(fewer).test({})["n"] == 4


def test_without_a_question_file_or_an_adapter_it_says_so(tested: RunConfig, tmp_path: Path) -> None:
    nothing = dataclasses.replace(tested.evaluation, file=None)
    options: dict[str, Any] = {"run_folder": tmp_path, "media": None}
    with pytest.raises(UserError):
        evaluate_run(None, nothing, **options)
    with pytest.raises(UserError):
        evaluate_run(None, tested.evaluation, **options)
