"""Asks a run's fixed questions while it trains, keeps the answers and hands them to the trackers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_utils import IntervalStrategy

from dora_vl.data.pictures import PICTURE_FORMATS
from dora_vl.errors import UserError
from dora_vl.run.folder import WATCHED
from dora_vl.run.watched import ANSWERS, Watch, Watched, WatchedQuestion, begin, read_watched
from dora_vl.training.live_view import Asked
from dora_vl.training.validation import random_state_kept

logger = logging.getLogger(__name__)

TIMES_WITHOUT_VALIDATION = 5


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
            begin(self._folder, self._watch, step=state.global_step)
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
