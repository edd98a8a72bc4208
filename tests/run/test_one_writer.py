"""Two processes do not write to one folder; a dead one's lock is taken over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.run.one_writer import JOB, LOCK, one_writer

HOLD = (
    "import sys, pathlib; from dora_vl.run.one_writer import one_writer\n"
    "with one_writer(pathlib.Path(sys.argv[1])):\n"
    "    print('holds', flush=True); sys.stdin.read()"
)


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_a_second_writer_hears_who_the_first_is(other: subprocess.Popen[str], tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=rf"run: process {other.pid} on \S+ writes to it") as error,
        one_writer(tmp_path / "run"),
    ):
        pytest.fail("two writers")
    assert str(tmp_path / "run" / LOCK) in str(error.value)
    other.communicate("")
    with one_writer(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()


def test_a_killed_writer_leaves_nothing_to_wait_for(other: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with one_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_stays_empty_goes_again_and_one_with_files_stays(tmp_path: Path) -> None:
    with one_writer(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new" / "run").exists()
    with one_writer(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "log").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["log"]


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run cannot be written to"), one_writer(tmp_path / "run"):
        pass


@pytest.fixture
def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder as a job's first start left it on a machine that is gone."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    left = tmp_path / "left"
    with one_writer(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", left)
    machine = (left / LOCK).read_text().splitlines()[1]
    for name in (LOCK, JOB):
        (left / name).write_text((left / name).read_text().replace(machine, "node7"))
    return left


def test_a_requeued_job_takes_over_from_its_lost_machine(lost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with one_writer(lost):
        assert "node7" not in (lost / LOCK).read_text()
    assert list(lost.iterdir()) == []


@pytest.mark.parametrize(("job", "again"), [("4711", ""), ("4712", "1"), ("", "1")], ids=["same", "other", "none"])
def test_another_start_or_job_does_not(lost: Path, monkeypatch: pytest.MonkeyPatch, job: str, again: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", again)
    with pytest.raises(UserError, match="on node7 writes to it"), one_writer(lost):
        pytest.fail("two writers")


def test_a_lock_that_came_after_the_jobs_is_not_its_own(lost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (lost / LOCK).write_text("99\nnode8\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="process 99 on node8 writes to it"), one_writer(lost):
        pytest.fail("two writers")
