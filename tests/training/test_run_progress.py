"""How far a run is: a bar in a terminal with the loggers' lines above it, elsewhere a line for each line of the log."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pyte
import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.training.callbacks import RunProgress

LINE = {"loss": 0.5, "grad_norm": 1.25, "samples_per_second": 12.34, "memory_gib": 2.5}


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


def trained(progress: RunProgress, folder: Path, logger: logging.Logger) -> None:
    """Eight steps, each logged, and a validation."""
    arguments, control = TrainingArguments(output_dir=str(folder), use_cpu=True), TrainerControl()
    state = TrainerState(max_steps=8, global_step=0)
    progress.on_train_begin(arguments, state, control)
    for step in range(1, 9):
        state.global_step = step
        progress.on_step_end(arguments, state, control)
        progress.on_log(arguments, state, control, logs={**LINE, "loss": 1 / step})
        logger.warning("from a logger at %d", step)
    progress.on_log(arguments, state, control, logs={"eval_loss": 0.25, "eval_skipped": 3})
    progress.close()


def test_lines_go_above_the_bar_and_the_last_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, logger = Terminal(), logging.getLogger("a.library")
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger.addHandler(handler)
    try:
        console = Console(file=terminal, width=120, force_terminal=True, force_interactive=True)
        trained(RunProgress(console), tmp_path, logger)
    finally:
        logger.removeHandler(handler)
    *above, bar = terminal.lines
    assert above == [f"from a logger at {step}" for step in range(1, 9)]
    for words in ("8/8", "loss 0.1250", "12.3 samples/s", "2.50 GiB", "so far", "left"):
        assert words in bar
    assert handler.stream is sys.stderr is terminal
    assert not terminal.screen.cursor.hidden


def test_without_a_terminal_each_line_of_the_log_is_a_plain_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    output = io.StringIO()
    trained(RunProgress(Console(file=output)), tmp_path, logging.getLogger("a.library"))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dora_vl")]
    assert output.getvalue() == ""
    assert lines[0] == "step 1 of 8  loss 1.0000  12.3 samples/s  2.50 GiB"  # one step tells nothing of those to come
    assert lines[3].startswith("step 4 of 8  loss 0.2500  12.3 samples/s  2.50 GiB  0:00:0")
    assert lines[3].endswith(" left")
    assert lines[-1] == "step 8: validation loss 0.2500, skipped 3"
