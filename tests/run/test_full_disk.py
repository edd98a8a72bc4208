"""A full disk is one line that names what is whole, whichever library was writing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.run.folder import full_disk_reported
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.faults import StepFaults
from dora_vl.training.run import train
from tests.training.tiny_run import MakeRun

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
    with (
        pytest.raises(UserError, match="checkpoint-3"),
        full_disk_reported(tmp_path, "weights", lambda: "checkpoint-3"),
    ):
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
