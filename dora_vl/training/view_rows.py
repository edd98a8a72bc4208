"""What the terminal's live view shows of a run: its numbers so far, and how they are laid out."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dora_vl.errors import shown_text

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
        question, answer, truth = (shown_text(one, LONGEST_SHOWN) for one in (self.question, self.answer, self.truth))
        return f"{question} -> {answer}   (right: {truth})"


@dataclass
class RunNumbers:
    """What is known of a run at a moment; `logged` holds the newest line of `log.jsonl` that has a loss.

    Attributes:
        first: the step from which the time left is reckoned, and when it ended (seconds of `time.monotonic`).
        validation: losses by step.
        validating: batches of a validation that goes on: done, and how many there are.
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
    asked: Sequence[Asked] = ()

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
    inside = Group(bar, _table(rows(run, now), names_beside=columns >= NARROW))
    wide = max(LEAST_WIDE, columns - FOR_ECHO)
    title = Text(shown_text(run.title, wide - 6))
    return Panel(inside, title=title, title_align="left", box=box.ROUNDED, width=wide)


def _table(found: Sequence[tuple[str, str]], *, names_beside: bool) -> RenderableType:
    if not names_beside:
        return Group(*(Text.assemble((f"{name} ", "dim"), said) for name, said in found))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, said in found:
        table.add_row(name, Text(said))
    return table


def rows(run: RunNumbers, now: float) -> list[tuple[str, str]]:
    """Names and what is said of each, from the top."""
    share = f"{run.step / max(1, run.steps):.0%}"
    left = run.seconds_left(now)
    times = f"{clock(now - run.began)} so far" + ("" if left is None else f", {clock(left)} left")
    found = [("step", f"{run.step:,} of {run.steps:,}  {share}  {times}")]
    if run.validating is not None:
        found.append(("validating", "batch {:,} of {:,}".format(*run.validating)))
    found += _of_training(run) if run.logged else [("loss", "with the first line of log.jsonl")]
    if run.validation:
        found.append(("validation", _validation(run.validation)))
    found.append(("skipped", _skipped(run)))
    return found + [(f"at step {one.step:,}", str(one)) for one in run.asked[:MOST_QUESTIONS]]


def _of_training(run: RunNumbers) -> list[tuple[str, str]]:
    line = run.logged
    finite = [one for one in run.losses if math.isfinite(one)]
    mean = f"  mean {sum(finite) / len(finite):.4f}" if finite else ""
    found = [("loss", f"{run.losses[-1]:.4f}{mean}  {sparkline(run.losses)}")]
    optimizer = [f"{float(line['learning_rate']):.3g}"] if "learning_rate" in line else []
    if "grad_norm" in line:
        optimizer.append(f"gradient norm {float(line['grad_norm']):.3g}")
    if optimizer:
        found.append(("learning rate", "  ".join(optimizer)))
    if "samples_per_second" in line:
        tokens, padding = line.get("tokens_per_second", 0), line.get("padding_share", 0)
        speed = f"{line['samples_per_second']:,.1f} samples/s  {tokens:,.0f} tokens/s  padding {padding:.0%}"
        found.append(("speed", speed))
    if "memory_gib" in line:
        found.append(("memory", f"{line['memory_gib']:.2f} GiB"))
    return found


def _validation(losses: Mapping[int, float]) -> str:
    last = max(losses)
    told = f"loss {losses[last]:.4f} at step {last:,}"
    best = min(losses, key=lambda step: (not math.isfinite(losses[step]), losses[step]))
    return told if best == last else f"{told}  best {losses[best]:.4f} at step {best:,}"


def _skipped(run: RunNumbers) -> str:
    counted = (
        (run.logged.get("skipped", 0), "sample"),
        (run.steps_left_out, "step"),
    )
    said = [f"{number:,} {name}{'' if number == 1 else 's'}" for number, name in counted if number]
    cut = run.logged.get("cut_samples", 0)
    return ", ".join(said + [f"{cut:,} cut"] * bool(cut)) or "nothing"


def sparkline(values: Sequence[float] | deque[float], most: int = SPARKS) -> str:
    """The last values as bars between the least and the largest of them; what is no number is a cross."""
    shown = list(values)[-most:]
    finite = [one for one in shown if math.isfinite(one)]
    if not finite:
        return NO_NUMBER * len(shown)
    low, span = min(finite), max(finite) - min(finite)
    top = len(BARS) - 1
    height = [round((one - low) / span * top) if span and math.isfinite(one) else 0 for one in shown]
    return "".join(BARS[high] if math.isfinite(one) else NO_NUMBER for one, high in zip(shown, height, strict=True))


def clock(seconds: float) -> str:
    """As 4:05, 1:02:03 or 2 d 3:04:05."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
