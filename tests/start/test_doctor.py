"""`dora-vl doctor`: what is installed, as the metadata declares it, and what is missing with its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.start import doctor
from dora_vl.start.doctor import why_not_writable

LINES = [
    "numpy",
    "torch>=2.6",
    "open_clip_torch>=3.0",
    "av>=14; extra == 'video'",
    'h5py>=3.10; extra == "video"',
    "triton>=3.2; platform_system == 'Linux' and extra == 'triton'",
    "pyright[nodejs]>=1.1; extra == 'dev'",
]


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], int]:
    status = 0
    try:
        main(["doctor"])
    except SystemExit as left:
        status = int(left.code or 0)
    return capsys.readouterr().out.splitlines(), status


def test_a_machine_that_has_all_and_one_that_misses_something(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "requires", lambda name: LINES)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "1.2.3")
    monkeypatch.setattr(doctor, "places", lambda: [Path.cwd()])
    lines, status = printed(capsys)
    assert status == 0
    assert "extra video: installed" in lines
    assert any(line.startswith("devices: ") and "CPU cores" in line for line in lines)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "" if name in {"h5py", "torch"} else "1.2.3")
    lines, status = printed(capsys)
    assert status == 1
    assert "extra video: missing h5py: pip install 'dora-vl[video]'" in lines
    assert lines[-1] == "missing, and needed by every run: torch; pip install dora-vl"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path) == ""
    assert why_not_writable(tmp_path / "not" / "yet") == ""
    assert list(tmp_path.iterdir()) == []
    assert why_not_writable(Path("/proc"))
