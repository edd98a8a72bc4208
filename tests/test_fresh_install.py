"""When CI installs the wheel into a bare environment: where declarations or imports of others have changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fresh_install import is_needed


def git(folder: Path, *words: str) -> None:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *own, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "dora_vl").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("dependencies = []\n")
    (folder / "dora_vl" / "a.py").write_text("import torch\nx = 1\n")
    git(folder, "init")
    for message in ("first", "second"):
        git(folder, "add", "--all")
        git(folder, "commit", "--allow-empty", "-m", message)
    return folder


@pytest.mark.parametrize(
    ("file", "line", "needed"),
    [
        ("dora_vl/a.py", "y = 2  # it came from torch", False),
        ("dora_vl/a.py", "    from peft.utils import other", True),
        ("dora_vl/a.py", 'x = import_module("bitsandbytes.functional")', True),
        ("pyproject.toml", "# a remark", True),
    ],
)
def test_what_has_changed_since_main_decides(checkout: Path, file: str, line: str, needed: bool) -> None:
    git(checkout, "update-ref", "refs/remotes/origin/main", "HEAD")
    path = checkout / file
    path.write_text(path.read_text() + f"{line}\n")
    assert is_needed(checkout) is needed
    for message in ("third", "fourth"):
        git(checkout, "add", "--all")
        git(checkout, "commit", "--allow-empty", "-m", message)
    assert is_needed(checkout) is needed
    git(checkout, "update-ref", "refs/remotes/origin/main", "HEAD")
    assert not is_needed(checkout)  # main itself, beside the commit before


def test_where_git_cannot_tell_it_runs(checkout: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--depth", "1", checkout.as_uri(), "shallow")
    assert is_needed(tmp_path / "shallow")
    assert is_needed(tmp_path)
