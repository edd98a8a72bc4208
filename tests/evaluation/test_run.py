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

Tested = tuple[RunConfig, dict[str, Any]]


def output(config: RunConfig) -> Path:
    return Path(config.training["output_dir"])


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Tested:
    """A run of a few steps, tested on its own questions, one with a broken picture, and its metrics."""
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
    return config, json.loads((output(config) / "metrics.json").read_text())


def test_metrics_agree_with_the_predictions_and_testing_again_asks_only_what_failed(
    tested: Tested,
) -> None:
    config, metrics = tested
    predictions = read_predictions(output(config) / "predictions.jsonl")
    right = sum(one.prediction == one.truth for one in predictions.values())
    assert (metrics["n"], len(predictions), metrics["unanswered"]) == (24, 23, 1)
    assert metrics["accuracy"] == pytest.approx(right / 24)
    assert list(metrics["failed_questions"]) == ["sample-5"]
    assert {kind: part["n"] for kind, part in metrics["by_kind"].items()} == {"even": 12, "odd": 12}
    assert metrics["train_seconds"] > 0
    assert metrics["samples_per_second"] > 0
    low, high = metrics["interval_95"]
    assert low <= metrics["accuracy"] <= high
    for name in ("loss_curve.png", "contact_sheet.png"):
        assert (output(config) / name).read_bytes().startswith(b"\x89PNG")
    again = DecoderPipeline(config).test({})
    assert (again["answers_from_earlier_run"], again["accuracy"]) == (23, metrics["accuracy"])


def test_the_same_questions_are_asked_about_others_pictures(tested: Tested) -> None:
    config, metrics = tested
    entry, own = metrics["baselines"], read_predictions(output(config) / "predictions.jsonl")
    others = read_predictions(output(config) / "predictions_exchanged.jsonl")
    assert others.keys() == own.keys()
    assert all(others[name].images != own[name].images for name in own)
    right = sum(one.prediction == one.truth for one in others.values())
    assert entry["exchanged_pictures"]["value"] == pytest.approx(100 * right / 23)
    assert "warning" in entry  # a few steps of a tiny model teach it nothing
    assert json.loads(json.dumps(DecoderPipeline(config).test({})["baselines"])) == entry
    without = dataclasses.replace(config.evaluation, exchange_pictures=False)
    found = DecoderPipeline(dataclasses.replace(config, evaluation=without)).test({})
    assert found["baselines"].keys() == {"metric", "commonest_answer"}
    assert found["accuracy"] == metrics["accuracy"]


def test_without_a_question_file_or_an_adapter_it_says_so(tested: Tested, tmp_path: Path) -> None:
    own = tested[0].evaluation
    for evaluation in (dataclasses.replace(own, file=None), own):
        with pytest.raises(UserError):
            evaluate_run(None, evaluation, run_folder=tmp_path, media=None)  # pyright: ignore[reportArgumentType]
