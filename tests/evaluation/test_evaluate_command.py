"""A run's test and `dora-vl evaluate`: any batch size and number of processes give the same score."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_vl.cli import main
from dora_vl.data.example import Answer, Clip, Example, write_examples
from dora_vl.data.turns import Turn
from dora_vl.evaluation.ask_command import open_picture
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictions import Prediction, read_predictions
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.evaluation.test_sets import score_lines
from dora_vl.run.settings import RunConfig
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

ROOT = Path(__file__).parents[2]
ANSWER_TOKENS = 5
PARTS = {"accuracy": 24, "kind/even": 12, "kind/odd": 12}
Tested = tuple[RunConfig, Path]


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Tested:
    """A run of a few steps, tested on its own questions, one with a broken picture; its settings and folder."""
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
        training={"use_cpu": True, "max_steps": 2, "warmup_steps": 0},
        evaluation={"file": str(folder / "test.json"), "batch_size": 5, "max_new_tokens": 4},
    )
    config = read_run_file(path)
    assert run(DecoderPipeline(config)) is None
    return config, folder / "run"


@pytest.fixture(scope="module")
def trained(tested: Tested, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny adapter, questions in LLaVA's format (one with a broken picture), and POPE records.

    The adapter is moved until answers differ from question to question; half of the questions take the model's own
    answer for the truth, so that the score is neither none nor all.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("llava", "data", "run"):
        shutil.copytree(tested[1].parent / name, folder / name)
    weights, random = folder / "run" / "adapter" / "adapter_model.safetensors", torch.Generator().manual_seed(1)
    tensors = load_file(weights)
    for tensor in (tensor for name, tensor in tensors.items() if "lora_B" in name):
        tensor += 0.5 * torch.randn(tensor.shape, generator=random)
    save_file(tensors, weights, metadata={"format": "pt"})
    rows = json.loads((folder / "data" / "train.json").read_text())
    model = open_model(ModelRequest(adapter=folder / "run" / "adapter")).adapted
    examples: list[Example] = []
    for number, row in enumerate(rows):
        row["kind"] = ("even", "odd")[number % 2]
        row["conversations"][0]["value"] += f" {chr(65 + number)} {number * 37}"
        if number % 2 == 0:
            shown = PromptMedia(pictures=(open_picture(folder / "data" / row["image"]),))
            question = Example(id="q", turns=(Turn("user", row["conversations"][0]["value"]),))
            answer = model.answer(question, shown, max_new_tokens=ANSWER_TOKENS).strip()
            row["conversations"][1]["value"] = answer
        if number == 5:
            row["image"] = "broken.png"
            continue
        truth = (Answer(text=("yes", "no")[number % 2]),)
        about = {"images": (row["image"],), "question": "Is it red?", "extra": {"category": "random"}}
        examples.append(Example(id=f"random-{number}", answers=truth, **about))
    (folder / "test.json").write_text(json.dumps(rows))
    write_examples(folder / "records" / "pope" / "test.jsonl", examples)
    return folder


def options_of(trained: Path, to: Path, *more: object) -> list[object]:
    return ["--adapter", trained / "run" / "adapter", "--images", trained / "data", "--to", to, *more]


def evaluate(capsys: Any, *words: object) -> list[str]:
    capsys.readouterr()
    main(["evaluate", *map(str, words)])
    return capsys.readouterr().out.splitlines()


def on_test_file(trained: Path, to: Path, *more: object) -> list[object]:
    questions = f"exact_match={trained / 'test.json'}"
    return options_of(trained, to, "--max-new-tokens", ANSWER_TOKENS, "--benchmarks", questions, *more)


def answers_in(folder: Path, name: str = "exact_match") -> dict[str, Prediction]:
    return read_predictions(folder / "predictions.jsonl")[name]


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["sets"]


@pytest.fixture(scope="module")
def alone(trained: Path) -> Path:
    main(["evaluate", *map(str, on_test_file(trained, trained / "alone", "--batch-size", 1))])
    return trained / "alone"


def right_of(entry: Mapping[str, Any], predictions: Mapping[str, Prediction]) -> int:
    """How many answers are right, once the entry of `metrics.json` says the same and names the one that failed."""
    right = sum(row.prediction == row.truth for row in predictions.values())
    assert (entry["n"], len(predictions), [*entry["failed"]]) == (24, 23, ["sample-5"])
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(100 * right / 24)
    low, high = entry["metrics"]["accuracy"]["interval_95"]
    assert low <= 100 * right / 24 <= high
    assert {name: metric["n"] for name, metric in entry["metrics"].items()} == PARTS
    return right


def test_metrics_agree_whatever_the_batch_size(trained: Path, alone: Path, tmp_path: Path, capsys: Any) -> None:
    predictions = answers_in(alone)
    right = right_of(metrics_of(alone)["exact_match"], predictions)
    assert sum(line["share"] for line in score_lines(alone)) == right
    assert 12 <= right < 20
    assert len({row.prediction for row in predictions.values()}) > 2  # equal answers would prove nothing below
    lines = evaluate(capsys, *on_test_file(trained, tmp_path, "--batch-size", 32, "--workers", 2))
    assert_same_answers(tmp_path, alone)
    assert lines[1].split()[:2] == ["exact_match", "accuracy"]
    assert lines[1].split()[-2:] == ["24", "1"]


def assert_same_answers(first: Path, other: Path) -> None:
    numbers, others = metrics_of(first)["exact_match"], metrics_of(other)["exact_match"]
    for name in ("seconds", "asked_with", "answers_from_earlier_run"):
        assert numbers.pop(name) is not None
        del others[name]
    assert numbers == others
    for file in ("predictions.jsonl", "scores.jsonl"):
        assert (first / file).read_text() == (other / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_processes_give_the_same(trained: Path, alone: Path, tmp_path: Path, launcher: str) -> None:
    start = {
        "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29651", "-m"],
        "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29652", "--module"],
    }[launcher]
    words = map(str, on_test_file(trained, tmp_path, "--batch-size", 4))
    command = [sys.executable, "-m", *start, "dora_vl.cli", "evaluate", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_answers(tmp_path, alone)
    assert not list(tmp_path.glob("*part*"))
    assert done.stdout.count("exact_match  accuracy") == 1  # one process speaks


@pytest.fixture
def question_ids(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ids: list[str] = []
    predict = Assistant.predict

    def counting(self: Assistant, questions: Any, *more: Any) -> Any:
        ids.extend(question.id for question in questions)
        return predict(self, questions, *more)

    monkeypatch.setattr(Assistant, "predict", counting)
    return ids


def test_answers_of_another_base_or_of_other_pictures_are_not_taken_over(
    trained: Path, tmp_path: Path, capsys: Any, question_ids: list[str]
) -> None:
    def count(*more: object) -> int:
        question_ids.clear()
        evaluate(capsys, *on_test_file(trained, tmp_path / "to", "--limit", 4, "--no-exchange", *more))
        return len(question_ids)

    for name, source in {"moved": "llava", "other": "llava", "pictures": "data"}.items():
        shutil.copytree(trained / source, tmp_path / name)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "other" / "model.safetensors")
    assert count() == 4
    assert count("--base", tmp_path / "moved") == 0  # the same content at another place
    assert count("--any-base") == 0
    assert count("--base", tmp_path / "other", "--any-base") == 4
    assert count() == 4
    assert count("--images", tmp_path / "pictures") == 4
    assert count("--images", tmp_path / "pictures" / ".." / "pictures") == 0


def test_against_itself_nothing_differs(trained: Path, alone: Path, tmp_path: Path, capsys: Any) -> None:
    truth = tmp_path / "truth.jsonl"
    answered = answers_in(alone)
    truth.write_text("".join(json.dumps({"id": row.id, "answer": row.truth}) + "\n" for row in answered.values()))
    lines = evaluate(capsys, *on_test_file(trained, alone, "--against", truth))
    assert "difference" in lines[0]
    difference = metrics_of(alone)["exact_match"]["difference"]["accuracy"]
    own = metrics_of(alone)["exact_match"]["metrics"]["accuracy"]["value"]
    assert difference["value"] == pytest.approx(own - 100 * 23 / 24)
    assert difference["low"] <= difference["value"] <= difference["high"]
    evaluate(capsys, *on_test_file(trained, tmp_path / "again", "--against", trained / "run" / "adapter", "--limit", 6))
    same = metrics_of(tmp_path / "again")["exact_match"]["difference"]["accuracy"]
    assert same["value"] == 0
    assert same["low"] == -same["high"] < 0, "six questions that agree say little: Wilson's interval, not a point"
    assert (tmp_path / "again/against/predictions.jsonl").is_file()


def test_fewer_processes_than_none_are_refused_before_a_model_is_read(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--benchmarks", "pope", "--model", "gone", "--to", "gone", "--workers", "-1"])
    assert "--workers" in capsys.readouterr().err.splitlines()[-1]


def test_records_are_found_by_name_and_asked_with_llavas_words(trained: Path, tmp_path: Path, capsys: Any) -> None:
    records = ["--max-new-tokens", 2, "--records", trained / "records", "--benchmarks", "pope"]
    evaluate(capsys, *options_of(trained, tmp_path, *records, "--limit", 7))
    entry = metrics_of(tmp_path)["pope"]
    assert (entry["n"], entry["headline"]) == (7, "f1")
    assert entry["settings"]["labels"] == "7 random"
    (first, *_) = answers_in(tmp_path, "pope").values()
    assert first.question == "Is it red?\nAnswer the question using a single word or phrase."
    evaluate(capsys, *options_of(trained, tmp_path, *records))  # the rest; the first seven are not asked again
    assert metrics_of(tmp_path)["pope"]["n"] == 23


def test_a_missing_video_is_named_and_seeds_show_their_middle_frame(trained: Path, tmp_path: Path, capsys: Any) -> None:
    picture = json.loads((trained / "test.json").read_text())[0]["image"]
    clip = {"videos": (Clip(path="v.mp4"),), "question": "?", "choices": ("a", "b", "c", "d")}
    frames = {"there": picture, "gone": "SEED-Bench-video-image/9_1.png"}
    extras = {name: {"correct": 0, "data_type": "video", "middle_frame": frame} for name, frame in frames.items()}
    write_examples(tmp_path / "seed.jsonl", (Example(id=name, extra=extra, **clip) for name, extra in extras.items()))
    write_examples(tmp_path / "how2qa.jsonl", [Example(id="q1", extra={"correct": 0}, **clip)])
    benchmarks = ",".join(f"{name}={tmp_path / name}.jsonl" for name in ("how2qa", "seed"))
    evaluate(capsys, *options_of(trained, tmp_path, "--benchmarks", benchmarks, "--max-new-tokens", 2))
    metrics = metrics_of(tmp_path)
    assert metrics["how2qa"]["failed"].keys() == {"q1"}
    assert metrics["how2qa"]["metrics"]["accuracy"]["value"] == 0.0
    (answered,) = answers_in(tmp_path, "seed").values()
    assert (answered.id, answered.images) == ("there", [picture])
    assert metrics["seed"]["failed"].keys() == {"gone"}
    assert metrics["seed"]["bootstrap"]["units"] == 1  # two questions about one video


def test_a_run_s_metrics_agree_with_its_predictions_and_testing_again_asks_only_what_failed(tested: Tested) -> None:
    config, folder = tested
    entry, own = metrics_of(folder)["test"], answers_in(folder, "test")
    right_of(entry, own)
    for name in ("loss_curve.png", "contact_sheet.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    others = answers_in(folder, "test/exchanged_pictures")
    assert others.keys() == own.keys()
    assert all(others[name].images != own[name].images for name in own)
    right = sum(row.prediction == row.truth for row in others.values())
    assert entry["baselines"]["exchanged_pictures"]["value"] == pytest.approx(100 * right / 23)
    changed = sum(row.prediction.strip() != own[name].prediction.strip() for name, row in others.items())
    assert entry["baselines"]["exchanged_pictures"]["changed"] == changed
    of_base = answers_in(folder, "test/untrained_base")
    assert of_base.keys() == own.keys()
    assert any(of_base[name].prediction != own[name].prediction for name in own)  # the adapter is not in it
    right, part = sum(row.prediction == row.truth for row in of_base.values()), entry["baselines"]["untrained_base"]
    assert (part["n"], part["value"]) == (24, pytest.approx(100 * right / 24))  # one picture is broken
    assert part["with_the_adapter"] == pytest.approx(entry["metrics"]["accuracy"]["value"])
    DecoderPipeline(config).test({})
    again = metrics_of(folder)["test"]
    assert again["answers_from_earlier_run"] == 23
    assert (again["metrics"], again["baselines"]) == (entry["metrics"], entry["baselines"])
    without = dataclasses.replace(config.evaluation, exchange_pictures=False, untrained=False)
    DecoderPipeline(dataclasses.replace(config, evaluation=without)).test({})
    assert metrics_of(folder)["test"]["baselines"].keys() == {"metric", "commonest_answer"}
