"""A vision-language model that is no LLaVA through the scripts: trained, resumed, merged, asked, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dora_vl import cli
from dora_vl.backbones.encoder import Encoder
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import COLOURS, write_run, write_tiny_data

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


def losses(run_folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_stored_outputs_train_like_pixels(there: Path) -> None:
    for name in ("pixels", "stored"):
        data: dict[str, object] = {"cache_features": name == "stored"}
        run(DecoderPipeline(read_run_file(settings(there, name, data=data, training={"max_steps": 4}))))
    assert losses(there / "stored") == pytest.approx(losses(there / "pixels"), abs=1e-5)
    assert list((there / "stored" / "features").rglob("outputs-*.safetensors"))


def rows_with_system(there: Path, form: str) -> Path:
    """The data once more, each row with a system text, as messages or beside ShareGPT's talk."""
    rows = json.loads((there / "data" / "train.json").read_text())
    for row in rows if form == "messages" else ():
        asked, said = (turn["value"] for turn in row.pop("conversations"))
        talk = [("system", "Be brief."), ("user", asked), ("assistant", said)]
        row["messages"] = [{"role": role, "content": text} for role, text in talk]
        row["images"] = [row.pop("image")] if "image" in row else []
    path = there / "data" / f"{form}.json"
    path.write_text(json.dumps(rows if form == "messages" else [{**row, "system": "Be brief."} for row in rows]))
    return path


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_rows_with_a_system_turn_train(there: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    encode = Encoder.encode

    def noted(encoder: Encoder, *given: Any) -> Any:
        found = encode(encoder, *given)
        labelled = found.labels[found.labels != IGNORED_LABEL]
        seen.append((encoder.tokenizer.decode(found.input_ids), encoder.tokenizer.decode(labelled)))
        return found

    monkeypatch.setattr(Encoder, "encode", noted)
    data: dict[str, object] = {"train": str(rows_with_system(there, form))}
    path = settings(there, form, data=data, training={"max_steps": 2, "save_strategy": "no"})
    run(DecoderPipeline(read_run_file(path)))
    assert len(losses(there / form)) == 2
    assert len(seen) >= 8
    for text, answer in seen:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert answer.partition(" ")[0].removesuffix("<|im_end|>") in COLOURS
    log = [json.loads(line) for line in (there / form / "log.jsonl").read_text().splitlines()]
    assert {line["skipped"] for line in log if "skipped" in line} == {0}


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
        ("model", "template", "plain"),
        ("model", "image_aspect", "square"),
    ],
)
def test_settings_of_the_llava_path_are_refused(there: Path, section: str, setting: str, value: object) -> None:
    task = DecoderPipeline(read_run_file(settings(there, "refused", **{section: {setting: value}})))
    with pytest.raises(UserError):
        run(task)


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


@pytest.mark.parametrize(("written", "folder"), [("[]", "data"), (None, "data"), ("whole", "empty")])
def test_a_wrong_test_ends_a_run_before_weights_are_read(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None, folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    questions = tmp_path / "questions.json"
    if written is not None:
        questions.write_text((there / "data" / "train.json").read_text() if written == "whole" else written)
    pictures = there / "data" if folder == "data" else tmp_path / folder
    evaluation = {"file": str(questions), "image_folder": str(pictures)}
    records = there / "data" / "train.json"
    path = write_run(tmp_path / "run.yaml", there / "base", records, training=CPU, evaluation=evaluation)
    monkeypatch.setattr(DecoderPipeline, "load", lambda self: pytest.fail("weights are read"))
    with pytest.raises(UserError):
        run(DecoderPipeline(read_run_file(path)))
