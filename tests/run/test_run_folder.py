"""Who may start in a run's folder, what a resume compares there, and what a full disk leaves."""

import dataclasses
import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from dora_vl.errors import SettingError, UserError
from dora_vl.files import write_json
from dora_vl.run.folder import (
    LOCK,
    checkpoint_of,
    full_disk_reported,
    is_finished_run,
    is_trained_run,
    lock_run_folder,
    prepare_run_folder,
    write_settings,
)
from dora_vl.run.launch import Launch
from dora_vl.run.settings import RunConfig
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training import train_command
from dora_vl.training.checkpoint_files import MANIFEST, check_manifest, write_manifest
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.faults import StepFaults
from dora_vl.training.run import train
from tests.training.tiny_run import MakeRun, write_run


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
def test_a_run_is_finished_once_every_set_is_tested_and_trained_before(tmp_path, monkeypatch, tested, finished) -> None:
    config = settings(folder := left(tmp_path / "run", "adapter/a"), "--evaluation.file=t.json", resume="if_stopped")
    write_settings(folder, config)
    write_json(folder / "metrics.json", {"train_steps": 6, "forgetting": {}, **tested})
    assert (is_finished_run(config), is_trained_run(config)) == (finished, True)
    started: list[RunConfig] = []
    monkeypatch.setattr(train_command, "pipeline_of", lambda config: started.append(config) or sys.exit())
    words = (f"--training.output_dir={folder}", "--resume=if_stopped", "--evaluation.file=t.json")
    with nullcontext() if finished else pytest.raises(SystemExit):
        train_command.train([f"--config={tmp_path / 'settings.yaml'}", *words], program="train", description="")
    assert [(config.test_only, config.resume) for config in started] == ([] if finished else [(True, None)])
    assert not is_trained_run(dataclasses.replace(config, task="commonsense"))  # other settings


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
    "import os, sys, pathlib; from dora_vl.run.folder import lock_run_folder\n"
    "with lock_run_folder(pathlib.Path(sys.argv[1])):\n"
    "    worker = os.fork() if len(sys.argv) > 2 else 1\n"
    "    if worker: print('holds', worker, flush=True)\n"
    "    sys.stdin.read()"
)


def holder(folder: Path, *more: str) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    status, worker = process.stdout.readline().split()
    assert status == "holds"
    return process, int(worker)


def test_a_second_writer_hears_who_the_first_is(tmp_path: Path) -> None:
    other, _ = holder(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"process {other.pid} on \S+ writes"), lock_run_folder(tmp_path / "run"):
            pytest.fail("two writers")
    other.communicate("")
    with lock_run_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()


def test_a_killed_writer_keeps_nobody_out_though_its_worker_lives(tmp_path: Path) -> None:
    other, worker = holder(tmp_path / "run", "forks")
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    os.kill(worker, 0)  # alive
    assert (tmp_path / "run" / LOCK).exists()
    with lock_run_folder(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK).exists()
    os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock_run_folder(tmp_path / "run"):
        assert str(tmp_path / "run") in caplog.text


def test_a_folder_that_stays_empty_goes_again_and_one_with_files_stays(tmp_path: Path) -> None:
    with lock_run_folder(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new" / "run").exists()
    with lock_run_folder(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "log").touch()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["log"]


# What a resume compares: files, processes and settings, each with its line; what may change may.


SETTINGS: dict[str, Any] = {
    "resume": None,
    "watch": 4,
    "adapter": {"alpha": 16.0, "parts": {}, "targets": ["a", "b"]},
    "training": {"learning_rate": 2e-4, "save_steps": 50, "max_steps": 100, "seed": 0},
    "data": {"train": "one.json", "workers": 4},
}
LAUNCH = Launch(2, 3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-40"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "state").mkdir()
    (folder / "state" / "state.json").write_bytes(b"state")
    write_manifest(folder, SETTINGS, LAUNCH)
    return folder


def changed(**sections: object) -> dict[str, object]:
    return SETTINGS | {
        name: {**SETTINGS[name], **value} if isinstance(value, dict) else value for name, value in sections.items()
    }


@pytest.mark.parametrize(
    ("sections", "fits"),
    [
        *((same, True) for same in ({}, {"resume": "last", "watch": 0}, {"data": {"workers": 0}})),
        ({"adapter": {"parts": None}}, True),  # nothing, written in two ways
        ({"training": {"save_steps": 10, "output_dir": "elsewhere", "dataloader_prefetch_factor": 4}}, True),
        ({"training": {"max_steps": 200}}, True),  # a longer run
        *((other, False) for other in ({"adapter": {"alpha": 32.0}}, {"data": {"train": "two.json"}})),
        *(({"training": training}, False) for training in ({"learning_rate": 1e-3}, {"dataloader_drop_last": True})),
    ],
)
def test_what_changes_the_result_may_not_change(checkpoint: Path, sections: dict[str, object], fits: bool) -> None:
    with nullcontext() if fits else pytest.raises(UserError):
        check_manifest(checkpoint, changed(**sections), LAUNCH)


def shaped(micro_batch: int, accumulation: int, **training: object) -> dict[str, object]:
    cut = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    return changed(training={**cut, "optim": "adamw_torch", **training})


MIXTURE = {"data": {"batch_size": 300}, "training": {"per_device_train_batch_size": 1, "optim": "sgd"}}
ADAFACTOR, DROPS = {"optim": "adafactor"}, {"dataloader_drop_last": True}


@pytest.mark.parametrize(
    ("then", "wrote", "now", "launch", "fits"),
    [
        (shaped(4, 1), LAUNCH, shaped(4, 2), Launch(1, None), True),
        (shaped(4, 1), LAUNCH, shaped(2, 1), Launch(4, 0), True),
        (MIXTURE, LAUNCH, MIXTURE, Launch(8, None), True),  # a mixture's step is its own setting
        (shaped(4, 1, **ADAFACTOR), LAUNCH, shaped(4, 1, **ADAFACTOR), LAUNCH, True),
        (
            shaped(4, 2, **ADAFACTOR),
            Launch(1, None),
            shaped(4, 1, **ADAFACTOR),
            Launch(2, 0),
            True,
        ),  # no ranks share it
        *((shaped(4, 1), LAUNCH, shaped(4, 1), other, False) for other in (Launch(1, 3), Launch(4, 2), Launch(3, 3))),
        (shaped(4, 1), LAUNCH, shaped(4, 3), LAUNCH, False),
        *((shaped(4, 1, **how), LAUNCH, shaped(4, 2, **how), Launch(1, None), False) for how in (ADAFACTOR, DROPS)),
    ],
)
def test_processes_with_the_same_step_go_on(checkpoint, then, wrote, now, launch, fits) -> None:
    write_manifest(checkpoint, then, wrote)
    with nullcontext() if fits else pytest.raises(UserError):
        check_manifest(checkpoint, now, launch)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state/state.json", None),
        ("state/state.json", b"sta"),
        ("adapter/adapter_model.safetensors", b"wEights"),
        (MANIFEST, None),
        (MANIFEST, b"{"),
        (MANIFEST, b'{"files": {}}'),
    ],
)
def test_a_missing_cut_or_changed_file_is_named(checkpoint: Path, name: str, content: bytes | None) -> None:
    (checkpoint / name).unlink() if content is None else (checkpoint / name).write_bytes(content)
    with pytest.raises(UserError, match=str(checkpoint / name)):
        check_manifest(checkpoint, SETTINGS, LAUNCH)


# A full disk is one line that names what is whole, whichever library was writing.


SMALL_DISK_KIB = 1400


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_KIB}k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_run_on_a_disk_that_fills_up_names_the_last_whole_checkpoint(small_disk: Path, make_run: MakeRun) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 20, "output_dir": str(small_disk / "run")}
    run_file = make_run(adapter={"rank": 16}, training={"use_cpu": True, "max_steps": 20, **saving})
    with pytest.raises(UserError, match=r"checkpoint-\d+") as error:
        train(DecoderPipeline(read_run_file(run_file)))
    checkpoints = [path.name for path in (small_disk / "run").glob("checkpoint-*")]
    named = [name for name in checkpoints if f"{name} is the last whole" in str(error.value)]
    assert len(named) == 1
    assert not (small_disk / "run" / "adapter").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EFBIG, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    """RuntimeError: as safetensors words it, by the system's text alone."""
    raised = OSError(number, os.strerror(number)) if kind is OSError else kind(f"I/O: {os.strerror(number)}")
    left(tmp_path, "checkpoint-3/trainer_state.json")
    with pytest.raises(UserError, match="checkpoint-3"), full_disk_reported(tmp_path, "weights"):
        raise raised


def test_a_killed_data_worker_ends_a_run_in_one_line(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = make_run(data={"workers": 1}, training={"use_cpu": True, "max_steps": 200})
    begin = StepFaults.begin_step

    def kill_worker(self: StepFaults, ids: Sequence[Sequence[str]]) -> None:
        begin(self, ids)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        worker.join()

    monkeypatch.setattr(StepFaults, "begin_step", kill_worker)
    with pytest.raises(UserError, match=r"data\.workers"):
        train(DecoderPipeline(read_run_file(run_file)))
