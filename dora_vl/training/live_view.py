"""One live view of a run in a terminal, in place of the bar; it takes at most a hundredth of the run's time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from io import TextIOBase
from typing import IO, Any, TextIO, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_vl.training.callbacks import validation_told
from dora_vl.training.lines_above import lines_above
from dora_vl.training.view_rows import Asked, RunNumbers, drawn

MOST_SHARE = 0.01
"""Of the time, for drawing: after a drawing the next waits so long."""
LEAST_SECONDS = 0.25
NOT_CI = ("", "0", "false")


def can_show(stream: TextIO | TextIOBase) -> bool:
    """Whether a view can stand there: a terminal that moves its cursor and writes UTF-8, with a person before it."""
    if not stream.isatty() or os.environ.get("CI", "").lower() not in NOT_CI:
        return False
    console = Console(file=cast(IO[str], stream))
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")


def close_views(callbacks: Iterable[TrainerCallback]) -> None:
    """Closes the views among a Trainer's callbacks; one that is closed stays so."""
    for one in callbacks:
        if isinstance(one, LiveView):
            one.close()


class LiveView(TrainerCallback):
    """Draws what is known of a run; for the first rank, in a terminal.

    No thread draws: data workers are forked from this process, and a lock that a thread held then would stay locked in
    them. So the view moves on with steps, validation batches and lines, not in between.

    Args:
        asked: the watched questions with their newest answers.
        steps_left_out: how many steps were, up to now.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        asked: Callable[[], Sequence[Asked]] = tuple,
        steps_left_out: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = RunNumbers(title, began=clock())
        self._console = console
        self._asked = asked
        self._steps_left_out = steps_left_out
        self._clock = clock
        self._live: Live | None = None
        self._open = ExitStack()
        self._next = 0.0
        self._busy = False
        self._waiting: list[str] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the view."""
        self.run.step, self.run.steps = state.global_step, state.max_steps
        self.run.asked = self._asked()
        self._live = Live(
            self._drawn(),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,  # lines_above does, for loggers too and not in data workers
            redirect_stderr=False,
        )
        self._open.enter_context(self._live)
        self._open.enter_context(lines_above(self._tell))
        self._draw()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves on by a step."""
        self.run.take_step(state.global_step, self._clock())
        if not control.should_log:  # its line comes next, and is drawn with the step
            self._draw_now_and_then()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Counts the batches of a validation."""
        done, _ = self.run.validating or (0, 0)
        self.run.validating = done + 1, len(more["eval_dataloader"])
        self._draw_now_and_then()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Takes the newest numbers; a validation is told in a line too."""
        self.run.take_log(logs or {}, state.global_step)
        self.run.steps_left_out = self._steps_left_out()
        if "eval_loss" in (logs or {}):
            self._tell(validation_told(logs or {}, state.global_step))
        self._draw_now_and_then()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A validation has ended."""
        self.run.validating = None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draws the last state, which stays, and gives the terminal back."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back, also after an error in training."""
        if self._live is not None:
            self._draw()
            self._open.close()
            self._live = None

    def _draw_now_and_then(self) -> None:
        if self._clock() >= self._next:
            self._draw()

    def _draw(self) -> None:
        began = self._clock()
        self.run.asked = self._asked()
        self._on_the_terminal(lambda live: live.update(self._drawn(), refresh=True))
        now = self._clock()
        self._next = now + max(LEAST_SECONDS, (now - began) / MOST_SHARE)

    def _drawn(self) -> RenderableType:
        return drawn(self.run, self._clock(), columns=self._console.width)

    def _tell(self, line: str) -> None:
        """A line above the view, as its writer coloured it."""
        if self._busy:  # of a signal's handler, amid a drawing
            self._waiting.append(line)
            return
        said = Text.from_ansi(line)
        self._on_the_terminal(lambda live: live.console.print(said, soft_wrap=True, highlight=False))

    def _on_the_terminal(self, act: Callable[[Live], object]) -> None:
        if self._live is None:
            return
        self._busy = True
        try:
            act(self._live)
        finally:
            self._busy = False
        while self._waiting:
            self._tell(self._waiting.pop(0))
