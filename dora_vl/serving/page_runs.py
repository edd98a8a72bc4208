"""Runs as the page starts, finds, stops and reads them, and the commands that its clicks run.

A run is a process of its own that outlives the page, and is known only by its folder: its files say how far it is, and
its lock there whether it goes on. So the page may be closed, or end, and come back.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dora_vl.adapters.files import complete_checkpoints
from dora_vl.errors import UserError, one_line
from dora_vl.files import json_or_nothing
from dora_vl.run.folder import (
    ADAPTER,
    ANSWERS,
    LOCK,
    LOSS_LOG,
    METRICS,
    SETTINGS,
    WATCHED,
    is_tested,
    locking_process,
    results_in,
)

RUNS, DATA = Path("runs"), Path("data")
"""Runs are below the first, dropped files below the second, in the folder that the page was started in."""
RUN_FILE, OUTPUT = "run.yaml", "output.txt"
SHOWN_LINES = {"training": r"step [\d,]+ of", "testing": r"\S", "failed": r"\S"}
"""The page shows a run's last line of output that fits, by its state; in other states its output says nothing more."""
PROGRAM = (sys.executable, "-m", "dora_vl.cli")


def command(words: Sequence[str]) -> str:
    """Returns a command as a user types it."""
    return shlex.join(["dora-vl", *words])


def printed(words: Sequence[str]) -> list[str]:
    """Returns the lines that a command prints. Raises UserError with the command's own message if it fails."""
    environment = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(one_line(lines[-1].rpartition("error: ")[2] if lines else f"status {done.returncode}"))
    return done.stdout.splitlines()


def free_folder(folder: Path, is_taken: Callable[[Path], bool] = Path.exists) -> Path:
    """Returns the folder, or the first with a number after its name, that is not taken."""
    others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], others) if not is_taken(path))


class RunStatus(NamedTuple):
    """Says how far a run is: its last line, as far as the page started it, and what changes whenever its files do."""

    state: Literal["ready", "starting", "training", "testing", "stopped", "failed", "finished"]
    line: str
    mark: str


class Runs:
    """The runs below `runs/`, of which at most one is active."""

    def __init__(self) -> None:
        self._child: tuple[Path, subprocess.Popen[bytes]] | None = None
        self._lock = threading.Lock()

    def folders(self) -> list[Path]:
        """Returns the folders of all runs, the one that was last written to first."""
        folders = {path.parent for name in (RUN_FILE, SETTINGS) for path in RUNS.glob(f"*/{name}")}
        return sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)

    def running(self) -> Path | None:
        """Returns the folder of the run that goes on, whoever started it."""
        if self._child is not None and self._child[1].poll() is None:
            return self._child[0]
        return next((lock.parent for lock in RUNS.glob(f"*/{LOCK}") if locking_process(lock.parent)), None)

    def new_folder(self, name: str) -> Path:
        """Returns the folder of a next run: of this name, or with a number after it if that has been trained."""

        def is_taken(path: Path) -> bool:
            return path.exists() and bool(results_in(path) or locking_process(path) or not (path / RUN_FILE).is_file())

        return free_folder(RUNS / (re.sub(r"[^\w.\-]+", "_", name).strip("._-") or "my"), is_taken)

    def train_arguments(self, folder: Path) -> list[str]:
        """Returns the command that starts a run, or resumes it from its last checkpoint."""
        resumes = self.status(folder).state == "stopped"
        file = RUN_FILE if not resumes and (folder / RUN_FILE).is_file() else SETTINGS
        return ["train", str(folder / file), *(["--resume", "last"] if resumes else [])]

    def start(self, folder: Path) -> list[str]:
        """Starts a run, or resumes it, and returns the command. Raises UserError while another run goes on."""
        with self._lock:
            if (other := self.running()) is not None:
                raise UserError(f"{other} is at work, and one run goes on at a time; wait for its end, or stop it")
            words = self.train_arguments(folder)
            output = (folder / OUTPUT).open("ab" if "--resume" in words else "wb")
            process = subprocess.Popen(
                [*PROGRAM, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # neither Ctrl-C here nor the end of the page reaches it
            )
            output.close()
            self._child = folder, process
        return words

    def stop(self, folder: Path) -> None:
        """Asks a run to save a checkpoint and end; one that has not begun to train ends at once."""
        own = self._child[1] if self._child is not None and self._child[0] == folder else None
        if (process := own.pid if own is not None and own.poll() is None else locking_process(folder)) is not None:
            os.kill(process, signal.SIGTERM)

    def status(self, folder: Path) -> RunStatus:
        """Reads how far a run is."""
        files = [folder / name for name in (OUTPUT, LOSS_LOG, METRICS, f"{WATCHED}/{ANSWERS}")]
        sizes = [path.stat().st_size if path.is_file() else 0 for path in files]
        trained = (folder / ADAPTER).is_dir() and (folder / METRICS).is_file()
        settings = json_or_nothing(folder / SETTINGS)
        whole = trained and (is_tested(folder) or not (settings.get("evaluation") or {}).get("file"))
        if self.running() == folder:
            state = "testing" if trained else "training" if files[1].exists() else "starting"
        elif whole or complete_checkpoints(folder):
            state = "finished" if whole else "stopped"
        else:
            state = "failed" if sizes[0] else "ready"
        line = _last_line(files[0], SHOWN_LINES[state]) if sizes[0] and state in SHOWN_LINES else ""
        return RunStatus(state, line, f"{folder} {state} {sizes}")


def _last_line(path: Path, pattern: str) -> str:
    """Returns the last line of a run's output that fits; a bar that was drawn over itself counts as a line."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return one_line(next((line for line in reversed(lines) if re.search(pattern, line)), ""))
