"""Asks a run's fixed questions while it trains, keeps the answers and hands them to the trackers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dora_vl.run.watched import Watch, Watched, WatchedQuestion, add_answers, begin, read_watched
from dora_vl.training.live_view import Asked
from dora_vl.training.validation import random_state_kept

logger = logging.getLogger(__name__)

# The same in TensorBoard, trackio and Weights & Biases: transformers' own reporters know nothing of pictures.

NAME = "watched"
COLUMNS = ("picture", "question", "right", "answer")


def track_answers(callbacks: Sequence[TrainerCallback], watched: Watched, step: int) -> None:
    """Sends the answers of one step to each tracker among a Trainer's callbacks; for the first rank alone."""
    answers = watched.answers[step]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            _to_tensorboard(callback.tb_writer, watched, answers, step)
        elif isinstance(callback, TrackioCallback):
            _as_table(callback._trackio, watched, answers, step)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            _as_table(callback._wandb, watched, answers, step)


def _to_tensorboard(writer: Any, watched: Watched, answers: Mapping[str, str], step: int) -> None:
    """A text for each question, which TensorBoard shows by step, and its picture once."""
    if writer is None:  # before training begins, or after its end
        return
    first = step == min(watched.answers)
    for number, one in enumerate(watched.questions):
        name = f"{NAME}/{number}"
        if one.id in answers:
            writer.add_text(name, "\n\n".join(map(_indented, (one.question, answers[one.id], one.truth))), step)
        picture = _picture(watched, one) if first else None
        if picture is not None:
            writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    writer.flush()


def _indented(text: str) -> str:
    """As a block of code in Markdown: a model's answer is shown, not followed."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _as_table(tracker: Any, watched: Watched, answers: Mapping[str, str], step: int) -> None:
    """One table; trackio takes Weights & Biases' calls."""
    asked = [(one, _picture(watched, one)) for one in watched.questions if one.id in answers]
    rows = [
        [None if picture is None else tracker.Image(picture), one.question, one.truth, answers[one.id]]
        for one, picture in asked
    ]
    tracker.log({NAME: tracker.Table(columns=[*COLUMNS], data=rows), "train/global_step": step})


def _picture(watched: Watched, one: WatchedQuestion) -> Image.Image | None:
    if not one.picture:
        return None
    with Image.open(watched.folder / one.picture, formats=PICTURE_FORMATS) as picture:
        return picture.convert("RGB")


TIMES_WITHOUT_VALIDATION = 5


class WatchQuestions(TrainerCallback):
    """Has the questions answered before the first step, at every validation, or now and then where there is none.

    Every rank answers, since under ZeRO-3 they only can together; the first writes. Nothing that is drawn at random
    afterwards, dropout say, is changed by it.

    Args:
        folder: the run's.
        trackers: what else hears of the answers, looked up when there are some.
    """

    def __init__(self, watch: Watch, folder: Path, trackers: Callable[[], Sequence[TrainerCallback]]) -> None:
        self._watch, self._folder, self._trackers = watch, folder, trackers
        self._failed = False
        self.newest: tuple[Asked, ...] = ()
        """The questions with their last answers, on the first rank."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
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
        try:
            with random_state_kept(args.device), evaluating(model):
                answers = self._watch.ask()
        except UserError as error:  # of every rank, so that none waits for another
            self._failed = True
            logger.warning("the watched questions are not asked any more, watch: 0 leaves them out: %s", error)
            return
        if not state.is_world_process_zero:
            return
        add_answers(self._folder, state.global_step, answers)
        self.newest = tuple(
            Asked(state.global_step, one.question, answers[one.id], one.truth)
            for one in self._watch.questions
            if one.id in answers
        )
        if not args.disable_tqdm:
            for one in self.newest:
                tqdm.write(f"step {one.step}: {one}")
        if (watched := read_watched(self._folder)) is not None:
            track_answers(self._trackers(), watched, state.global_step)


def steps_to_ask(max_steps: int) -> frozenset[int]:
    """At which steps of a run without validation; the last is one of them."""
    return frozenset(
        -(-max_steps * part // TIMES_WITHOUT_VALIDATION) for part in range(1, TIMES_WITHOUT_VALIDATION + 1)
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards in the one that it was in."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
