"""Runs as the page starts, finds, stops and reads them, and the commands that its clicks stand for.

A run is a process of its own that outlives the page, and is known by its folder alone: its files say how far it is, and
its lock there whether it goes on. So the page may be closed, or end, and come back.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dora_vl.adapters.files import complete_checkpoints
from dora_vl.errors import UserError, one_line
from dora_vl.files import json_or_nothing
from dora_vl.run.folder import ADAPTER, LOCK, LOSS_LOG, METRICS, SETTINGS, WATCHED, is_tested, results_in, writer_of
from dora_vl.run.watched import ANSWERS

RUNS, DATA = Path("runs"), Path("data")
"""Runs are below the one, dropped files below the other, in the folder that the page was started in."""
RUN_FILE, OUTPUT = "run.yaml", "output.txt"
PROGRAM = (sys.executable, "-m", "dora_vl.cli")
State = Literal["ready", "starting", "training", "testing", "stopped", "failed", "finished"]


def command(words: Sequence[str]) -> str:
    """Returns a command as a person types it."""
    return shlex.join(["dora-vl", *words])


def printed(words: Sequence[str]) -> Iterator[str]:
    """Yields the lines that a command prints, as they come; whoever stops reading ends it.

    Raises:
        UserError: the command ended with an error; the message is its own.
    """
    environment = {**os.environ, "FORCE_COLOR": "1"}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [*PROGRAM, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=environment,
        )
        try:
            assert process.stdout is not None
            yield from (line.rstrip("\n") for line in process.stdout)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        if status:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), f"ended with status {status}")
            raise UserError(one_line(last.rpartition("error: ")[2]))


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far a run is, by its folder.

    Attributes:
        line: the last that it said, as far as the page started it.
        mark: changes whenever its files do.
    """

    folder: Path
    state: State
    line: str = ""
    mark: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether a process is at work."""
        return self.state in ("starting", "training", "testing")


class Runs:
    """The runs below `runs/`, of which one goes on at a time."""

    def __init__(self) -> None:
        self._child: tuple[Path, subprocess.Popen[bytes]] | None = None
        self._lock = threading.Lock()

    def folders(self) -> list[Path]:
        """Returns the folders of all runs, the one that was last written to first."""
        found = {path.parent for name in (RUN_FILE, SETTINGS) for path in RUNS.glob(f"*/{name}")}
        return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)

    def running(self) -> Path | None:
        """Returns the folder of the run that goes on, whoever started it."""
        child = self._child
        if child is not None and child[1].poll() is None:
            return child[0]
        return next((lock.parent for lock in RUNS.glob(f"*/{LOCK}") if writer_of(lock.parent)), None)

    def new_folder(self, name: str) -> Path:
        """Returns the folder of a next run: of this name, or with a number behind it where that has been trained."""
        number, folder = 1, RUNS / name
        while folder.exists() and (results_in(folder) or not (folder / RUN_FILE).is_file() or writer_of(folder)):
            number += 1
            folder = RUNS / f"{name}-{number}"
        return folder

    def words_to_train(self, folder: Path) -> list[str]:
        """Returns the command that starts a run, or goes on with one that has a checkpoint."""
        if complete_checkpoints(folder):
            return ["train", str(folder / SETTINGS), "--resume", "last"]
        return ["train", str(folder / RUN_FILE)]

    def start(self, folder: Path) -> None:
        """Starts a run, or resumes it. Raises UserError while another goes on."""
        with self._lock:
            if (other := self.running()) is not None:
                raise UserError(f"{other} is at work, and one run goes on at a time; wait for its end, or stop it")
            with (folder / OUTPUT).open("ab" if complete_checkpoints(folder) else "wb") as output:
                process = subprocess.Popen(
                    [*PROGRAM, *self.words_to_train(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # neither Ctrl-C here nor the end of the page reaches it
                )
            self._child = folder, process

    def stop(self, folder: Path) -> None:
        """Asks a run to save a checkpoint and end; one that has not begun to train ends at once."""
        child = self._child
        own = child[1].pid if child is not None and child[0] == folder and child[1].poll() is None else None
        if (process := own or writer_of(folder)) is not None:
            os.kill(process, signal.SIGTERM)

    def status(self, folder: Path) -> RunStatus:
        """Reads how far a run is."""
        files = (OUTPUT, LOSS_LOG, METRICS, f"{WATCHED}/{ANSWERS}", RUN_FILE)
        sizes = [path.stat().st_size if (path := folder / name).is_file() else 0 for name in files]
        state = self._state(folder)
        line = _last_line(folder / OUTPUT) if sizes[0] else ""
        return RunStatus(folder=folder, state=state, line=line, mark=f"{folder} {state} {sizes}")

    def _state(self, folder: Path) -> State:
        trained = (folder / ADAPTER).is_dir() and (folder / METRICS).is_file()
        has_test = bool((json_or_nothing(folder / SETTINGS).get("evaluation") or {}).get("file"))
        is_whole = trained and (is_tested(folder) or not has_test)
        if self.running() == folder:
            return (
                "testing" if trained and not is_whole else "training" if (folder / LOSS_LOG).is_file() else "starting"
            )
        if is_whole:
            return "finished"
        if complete_checkpoints(folder):
            return "stopped"
        return "failed" if (folder / OUTPUT).is_file() else "ready"


def _last_line(path: Path) -> str:
    """Returns the last whole line of what a run has said; a bar that was drawn over itself counts as one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return one_line(next((line for line in reversed(lines) if line.strip()), ""))
