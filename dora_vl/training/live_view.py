"""One live view of a run in a terminal, in place of the bar; it takes at most a hundredth of the run's time."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import TextIOBase
from typing import IO, Any, TextIO, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_vl.errors import shown_text

MOST_SHARE, LEAST_SECONDS = 0.01, 0.25
"""Of the time, for drawing: after a drawing the next waits so long."""
BARS = "▁▂▃▄▅▆▇█"
NO_NUMBER = "×"
KEPT_LOSSES, SPARKS = 60, 30
LONGEST_SHOWN, MOST_QUESTIONS = 60, 4
FOR_ECHO, LEAST_WIDE = 3, 12
"""Columns that stay free on the right: a terminal writes ^C there, which would else begin a line of its own."""
NARROW = 60
"""Columns below which names and numbers share one."""


@dataclass(frozen=True)
class Asked:
    """One watched question, what was answered and what is right."""

    step: int
    question: str
    answer: str
    truth: str

    def __str__(self) -> str:
        question, answer, truth = (shown_text(text, LONGEST_SHOWN) for text in (self.question, self.answer, self.truth))
        return f"{question} -> {answer}   (right: {truth})"


@dataclass
class RunNumbers:
    """What is known of a run at a moment.

    Attributes:
        first: the step from which the time left is reckoned, and when it ended (seconds of `time.monotonic`).
        logged: the newest line of `log.jsonl` that has a loss.
        validation: losses by step; `validating`: batches of a validation that goes on, done and in all.
    """

    title: str
    step: int = 0
    steps: int = 0
    began: float = field(default_factory=time.monotonic)
    first: tuple[int, float] | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_LOSSES))
    logged: Mapping[str, Any] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    validating: tuple[int, int] | None = None
    steps_left_out: int = 0
    answers: Sequence[Asked] = ()

    def take_step(self, step: int, now: float) -> None:
        """A step has ended; the first of a process starts slowly and tells nothing of the others."""
        self.step, self.validating = step, None
        if self.first is None:
            self.first = (step, now)

    def take_log(self, line: Mapping[str, Any], step: int) -> None:
        """A line of the log, of training or of validation."""
        if "loss" in line:
            self.losses.append(float(line["loss"]))
            self.logged = dict(line)
        elif "eval_loss" in line:
            self.validation[step], self.validating = float(line["eval_loss"]), None

    def seconds_left(self, now: float) -> float | None:
        """Reckoned from the steps of this process, validation and saving among them; None before there are two."""
        if self.first is None or self.step <= self.first[0]:
            return None
        return (now - self.first[1]) / (self.step - self.first[0]) * (self.steps - self.step)


def drawn(run: RunNumbers, now: float, *, columns: int) -> RenderableType:
    """The view for a terminal so wide: a bar and a table of numbers; what is not known yet has no row."""
    bar = Padding(ProgressBar(total=max(1, run.steps), completed=run.step), 0)  # which ends its line
    if columns >= NARROW:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, text in rows(run, now):
            table.add_row(name, Text(text))
    else:
        table = Group(*(Text.assemble((f"{name} ", "dim"), text) for name, text in rows(run, now)))
    wide = max(LEAST_WIDE, columns - FOR_ECHO)
    title = Text(shown_text(run.title, wide - 6))
    return Panel(Group(bar, table), title=title, title_align="left", box=box.ROUNDED, width=wide)


def rows(run: RunNumbers, now: float) -> list[tuple[str, str]]:
    """Names and what is shown of each, from the top."""
    share = f"{run.step / max(1, run.steps):.0%}"
    left = run.seconds_left(now)
    times = f"{clock(now - run.began)} so far" + ("" if left is None else f", {clock(left)} left")
    lines = [("step", f"{run.step:,} of {run.steps:,}  {share}  {times}")]
    if run.validating is not None:
        lines.append(("validating", "batch {:,} of {:,}".format(*run.validating)))
    lines += _of_training(run) if run.logged else [("loss", "with the first line of log.jsonl")]
    if losses := run.validation:
        last = max(losses)
        best = min(losses, key=lambda step: (not math.isfinite(losses[step]), losses[step]))
        than = "" if best == last else f"  best {losses[best]:.4f} at step {best:,}"
        lines.append(("validation", f"loss {losses[last]:.4f} at step {last:,}{than}"))
    left_out = (
        (run.logged.get("skipped", 0), "sample", "s"),
        (run.steps_left_out, "step", "s"),
        (run.logged.get("cut_samples", 0), "cut", ""),
    )
    counts = [f"{number:,} {name}{'' if number == 1 else plural}" for number, name, plural in left_out if number]
    lines.append(("skipped", ", ".join(counts) or "nothing"))
    return lines + [(f"at step {answer.step:,}", str(answer)) for answer in run.answers[:MOST_QUESTIONS]]


def _of_training(run: RunNumbers) -> list[tuple[str, str]]:
    line = run.logged
    finite = [loss for loss in run.losses if math.isfinite(loss)]
    mean = f"  mean {sum(finite) / len(finite):.4f}" if finite else ""
    lines = [("loss", f"{run.losses[-1]:.4f}{mean}  {sparkline(run.losses)}")]
    optimizer = [f"{float(line['learning_rate']):.3g}"] if "learning_rate" in line else []
    if "grad_norm" in line:
        optimizer.append(f"gradient norm {float(line['grad_norm']):.3g}")
    if optimizer:
        lines.append(("learning rate", "  ".join(optimizer)))
    if "samples_per_second" in line:
        tokens, padding = line.get("tokens_per_second", 0), line.get("padding_share", 0)
        speed = f"{line['samples_per_second']:,.1f} samples/s  {tokens:,.0f} tokens/s  padding {padding:.0%}"
        lines.append(("speed", speed))
    if "memory_gib" in line:
        lines.append(("memory", f"{line['memory_gib']:.2f} GiB"))
    return lines


def sparkline(values: Sequence[float] | deque[float], most: int = SPARKS) -> str:
    """The last values as bars between the least and the largest of them; what is no number is a cross."""
    shown = list(values)[-most:]
    finite = [value for value in shown if math.isfinite(value)]
    low = min(finite, default=0.0)
    span = max(finite, default=0.0) - low or math.inf
    heights = [round((value - low) / span * (len(BARS) - 1)) if math.isfinite(value) else None for value in shown]
    return "".join(NO_NUMBER if height is None else BARS[height] for height in heights)


def clock(seconds: float) -> str:
    """As 4:05, 1:02:03 or 2 d 3:04:05."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    days, minutes = divmod(minutes, 24 * 60)
    hour, minute = divmod(minutes, 60)
    if days:
        return f"{days} d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def can_show(stream: TextIO | TextIOBase) -> bool:
    """Whether a view can stand there: a terminal that moves its cursor and writes UTF-8, with a person before it."""
    if not stream.isatty() or os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    console = Console(file=cast(IO[str], stream))
    return console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")


class LiveView(TrainerCallback):
    """Draws what is known of a run; for the first rank, in a terminal.

    No thread draws: data workers are forked from this process, and a lock that a thread held then would stay locked in
    them. So the view moves on with steps, validation batches and lines, not in between.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        *,
        answers: Callable[[], Sequence[Asked]] = tuple,
        steps_left_out: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = RunNumbers(title, began=clock())
        self._console, self._clock = console, clock
        self._answers, self._steps_left_out = answers, steps_left_out
        self._live: Live | None = None
        self._open = ExitStack()
        self._next = 0.0
        self._busy = False
        self._waiting: list[str] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the view."""
        self.run.step, self.run.steps = state.global_step, state.max_steps
        self.run.answers = self._answers()
        console = self._console  # streams are redirected by lines_above: for loggers too, and not in data workers
        self._live = Live(
            self._drawn(), console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._open.enter_context(self._live)
        self._open.enter_context(lines_above(self._show_line))
        self._draw()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves on by a step."""
        self.run.take_step(state.global_step, self._clock())
        if not control.should_log:  # its line comes next, and is drawn with the step
            self._draw(at_once=False)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Counts the batches of a validation."""
        done, _ = self.run.validating or (0, 0)
        self.run.validating = done + 1, len(more["eval_dataloader"])
        self._draw(at_once=False)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Takes the newest numbers; a validation has a line above too."""
        logs: dict[str, Any] = more["logs"]
        self.run.take_log(logs, state.global_step)
        self.run.steps_left_out = self._steps_left_out()
        if "eval_loss" in logs:
            loss, skipped = logs["eval_loss"], logs.get("eval_skipped", 0)
            self._show_line(f"step {state.global_step}: validation loss {loss:.4f}, skipped {skipped}")
        self._draw(at_once=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draws the last state, which stays, and gives the terminal back."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back, also after an error in training."""
        if self._live is not None:
            self._draw()
            self._open.close()
            self._live = None

    def _draw(self, *, at_once: bool = True) -> None:
        began = self._clock()
        if not at_once and began < self._next:
            return
        self.run.answers = self._answers()
        self._on_the_terminal(lambda live: live.update(self._drawn(), refresh=True))
        now = self._clock()
        self._next = now + max(LEAST_SECONDS, (now - began) / MOST_SHARE)

    def _drawn(self) -> RenderableType:
        return drawn(self.run, self._clock(), columns=self._console.width)

    def _show_line(self, line: str) -> None:
        """A line above the view, as its writer coloured it."""
        if self._busy:  # of a signal's handler, amid a drawing
            self._waiting.append(line)
            return
        text = Text.from_ansi(line)
        self._on_the_terminal(lambda live: live.console.print(text, soft_wrap=True, highlight=False))

    def _on_the_terminal(self, act: Callable[[Live], object]) -> None:
        if self._live is None:
            return
        self._busy = True
        try:
            act(self._live)
        finally:
            self._busy = False
        while self._waiting:
            self._show_line(self._waiting.pop(0))


class LinesAbove:
    """Stands for a terminal's stream above a live view: whole lines are handed on, all else is the stream's own.

    A process forked from this one, such as a data worker, has no view and writes to the stream itself. A line that was
    drawn over (`\\r`, as progress bars do) is handed on as it was last.
    """

    def __init__(self, stream: TextIO, show: Callable[[str], None]) -> None:
        self._stream, self._show = stream, show
        self._process = os.getpid()
        self._begun = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Shows each line that is whole now."""
        if os.getpid() != self._process:
            return self._stream.write(text)
        *whole, begun = (self._begun + text).split("\n")
        self._begun = begun[begun.rfind("\r") + 1 :]
        for line in whole:
            self._show(line.rstrip("\r").rpartition("\r")[2])
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes one after another."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """A line that has no end yet waits for it."""
        if os.getpid() != self._process:
            self._stream.flush()

    def finish(self) -> None:
        """Shows a line that never got its end."""
        if self._begun:
            self._show(self._begun)
            self._begun = ""


@contextlib.contextmanager
def lines_above(show: Callable[[str], None]) -> Iterator[None]:
    """What is written to stdout and stderr where they are terminals, by loggers too, goes to `show`, line by line."""
    out, err = sys.stdout, sys.stderr
    above = {id(stream): LinesAbove(stream, show) for stream in (out, err) if stream.isatty()}
    loggers = [logging.root, *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    handlers = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers  # they keep the stream they were made with; some ask for sys.stderr each time
        if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler) and id(handler.stream) in above
    ]
    for handler, stream in handlers:
        handler.setStream(above[id(stream)])
    sys.stdout, sys.stderr = (cast(TextIO, above.get(id(stream), stream)) for stream in (out, err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for handler, stream in handlers:
            handler.setStream(stream)
        for stream in above.values():
            stream.finish()
