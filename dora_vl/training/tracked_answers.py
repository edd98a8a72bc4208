"""The watched questions in TensorBoard, trackio and Weights & Biases: a table of pictures and answers at each asking.

transformers' own reporters send the numbers of `log.jsonl`; they know nothing of pictures. A run's `training.report_to`
names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from dora_vl.data.media_limits import PICTURE_FORMATS
from dora_vl.run.watched import Watched, WatchedQuestion

NAME = "watched"
COLUMNS = ("picture", "question", "right", "answer")
STEP = "train/global_step"


def track_answers(callbacks: Sequence[TrainerCallback], found: Watched, step: int) -> None:
    """Sends the answers of one step to each tracker among a Trainer's callbacks; for the first rank alone."""
    answers = found.answers[step]
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            _to_tensorboard(callback.tb_writer, found, answers, step)
        elif isinstance(callback, TrackioCallback):
            _as_table(callback._trackio, found, answers, step)
        elif isinstance(callback, WandbCallback) and callback._wandb is not None:
            _as_table(callback._wandb, found, answers, step)


def _to_tensorboard(writer: Any, found: Watched, answers: Mapping[str, str], step: int) -> None:
    """A text for each question, which TensorBoard shows by step, and its picture once."""
    if writer is None:  # before training begins, or after its end
        return
    first = step == min(found.answers)
    for number, one in enumerate(found.questions):
        name = f"{NAME}/{number}"
        if one.id in answers:
            writer.add_text(name, "\n\n".join(map(_indented, (one.question, answers[one.id], one.truth))), step)
        picture = _picture(found, one) if first else None
        if picture is not None:
            writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    writer.flush()


def _indented(text: str) -> str:
    """As a block of code in Markdown: a model's answer is shown, not followed."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _as_table(tracker: Any, found: Watched, answers: Mapping[str, str], step: int) -> None:
    """One table; trackio takes Weights & Biases' calls."""
    rows = [_row(tracker, found, one, answers[one.id]) for one in found.questions if one.id in answers]
    tracker.log({NAME: tracker.Table(columns=[*COLUMNS], data=rows), STEP: step})


def _row(tracker: Any, found: Watched, one: WatchedQuestion, answer: str) -> list[Any]:
    picture = _picture(found, one)
    return [None if picture is None else tracker.Image(picture), one.question, one.truth, answer]


def _picture(found: Watched, one: WatchedQuestion) -> Image.Image | None:
    if not one.picture:
        return None
    with Image.open(found.folder / one.picture, formats=PICTURE_FORMATS) as picture:
        return picture.convert("RGB")
