"""An extension's lock that a killed build left is named before anybody waits for it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dora_vl.training.launch import OLD_SECONDS, report_old_build_locks


def test_an_old_lock_is_named_with_its_age_and_a_young_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old, young = tmp_path / "cpu_adam" / "lock", tmp_path / "deepspeed_shm_comm" / "lock"
    for lock in (old, young):
        lock.parent.mkdir()
        lock.touch()
    before = time.time() - 2 * OLD_SECONDS
    os.utime(old, (before, before))
    assert report_old_build_locks() == [old]
    assert f"{old} is 20 minutes old" in caplog.text


def test_no_folder_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "missing"))
    assert report_old_build_locks() == []


def test_torchs_own_folder_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("torch.utils.cpp_extension.get_default_build_root", lambda: str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    assert report_old_build_locks() == [lock]
