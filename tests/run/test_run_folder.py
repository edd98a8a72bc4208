"""Who may start in a run's folder: what an earlier run left there decides it, and no two processes write at once."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.errors import SettingError, UserError
from dora_vl.files import write_json
from dora_vl.run.folder import LOCK, checkpoint_of, finished_already, one_writer, prepare_run_folder, write_settings
from dora_vl.run.reading import read_run_file
from dora_vl.run.settings import RunConfig
from tests.training.tiny_run import write_run


def left(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def settings(folder: Path, *more: str, resume: str) -> RunConfig:
    file = write_run(folder.parent / "settings.yaml", Path("base"), Path("data.json"))
    return read_run_file(file, f"--training.output_dir={folder}", f"--resume={resume}", *more)


@pytest.mark.parametrize(
    ("tested", "finished"),
    [({}, False), ({"sets": {"a": {}}, "not_yet_tested": ["b"]}, False), ({"sets": {"a": {}, "b": {}}}, True)],
)
def test_a_run_is_finished_once_every_set_is_tested(tmp_path: Path, tested: dict[str, object], finished: bool) -> None:
    config = settings(folder := left(tmp_path / "run", "adapter/a"), "--evaluation.file=t.json", resume="if_stopped")
    write_settings(folder, config)
    write_json(folder / "metrics.json", {"train_steps": 6, "forgetting": {}, **tested})
    assert finished_already(config) is finished


def test_a_run_that_failed_before_its_first_save_blocks_nothing(tmp_path: Path) -> None:
    folder = left(tmp_path / "run", "log.jsonl", "settings.json", "features/x.safetensors")
    prepare_run_folder(folder, checkpoint=None, overwrite=False)
    assert sorted(path.name for path in folder.iterdir()) == ["features", "settings.json"]


@pytest.mark.parametrize(
    "name", ["adapter/adapter_config.json", "metrics.json", "predictions.jsonl", "checkpoint-3/trainer_state.json"]
)
def test_what_took_work_is_kept(tmp_path: Path, name: str) -> None:
    folder = left(tmp_path / "run", "log.jsonl", name)
    with pytest.raises(UserError):
        prepare_run_folder(folder, checkpoint=None, overwrite=False)
    assert (folder / "log.jsonl").is_file()
    prepare_run_folder(folder, checkpoint=folder / "checkpoint-3", overwrite=False)
    assert (folder / "log.jsonl").is_file()
    prepare_run_folder(folder, checkpoint=None, overwrite=True)
    assert list(folder.iterdir()) == []


def test_a_run_that_was_killed_before_its_first_checkpoint_has_one_way_out(tmp_path: Path) -> None:
    """Each message's advice works: none sends a person to the other."""
    folder = left(tmp_path / "run", "log.jsonl", "settings.json", ".checkpoints-being-written/checkpoint-5/state.json")
    resumed = settings(folder, resume="last")
    with pytest.raises(SettingError, match="without resume") as error:
        checkpoint_of(resumed)
    assert error.value.key == "resume"
    prepare_run_folder(folder, checkpoint=None, overwrite=False)

    left(folder, "adapter/adapter_config.json")  # of a whole run that kept no checkpoint
    with pytest.raises(UserError, match=r"adapter .*--overwrite true"):
        checkpoint_of(resumed)
    prepare_run_folder(folder, checkpoint=None, overwrite=True)


# Two processes do not write to one folder; what a dead one left keeps nobody out.


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
