"""A run in a pseudo terminal, as a person sees it: the bar while it trains, the lines above, and after Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyte
import pytest

from tests.training.launched import ROOT
from tests.training.tiny_run import write_run

WIDTH, HEIGHT, SECONDS = 90, 30, 200
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Seen:
    """A program in a terminal: its screen, and what went above it."""

    def __init__(self, command: list[str]) -> None:
        self.screen = pyte.HistoryScreen(WIDTH, HEIGHT, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
        plain = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "COLUMNS")}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**plain, "TERM": "xterm-256color", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(slave)

    @property
    def now(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    @property
    def whole(self) -> str:
        """All that can be scrolled to."""
        above = ("".join(line[column].data for column in range(WIDTH)).rstrip() for line in self.screen.history.top)
        return "\n".join([*above, self.now])

    def until(self, reached: Callable[[str], bool]) -> str:
        """Reads on until the screen is so, or the program has ended; the screen then."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not reached(self.now):
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self._stream.feed(os.read(self.master, 256))
                except OSError:  # it has left the terminal
                    break
        return self.now

    def press_ctrl_c(self) -> None:
        """Once all that was written has been read: with Ctrl-C a terminal throws away what nobody has read yet."""
        while select.select([self.master], [], [], 0.05)[0]:
            self._stream.feed(os.read(self.master, 65536))
        os.write(self.master, b"\x03")

    def end(self) -> int:
        self.until(lambda _: False)
        assert not self.screen.cursor.hidden
        return self.process.wait(SECONDS)


@contextmanager
def terminal_with(run_file: Path, *options: str) -> Iterator[Seen]:
    seen = Seen([sys.executable, "tasks/llava_instruct.py", "--config", str(run_file), *options])
    try:
        yield seen
    finally:
        seen.process.kill()
        seen.process.wait()
        os.close(seen.master)


@pytest.fixture
def run_file(tmp_path: Path, tiny_llava: Path, tiny_data: Path) -> Path:
    often = {"max_steps": 60, "eval_strategy": "steps", "eval_steps": 20, "save_strategy": "no", "learning_rate": 0.02}
    changes = {"data": {"validation": str(tiny_data), "workers": 1}, "evaluation": {"max_new_tokens": 3}}
    training = {"use_cpu": True, "disable_tqdm": False, **often}
    return write_run(tmp_path / "run.yaml", tiny_llava, tiny_data, training=training, **changes)


def test_ctrl_c_leaves_the_terminal_whole(run_file: Path) -> None:
    with terminal_with(run_file, "--training.max_steps=5000") as seen:
        seen.until(lambda screen: "step 20: validation loss" in screen)
        during = seen.until(lambda screen: "/5000 loss" in screen and screen.endswith("left"))
        seen.press_ctrl_c()
        assert seen.end() == 130, seen.whole
    for name in ("loss ", "samples/s", "GiB", "so far", " -> "):
        assert name in during
    assert seen.whole.count("step 20: validation loss") == 1
    assert seen.whole.count("so far") == 1  # drawn over, not again
    before, _, after = seen.whole.partition("so far")
    assert "SIGINT: finishing" in before
    assert "stopped by SIGINT" in after
