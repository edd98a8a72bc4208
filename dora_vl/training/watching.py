"""Asks a run's fixed questions while it trains, keeps the answers and hands them to the trackers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dora_vl.errors import UserError
from dora_vl.run.watched import Watch, add_answers, begin, read_watched
from dora_vl.training.tracked_answers import track_answers
from dora_vl.training.validation import random_state_kept
from dora_vl.training.view_rows import Asked

logger = logging.getLogger(__name__)

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
        self._watch = watch
        self._folder = folder
        self._trackers = trackers
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
        if (found := read_watched(self._folder)) is not None:
            track_answers(self._trackers(), found, state.global_step)


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
