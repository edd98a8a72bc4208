"""What a run tells of itself: a bar, fixed questions whose answers change, validation, and sums that go on."""

import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.errors import UserError
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.evaluation.questions import read_questions
from dora_vl.run.folder import read_watched
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.callbacks import RunProgress, WatchQuestions, read_log
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.opened import encoder_of
from tests.training.launched import launch
from tests.training.tiny_run import (
    MakeRun,
    json_of,
    logged,
    logged_losses,
    skipped_by,
    trained,
    write_run,
    write_tiny_data,
)


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
    watched: Any = read_watched(folder)
    assert sorted(watched.answers) == [0, 3, 6]
    assert len(watched.questions) == 4
    config = read_run_file(run_file)
    pipeline = DecoderPipeline(config)
    backbone, _ = with_adapter(pipeline.load(), folder / "adapter")
    assistant = Assistant(backbone, encoder_of(config, thinking=None))
    by_id = {row.id: row for row in read_questions(Path(str(config.data.train)))[0]}
    for entry in watched.questions:
        question = by_id[entry.id]
        picture = Image.open(Path(config.data.image_folder) / question.images[0]).convert("RGB")
        assert (
            assistant.answer(question, PromptMedia(pictures=(picture,)), max_new_tokens=3)
            == watched.answers[6][entry.id]
        )
        assert (entry.truth, entry.question) == (question.answers[0].text, question.question)
        with Image.open(folder / "watched" / entry.picture) as kept:
            assert kept.tobytes() == picture.tobytes()
    assert watched.answers[0] != watched.answers[6]


def test_an_answer_is_written_alike_by_a_run_and_by_its_resume(tmp_path: Path) -> None:
    watch: Any = SimpleNamespace(ask=lambda: {"a": "grün"}, questions=(), pictures={}, source="test.json")
    arguments, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState()
    model = torch.nn.Linear(1, 1)
    WatchQuestions(watch, tmp_path).on_train_begin(arguments, state, TrainerControl(), model=model)
    written = (file := tmp_path / "watched" / "answers.jsonl").read_text(encoding="utf-8")
    state.global_step = 1
    WatchQuestions(watch, tmp_path).on_train_begin(arguments, state, TrainerControl(), model=model)
    assert file.read_text(encoding="utf-8") == written
    assert "grün" in written


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
        run_file, f"--evaluation.file={records}", "--training.max_steps=12", "--data.cache_features=true", name="run"
    )
    assert [line["step"] for line in answers(folder)] == [0, 3, 5, 8, 10, 12]
    assert json_of(folder / "watched" / "questions.json")["source"] == records
    nothing = trained(run_file, name="nothing")
    assert not (nothing / "watched").exists()


def test_a_picture_that_cannot_be_read_leaves_its_question_out(run_file: Path, tmp_path: Path) -> None:
    records = json_of(Path(str(read_run_file(run_file).data.train)))[:3]
    held_out = [{**record, "id": f"held-{number}"} for number, record in enumerate(records)]
    held_out[1]["image"] = "nowhere.png"
    (tmp_path / "held_out.json").write_text(json.dumps(held_out))
    folder = trained(run_file, f"--data.validation={tmp_path / 'held_out.json'}", name="run")
    watched: Any = read_watched(folder)
    assert [bool(question.picture) for question in watched.questions] == [True, False, True]
    assert "nowhere.png" in watched.questions[1].why_no_picture
    assert all(set(answered) == {"held-0", "held-2"} for answered in watched.answers.values())


def test_rates_by_part_and_memory_are_in_the_log(run_file: Path) -> None:
    counted = "--training.include_num_input_tokens_seen=all"  # with which every line tells the time, as the last does
    lines = read_log(trained(run_file, "--optim.b_learning_rate_ratio=4", counted, name="run") / "log.jsonl")
    line = next(line for line in lines if line["step"] == 3)
    assert line["learning_rate/dora.A"] == line["learning_rate"] > 0
    assert line["learning_rate/dora.B"] == pytest.approx(4 * line["learning_rate/dora.A"])
    assert line["learning_rate/projector"] == pytest.approx(line["learning_rate/dora.A"] * 1e-3 / 0.05)
    assert 0.05 < line["memory_gib"] < 64
    plan = json_of(run_file.parent / "run" / "plan.json")
    assert [row[0] for row in plan["trained"]["rows"]][:3] == ["dora.A", "dora.B", "dora.magnitude"]


class Terminal(io.TextIOWrapper):
    """What is written to it is on a screen."""

    mode, name = "w", "terminal"

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.screen = pyte.Screen(120, 40)
        self._stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]


def test_lines_go_above_the_bar_and_the_last_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, logger = Terminal(), logging.getLogger("a.library")
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger.addHandler(handler)
    progress = RunProgress(Console(file=terminal, width=120, force_terminal=True, force_interactive=True))
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=8, global_step=0)
    try:
        progress.on_train_begin(arguments, state, control)
        for step in range(1, 9):
            state.global_step = step
            progress.on_step_end(arguments, state, control)
            numbers = {"loss": 1 / step, "grad_norm": 1.25, "samples_per_second": 12.34, "memory_gib": 2.5}
            progress.on_log(arguments, state, control, logs=numbers)
            logger.warning("from a logger at %d", step)
        progress.close()
    finally:
        logger.removeHandler(handler)
    *above, bar = terminal.lines
    assert above == [f"from a logger at {step}" for step in range(1, 9)]
    for words in ("8/8", "loss 0.1250", "12.3 samples/s", "2.50 GiB", "so far", "left"):
        assert words in bar
    assert handler.stream is sys.stderr is terminal
    assert not terminal.screen.cursor.hidden


SAME = ("train_samples", "train_steps", "padding_share", "skipped_samples")
ON_CPU = "--training.use_cpu=true"


@pytest.fixture
def with_bad_samples(tmp_path: Path, tiny_llava: Path) -> Path:
    """In file order, one bad sample before the checkpoint and one after it, on different ranks where there are two."""
    data = write_tiny_data(tmp_path / "data", samples=48)
    for name in ("red-0.png", "green-45.png"):
        (data.parent / name).unlink()
    records = [{**row, "id": f"held-{row['id']}"} for row in json.loads(data.read_text())[10:16]]
    records[2]["image"] = "none.png"
    (held_out := data.parent / "held.json").write_text(json.dumps(records))
    steps = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    return write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        data,
        data={"max_bad_share": 0.2, "group_by_modality_length": False, "validation": str(held_out)},
        training={**steps, "train_sampling_strategy": "sequential"},
    )


def numbers(folder: Path) -> dict[str, Any]:
    metrics = json_of(folder / "metrics.json")
    return {name: metrics[name] for name in SAME}


def check(whole: Path, resumed: Path) -> None:
    assert set(skipped_by(whole)) == {"sample-0", "sample-45", "held-sample-12"}
    assert skipped_by(resumed) == skipped_by(whole)
    assert numbers(resumed) == numbers(whole)
    assert numbers(whole)["skipped_samples"] == 2
    progress, metrics = json_of(whole / "checkpoint-6" / "progress.json"), json_of(resumed / "metrics.json")
    assert list(progress["skipped"]) == ["sample-0"]
    assert metrics["train_seconds"] >= round(progress["seconds"], 1) > 0
    assert metrics["samples_per_second"] == pytest.approx(metrics["train_samples"] / metrics["train_seconds"], rel=0.1)


def test_a_resumed_run_ends_with_the_sums_of_a_whole_one(with_bad_samples: Path) -> None:
    whole = trained(with_bad_samples, ON_CPU, name="whole")
    check(whole, trained(with_bad_samples, ON_CPU, f"--resume={whole / 'checkpoint-6'}", name="resumed"))
    names = ("metrics.json", "skipped.jsonl", "adapter/adapter_model.safetensors")
    before, losses = [(whole / name).read_bytes() for name in names], logged_losses(whole)
    trained(with_bad_samples, ON_CPU, "--resume=last", name="whole")  # which takes no further step
    assert [(whole / name).read_bytes() for name in names] == before
    assert logged_losses(whole) == losses
    expected, skipped = numbers(whole), skipped_by(whole)
    (whole / "metrics.json").unlink()  # as if it had been stopped at its last step
    (whole / "skipped.jsonl").unlink()
    trained(with_bad_samples, ON_CPU, "--resume=last", name="whole")
    assert (numbers(whole), skipped_by(whole)) == (expected, skipped)


@pytest.mark.slow
def test_two_ranks_carry_over_what_both_skipped(with_bad_samples: Path) -> None:
    whole, resumed = with_bad_samples.parent / "whole", with_bad_samples.parent / "resumed"
    options = ("--training.deepspeed=zero2", "--training.per_device_train_batch_size=2")
    for folder, more in ((whole, ()), (resumed, (f"--resume={whole / 'checkpoint-6'}",))):
        launch(with_bad_samples, *options, f"--training.output_dir={folder}", *more, ranks=2)
    check(whole, resumed)


@pytest.fixture
def llava_run(tmp_path: Path, tiny_llava: Path) -> Path:
    """Seven validation samples in batches of two; the first two have no picture."""
    data = write_tiny_data(tmp_path / "data", samples=16)
    rows = [{**row, "id": f"held-{number}"} for number, row in enumerate(json_of(data)[:7])]
    for row in rows[:2]:
        row["image"] = "none.png"
    data.with_name("held.json").write_text(json.dumps(rows))
    return write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        data,
        data={"validation": str(data.with_name("held.json")), "group_by_modality_length": False},
        training={"per_device_eval_batch_size": 2, "max_steps": 2},
    )


def test_a_llava_batch_without_usable_samples_is_not_in_the_mean(llava_run: Path) -> None:
    rows, results = json_of(llava_run.parent / "data" / "held.json"), []
    for name, kept in (("run", rows), ("whole", rows[2:])):
        (held := llava_run.with_name(f"{name}.json")).write_text(json.dumps(kept))
        folder = trained(llava_run, ON_CPU, f"--data.validation={held}", name=name)
        results += logged(folder, "eval_loss")
    result, expected = results
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], abs=2e-2)  # batches differ: means of token means
    assert (result["eval_samples"], result["eval_skipped"]) == (5, 2)
    assert set(skipped_by(llava_run.parent / "run")) == {"held-0", "held-1"}
    (nothing := llava_run.with_name("nothing.json")).write_text(json.dumps(rows[:2]))
    with pytest.raises(UserError):
        trained(llava_run, ON_CPU, f"--data.validation={nothing}", name="nothing")


@pytest.mark.slow
def test_two_ranks_find_the_loss_of_one(llava_run: Path) -> None:
    """Seven samples are no whole number of steps of two ranks; none may count twice."""
    entries = []
    for ranks in (1, 2):
        folder = llava_run.parent / f"ranks-{ranks}"
        settings = (f"--training.output_dir={folder}", "--training.deepspeed=zero2")
        launch(llava_run, *settings, f"--training.gradient_accumulation_steps={2 // ranks}", ranks=ranks)
        assert set(skipped_by(folder)) == {"held-0", "held-1"}
        entries += logged(folder, "eval_loss")
    single, two = entries
    assert two["eval_loss"] == pytest.approx(single["eval_loss"], abs=1e-5)
    assert (two["eval_samples"], two["eval_skipped"]) == (5, 2)
