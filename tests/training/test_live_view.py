"""The live view of a run: what it says, that lines go above it, and what it costs; the screen is pyte's."""

from __future__ import annotations

import io
import logging
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyte
import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.training.live_view import Asked, LinesAbove, LiveView, RunNumbers, can_show, clock, rows, sparkline

LINE = {"loss": 0.5, "grad_norm": 1.25, "learning_rate": 2e-4, "samples_per_second": 12.34}
LINE |= {"tokens_per_second": 4321.0, "padding_share": 0.125, "skipped": 3, "cut_samples": 1, "memory_gib": 2.5}


class Terminal(io.TextIOWrapper):
    """What is written to it is on a screen."""

    mode, name = "w", "terminal"

    def __init__(self, width: int = 80, height: int = 24, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self.screen = pyte.HistoryScreen(width, height, history=500)
        self._stream = pyte.Stream(self.screen)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    return Terminal()


def view_on(terminal: Terminal, **options: object) -> LiveView:
    screen = terminal.screen
    console = Console(file=terminal, width=screen.columns, height=screen.lines, force_terminal=True)
    return LiveView(console, "runs/my", **options)  # pyright: ignore[reportArgumentType]


def test_the_rows_say_every_number() -> None:
    run = RunNumbers("runs/my", steps=1000, began=100.0)
    for step in range(1, 101):
        run.take_step(step, 100.0 + 10 + step * 2)  # the first of them took twelve seconds
    run.take_log({"loss": 1.5}, 50)
    run.take_log(LINE, 100)
    run.take_log({"eval_loss": 0.75}, 50)
    run.take_log({"eval_loss": 0.875}, 100)
    run.steps_left_out, run.answers = 1, [Asked(100, "what colour?", "re\x1b[2Jd", "green")]
    assert dict(rows(run, 310.0)) == {
        "step": "100 of 1,000  10%  3:30 so far, 30:00 left",
        "loss": "0.5000  mean 1.0000  █▁",
        "learning rate": "0.0002  gradient norm 1.25",
        "speed": "12.3 samples/s  4,321 tokens/s  padding 12%",
        "memory": "2.50 GiB",
        "validation": "loss 0.8750 at step 100  best 0.7500 at step 50",
        "skipped": "3 samples, 1 step, 1 cut",
        "at step 100": "what colour? -> re\\x1b[2Jd   (right: green)",
    }


def test_what_is_not_known_yet_is_not_said() -> None:
    run = RunNumbers("runs/my", step=40, steps=60, began=0.0)  # resumed
    run.take_step(41, 5.0)
    assert dict(rows(run, 5.0))["step"] == "41 of 60  68%  0:05 so far"
    assert run.seconds_left(5.0) is None
    run.take_step(42, 8.0)
    assert run.seconds_left(8.0) == 18 * 3


def test_sparks_and_clock() -> None:
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1.0, math.nan, 2.0, math.inf]) == "▁×█×"
    assert sparkline([math.nan]) == "×"
    assert sparkline([float(value) for value in range(99)], most=8) == "▁▂▃▄▅▆▇█"
    assert [clock(seconds) for seconds in (0.0, 65.4, 3723.0, 200_000.0)] == ["0:00", "1:05", "1:02:03", "2 d 7:33:20"]


def test_lines_go_above_the_view_and_the_last_state_stays(
    terminal: Terminal, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)
    logger, handler = logging.getLogger("a.library"), logging.StreamHandler(terminal)
    logger.addHandler(handler)
    view = view_on(terminal, answers=lambda: [Asked(0, "which?", "that", "this")])
    state, control = TrainerState(max_steps=8, global_step=0), TrainerControl()
    try:
        view.on_train_begin(arguments, state, control)
        for step in range(1, 9):
            state.global_step = step
            view.on_step_end(arguments, state, control)
            view.on_log(arguments, state, control, logs={**LINE, "loss": 1 / step})
            logger.warning("from a logger at %d", step)
            sys.stdout.write(f"\rhalf\rwritten at {step}\n")
            (top,) = [index for index, line in enumerate(terminal.lines) if "runs/my" in line]
            assert terminal.lines[top - 2 : top] == [f"from a logger at {step}", f"written at {step}"]
            assert sum("loss" in line for line in terminal.lines[top:]) == 1
        assert terminal.screen.cursor.hidden
        sys.stdout.write("no end")
        view.on_log(arguments, state, control, logs={"eval_loss": 0.25})
        view.close()
    finally:
        logger.removeHandler(handler)
    assert not terminal.screen.cursor.hidden
    assert vars(sys)["stdout"] is handler.stream is terminal
    shown = "\n".join(terminal.lines)
    for words in ("step 8: validation loss 0.2500", "8 of 8  100%", "which? -> that   (right: this)", "no end"):
        assert words in shown
    assert "half" not in shown
    view.on_step_end(arguments, state, control)  # after its end it draws nothing
    assert "\n".join(terminal.lines) == shown


@pytest.mark.parametrize("width", [24, 60, 200])
def test_a_terminal_of_any_width_has_every_word(width: int, arguments: TrainingArguments) -> None:
    terminal = Terminal(width, 40)
    view = view_on(terminal)
    state, control = TrainerState(max_steps=800, global_step=1), TrainerControl()
    view.on_train_begin(arguments, state, control)
    for _ in range(3):
        view.on_log(arguments, state, control, logs=LINE)
        view._draw()
    words = " ".join(terminal.lines).replace("│", " ").split()
    assert {"0.5000", "tokens/s", "GiB", "samples,", "cut"} <= set(words)
    assert words.count("GiB") == 1  # each drawing went over the one before
    view.close()


def test_drawing_takes_a_hundredth_of_the_time(arguments: TrainingArguments) -> None:
    now, cost, drawn = 100.0, 0.01, 0

    def clock() -> float:
        nonlocal now
        now += cost  # each look takes so long
        return now

    view: Any = view_on(Terminal(), clock=clock)
    state, control = TrainerState(max_steps=1000), TrainerControl()
    view.on_train_begin(arguments, state, control)
    update = view._live.update

    def counted(*options: Any, **named: Any) -> None:
        nonlocal drawn
        drawn += 1
        update(*options, **named)

    view._live, began = SimpleNamespace(update=counted, console=None), now
    for step in range(1000):
        state.global_step = step
        now += 0.05
        view.on_step_end(arguments, state, control)
    assert drawn > 10
    assert drawn * cost <= 0.011 * (now - began)


def test_where_a_view_can_stand(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_show(terminal)
    with (tmp_path / "file").open("w") as file:
        assert not can_show(file)
    assert not can_show(Terminal(encoding="ascii"))
    monkeypatch.setenv("TERM", "dumb")
    assert not can_show(terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "true")
    assert not can_show(terminal)


def test_a_forked_worker_writes_to_the_stream_itself() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        drawn: list[str] = []
        above = LinesAbove(stream, drawn.append)
        above._process += 1  # as if this were its child
        above.write("of a worker\n")
        above.flush()
        assert drawn == []
    assert os.fdopen(read).read() == "of a worker\n"
