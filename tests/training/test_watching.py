"""Fixed questions through training: their answers are the model's, a resumed run has the same, and no loss changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dora_vl.evaluation.assistant import Assistant, EncoderPrompts
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.evaluation.predictor import Shown
from dora_vl.evaluation.questions import read_questions
from dora_vl.run.reading import read_run_file
from dora_vl.run.watched import read_watched, tiled
from dora_vl.training.callbacks import read_log
from dora_vl.training.decoder_pipeline import DecoderPipeline
from tests.training.tiny_run import MakeRun, json_of, logged_losses, trained

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run_file(make_run: MakeRun) -> Path:
    training = {"use_cpu": True, "learning_rate": 0.05}
    changes: dict[str, Any] = {"training": training, "evaluation": {"max_new_tokens": 3}, "adapter": {"dropout": 0.2}}
    return make_run(**changes)


def answers(folder: Path) -> list[dict[str, Any]]:
    return read_log(folder / "watched" / "answers.jsonl")


def validated(run_file: Path) -> list[str]:
    records = read_run_file(run_file).data.train
    return [f"--data.validation={records}", "--training.eval_strategy=steps", "--training.eval_steps=3"]


def test_the_last_answers_are_those_of_the_saved_adapter_and_no_loss_changes(run_file: Path) -> None:
    folder = trained(run_file, *validated(run_file))
    alone = trained(run_file, *validated(run_file), "--watch=0", name="alone")
    assert logged_losses(folder) == logged_losses(alone)
    assert not (alone / "watched").exists()
    watched = read_watched(folder)
    assert watched is not None
    assert sorted(watched.answers) == [0, 3, 6]
    assert len(watched.questions) == 4
    config = read_run_file(run_file)
    pipeline = DecoderPipeline(config)
    backbone, _ = with_adapter(pipeline.load(), folder / "adapter")
    assistant = Assistant(backbone, EncoderPrompts(pipeline.encoder))
    by_id = {row.id: row for row in read_questions(Path(str(config.data.train)))[0]}
    for entry in watched.questions:
        question = by_id[entry.id]
        picture = Image.open(Path(config.data.image_folder) / question.images[0]).convert("RGB")
        assert assistant.answer(question, Shown(pictures=(picture,)), max_new_tokens=3) == watched.answers[6][entry.id]
        assert (entry.truth, entry.question) == (question.answers[0].text, question.question)
        with Image.open(folder / "watched" / entry.picture) as kept:
            assert kept.tobytes() == picture.tobytes()
    assert watched.answers[0] != watched.answers[6]


@pytest.mark.slow
def test_a_resumed_run_has_the_answers_of_the_whole_one(run_file: Path) -> None:
    settings = [*validated(run_file), "--training.save_strategy=steps", "--training.save_steps=3"]
    whole = trained(run_file, *settings, name="whole")
    checkpoint = whole / "checkpoint-3"
    resumed = trained(run_file, *settings, f"--resume={checkpoint}", name="resumed")
    assert answers(resumed) == answers(whole)[2:]
    with (whole / "watched" / "answers.jsonl").open("a") as file:
        file.write('{"step": 7, "answ')  # of a crash
    expected = answers(whole)
    trained(run_file, *settings, f"--resume={checkpoint}", name="whole")
    assert answers(whole) == expected
    assert [line["step"] for line in expected] == [0, 3, 6]


@pytest.mark.slow
def test_without_validation_the_test_is_asked_now_and_then(run_file: Path) -> None:
    records = str(read_run_file(run_file).data.train)
    folder = trained(
        run_file, "run", f"--evaluation.file={records}", "--training.max_steps=12", "--data.cache_features=true"
    )
    assert [line["step"] for line in answers(folder)] == [0, 3, 5, 8, 10, 12]
    assert json_of(folder / "watched" / "questions.json")["source"] == records
    nothing = trained(run_file, name="nothing")
    assert not (nothing / "watched").exists()


def test_a_picture_that_cannot_be_read_leaves_its_question_out(run_file: Path, tmp_path: Path) -> None:
    records = json.loads(Path(str(read_run_file(run_file).data.train)).read_text())[:3]
    held_out = [{**record, "id": f"held-{number}"} for number, record in enumerate(records)]
    held_out[1]["image"] = "nowhere.png"
    (tmp_path / "held_out.json").write_text(json.dumps(held_out))
    folder = trained(run_file, f"--data.validation={tmp_path / 'held_out.json'}", name="run")
    watched = read_watched(folder)
    assert watched is not None
    assert [bool(question.picture) for question in watched.questions] == [True, False, True]
    assert "nowhere.png" in watched.questions[1].why_no_picture
    assert all(set(answered) == {"held-0", "held-2"} for answered in watched.answers.values())


def test_rates_by_part_and_memory_are_in_the_log(run_file: Path) -> None:
    lines = read_log(trained(run_file, "--optim.b_learning_rate_ratio=4", name="run") / "log.jsonl")
    line = next(line for line in lines if line["step"] == 3)
    assert line["learning_rate/dora.A"] == line["learning_rate"] > 0
    assert line["learning_rate/dora.B"] == pytest.approx(4 * line["learning_rate/dora.A"])
    assert line["learning_rate/projector"] == pytest.approx(line["learning_rate/dora.A"] * 1e-3 / 0.05)
    assert 0.05 < line["memory_gib"] < 64
    plan = json_of(run_file.parent / "run" / "plan.json")
    assert [row[0] for row in plan["trained"]["rows"]][:3] == ["dora.A", "dora.B", "dora.magnitude"]


def test_pictures_of_a_question_are_tiles_of_one() -> None:
    red, blue = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (8, 8), "blue")
    assert tiled([red]) is red
    tile = tiled([red, blue, red])
    assert tile.size == (10, 6)
    assert (tile.getpixel((0, 0)), tile.getpixel((7, 0))) == ((255, 0, 0), (0, 0, 255))
