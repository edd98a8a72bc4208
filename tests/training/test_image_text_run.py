"""A vision-language model that is no LLaVA through the scripts: trained, resumed, merged, asked, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from dora_vl import cli
from dora_vl.errors import SettingError, UserError
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import write_run, write_tiny_data

CPU: dict[str, object] = {"use_cpu": True, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL, and data in which every second block of four samples has no picture."""
    folder = tmp_path_factory.mktemp("any-model")
    write_tiny("qwen2_5_vl", folder / "base")
    write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    return folder


def settings(there: Path, name: str, **changes: dict[str, object]) -> Path:
    training = {**CPU, **changes.pop("training", {})}
    return write_run(
        there / f"{name}.yaml", there / "base", there / "data" / "train.json", training=training, **changes
    )


@pytest.mark.parametrize("model_type", ["florence2", "blip-2", "llama4", "bert"])
def test_a_base_that_cannot_be_trained_ends_before_its_weights(tmp_path: Path, there: Path, model_type: str) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path / "base")  # and no weights
    path = write_run(tmp_path / "run.yaml", tmp_path / "base", there / "data" / "train.json", training=CPU)
    with pytest.raises(UserError):
        run(DecoderPipeline(read_run_file(path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("data", "share_pictures", True),
        ("model", "image_aspect", "square"),
    ],
)
def test_settings_of_the_llava_path_are_refused(there: Path, section: str, setting: str, value: object) -> None:
    task = DecoderPipeline(read_run_file(settings(there, "refused", **{section: {setting: value}})))
    with pytest.raises(SettingError) as error:
        run(task)
    assert error.value.key == f"{section}.{setting}"


@pytest.fixture(scope="module")
def tested(there: Path) -> Path:
    """A run that was tested on its own data by its settings, one picture of which is broken."""
    questions = json.loads((there / "data" / "train.json").read_text())
    pictured = [row for row in questions if "image" in row]
    for number, question in enumerate(questions):
        question["kind"] = ("even", "odd")[number % 2]
    (there / "data" / "broken.png").write_bytes(b"no picture")
    pictured[2]["image"] = "broken.png"
    (there / "test.json").write_text(json.dumps(questions))
    evaluation = {"file": str(there / "test.json"), "batch_size": 5, "max_new_tokens": 4}
    path = settings(there, "tested", training={"max_steps": 4}, evaluation=evaluation)
    assert run(DecoderPipeline(read_run_file(path))) is None
    return path


def test_its_settings_test_it_as_they_do_a_llava(there: Path, tested: Path) -> None:
    output = there / "tested"
    metrics = json.loads((output / "metrics.json").read_text())
    predictions = read_predictions(output / "predictions.jsonl")
    right = sum(one.prediction == one.truth for one in predictions.values())
    assert (metrics["n"], len(predictions), metrics["unanswered"]) == (24, 23, 1)
    assert metrics["accuracy"] == pytest.approx(right / 24)
    low, high = metrics["interval_95"]
    assert low <= metrics["accuracy"] <= high
    assert {kind: part["n"] for kind, part in metrics["by_kind"].items()} == {"even": 12, "odd": 12}
    (reason,) = metrics["failed_questions"].values()
    assert "broken.png" in reason
    assert metrics["train_seconds"] > 0
    for name in ("loss_curve.png", "contact_sheet.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    again = DecoderPipeline(read_run_file(tested)).test({})
    assert (again["answers_from_earlier_run"], again["accuracy"]) == (23, metrics["accuracy"])


def test_evaluate_gives_the_answers_of_the_run_s_own_test(there: Path, tested: Path, tmp_path: Path) -> None:
    adapter = there / "tested" / "adapter"
    options = ["--adapter", adapter, "--benchmarks", f"exact_match={there / 'test.json'}", "--images", there / "data"]
    cli.main(["evaluate", *map(str, options), "--to", str(tmp_path), "--max-new-tokens", "4", "--batch-size", "7"])
    theirs = read_predictions(tmp_path / "exact_match" / "predictions.jsonl")
    own = read_predictions(there / "tested" / "predictions.jsonl")
    assert {name: one.prediction for name, one in theirs.items()} == {n: one.prediction for n, one in own.items()}
    entry = json.loads((tmp_path / "metrics.json").read_text())["benchmarks"]["exact_match"]
    accuracy = json.loads((there / "tested" / "metrics.json").read_text())["accuracy"]
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(100 * accuracy)
