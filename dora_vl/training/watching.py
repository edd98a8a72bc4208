"""Asks a run's fixed questions while it trains, keeps the answers and hands them to the trackers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_utils import IntervalStrategy

from dora_vl.data.pictures import PICTURE_FORMATS
from dora_vl.errors import BadSample, UserError
from dora_vl.training.live_view import Asked
from dora_vl.training.run_folder import WATCHED, read_log, write_json, write_log
from dora_vl.training.validation import random_state_kept

logger = logging.getLogger(__name__)

QUESTIONS, ANSWERS = "questions.json", "answers.jsonl"
SMALL_PX = 224
EXACT_PX = 128
"""Pictures up to this side are kept to the pixel, as PNG; larger ones are photographs, as JPEG."""
JPEG_QUALITY = 82
SIDE, GAP_PX, PAPER = 2, 2, (255, 255, 255)
TIMES_WITHOUT_VALIDATION = 5
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class WatchedQuestion:
    """One question; `picture` is the name of its small picture in the folder, "" where there is none."""

    id: str
    question: str
    truth: str
    picture: str = ""
    why_no_picture: str = ""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a pipeline has asked while it trains, in the order in which it is shown.

    Attributes:
        pictures: by question's id, what opens its picture; raises BadSample where it cannot be read.
        ask: the answers by id with the weights of now; every rank must call it. What cannot be asked is left out.
        source: where the questions are from, for messages.
    """

    questions: tuple[WatchedQuestion, ...]
    pictures: Mapping[str, Callable[[], Image.Image]]
    ask: Callable[[], Mapping[str, str]]
    source: str


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a run's folder holds of it; `answers` are by step and id."""

    folder: Path
    questions: tuple[WatchedQuestion, ...] = ()
    answers: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """So many of them, evenly from the first on; all where there are fewer."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _begin(run_folder: Path, watch: Watch, *, step: int) -> None:
    """Writes the questions and their pictures; of a resumed run the answers up to `step` stay."""
    folder = run_folder / WATCHED
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [line for line in read_log(folder / ANSWERS) if line["step"] <= step] if step else []
    questions = []
    for number, question in enumerate(watch.questions):
        if question.id in watch.pictures:
            try:
                picture = small_picture(watch.pictures[question.id]().convert("RGB"))
            except BadSample as error:
                question = replace(question, why_no_picture=error.reason)
            else:
                name = f"{number}.{'png' if max(picture.size) <= EXACT_PX else 'jpg'}"
                picture.save(folder / name, quality=JPEG_QUALITY)
                question = replace(question, picture=name)
        questions.append(asdict(question))
    write_json(folder / QUESTIONS, {"source": watch.source, "questions": questions})
    write_log(folder / ANSWERS, earlier)


def read_watched(run_folder: Path) -> Watched | None:
    """What a run's folder holds; None where nothing was asked, or its files cannot be read."""
    folder = run_folder / WATCHED
    try:
        content = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
        questions = tuple(WatchedQuestion(**question) for question in content["questions"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    lines = (line for line in read_log(folder / ANSWERS) if isinstance(line.get("answers"), dict) and "step" in line)
    return Watched(folder=folder, questions=questions, answers={line["step"]: line["answers"] for line in lines})


def small_picture(picture: Image.Image, most: int = SMALL_PX) -> Image.Image:
    """The picture, at most so many pixels wide and high."""
    return picture if max(picture.size) <= most else ImageOps.contain(picture, (most, most))


def tiled(pictures: Sequence[Image.Image]) -> Image.Image:
    """Up to four pictures as one, two by two, each in the size of the first; one alone as it is."""
    first, *others = pictures[: SIDE**2]
    if not others:
        return first
    width, height = first.size
    rows = -(-(1 + len(others)) // SIDE)
    tile = Image.new("RGB", (SIDE * width + GAP_PX, rows * height + (rows - 1) * GAP_PX), PAPER)
    for number, picture in enumerate([first, *others]):
        row, column = divmod(number, SIDE)
        fitted = picture if picture.size == first.size else ImageOps.pad(picture, first.size, color=PAPER)
        tile.paste(fitted, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return tile


def track_answers(callbacks: Sequence[TrainerCallback], watched: Watched, step: int) -> None:
    """Sends the answers of one step to TensorBoard, trackio and Weights & Biases, whose reporters know no pictures."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            _to_tensorboard(callback.tb_writer, watched, step)
        elif isinstance(callback, TrackioCallback):
            _as_table(callback._trackio, watched, step)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            _as_table(callback._wandb, watched, step)


def _to_tensorboard(writer: Any, watched: Watched, step: int) -> None:
    """A text for each question, which TensorBoard shows by step, and its picture once."""
    if writer is None:  # before training begins, or after its end
        return

    def indented(text: str) -> str:  # as a block of code in Markdown: a model's answer is shown, not followed
        return "\n".join(f"    {line}" for line in text.splitlines() or [""])

    answers = watched.answers[step]
    for number, question in enumerate(watched.questions):
        name = f"{WATCHED}/{number}"
        if question.id in answers:
            texts = question.question, answers[question.id], question.truth
            writer.add_text(name, "\n\n".join(map(indented, texts)), step)
        if step == min(watched.answers) and (picture := _picture(watched, question)) is not None:
            writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    writer.flush()


def _as_table(tracker: Any, watched: Watched, step: int) -> None:
    """One table; trackio takes Weights & Biases' calls."""
    answers, rows = watched.answers[step], []
    for question in watched.questions:
        if question.id in answers:
            picture = _picture(watched, question)
            shown = None if picture is None else tracker.Image(picture)
            rows.append([shown, question.question, question.truth, answers[question.id]])
    columns = ["picture", "question", "right", "answer"]
    tracker.log({WATCHED: tracker.Table(columns=columns, data=rows), "train/global_step": step})


def _picture(watched: Watched, question: WatchedQuestion) -> Image.Image | None:
    if not question.picture:
        return None
    with Image.open(watched.folder / question.picture, formats=PICTURE_FORMATS) as picture:
        return picture.convert("RGB")


class WatchQuestions(TrainerCallback):
    """Has the questions answered before the first step, at every validation, or now and then where there is none.

    Every rank answers, since under ZeRO-3 they only can together; the first writes. Nothing that is drawn at random
    afterwards, dropout say, is changed by it. `trackers` also hear of the answers.
    """

    def __init__(self, watch: Watch, folder: Path, trackers: Callable[[], Sequence[TrainerCallback]]) -> None:
        self._watch, self._folder, self._trackers = watch, folder, trackers
        self._failed = False
        self.newest: tuple[Asked, ...] = ()
        """The questions with their last answers, on the first rank."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Writes the questions; a run from its beginning answers them untrained, a resumed one keeps what it had."""
        if state.is_world_process_zero:
            _begin(self._folder, self._watch, step=state.global_step)
        if state.global_step == 0:
            self._ask(args, state, more["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """With each validation."""
        self._ask(args, state, more["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """At a few steps, evenly over the run, where nothing is validated."""
        if args.eval_strategy == IntervalStrategy.NO and state.global_step in steps_to_ask(state.max_steps):
            self._ask(args, state, more["model"])

    def _ask(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if self._failed:
            return
        training = model.training
        model.eval()
        try:
            with random_state_kept(args.device):
                answers = self._watch.ask()
        except UserError as error:  # of every rank, so that none waits for another
            self._failed = True
            logger.warning("the watched questions are not asked any more, watch: 0 leaves them out: %s", error)
            return
        finally:
            model.train(training)
        if not state.is_world_process_zero:
            return
        with (self._folder / WATCHED / ANSWERS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "answers": dict(answers)}) + "\n")
        self.newest = tuple(
            Asked(state.global_step, question.question, answers[question.id], question.truth)
            for question in self._watch.questions
            if question.id in answers
        )
        if not args.disable_tqdm:
            for asked in self.newest:
                tqdm.write(f"step {asked.step}: {asked}")
        if (watched := read_watched(self._folder)) is not None:
            track_answers(self._trackers(), watched, state.global_step)


def steps_to_ask(max_steps: int) -> frozenset[int]:
    """At which steps of a run without validation; the last is one of them."""
    parts = range(1, TIMES_WITHOUT_VALIDATION + 1)
    return frozenset(-(-max_steps * part // TIMES_WITHOUT_VALIDATION) for part in parts)
