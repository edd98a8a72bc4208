"""Two processes do not write to one folder; what a dead one left keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.run.folder import LOCK, one_writer

HOLD = (
    "import os, sys, pathlib; from dora_vl.run.folder import one_writer\n"
    "with one_writer(pathlib.Path(sys.argv[1])):\n"
    "    worker = os.fork() if len(sys.argv) > 2 else 1\n"
    "    if worker: print('holds', worker, flush=True)\n"
    "    sys.stdin.read()"
)


def holder(folder: Path, *more: str) -> tuple[subprocess.Popen[str], int]:
    """A process that holds the folder until its input ends, and the number of its worker."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    status, worker = process.stdout.readline().split()
    assert status == "holds"
    return process, int(worker)


def test_a_second_writer_hears_who_the_first_is(tmp_path: Path) -> None:
    other, _ = holder(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"process {other.pid} on \S+ writes"), one_writer(tmp_path / "run"):
            pytest.fail("two writers")
    other.communicate("")
    with one_writer(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()


def test_a_killed_writer_keeps_nobody_out_though_its_worker_lives(tmp_path: Path) -> None:
    other, worker = holder(tmp_path / "run", "forks")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    os.kill(worker, 0)  # alive
    assert (tmp_path / "run" / LOCK).exists()
    with one_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()
    os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with one_writer(tmp_path / "run"):
        assert str(tmp_path / "run") in caplog.text


def test_a_folder_that_stays_empty_goes_again_and_one_with_files_stays(tmp_path: Path) -> None:
    with one_writer(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new" / "run").exists()
    with one_writer(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "log").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["log"]
