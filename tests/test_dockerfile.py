"""The Dockerfile copies what there is, and installs extras that are declared; `make lint` has hadolint look at it."""

from __future__ import annotations

import re
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_it_copies_what_there_is() -> None:
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, re.MULTILINE) for name in line.split()]
    assert len(copied) >= 5
    assert [name for name in copied if not (ROOT / name).exists()] == []
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert set(copied) == set(allowed)


def test_what_it_copies_is_enough_for_the_wheel(tmp_path: Path) -> None:
    """hatchling builds it from the copied files alone, with the recipes and the extras that are installed."""
    import shutil
    import zipfile

    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("configs", "dora_vl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        from hatchling.build import build_wheel

        wheel = tmp_path / build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        extras = Parser().parsestr(archive.read(metadata).decode()).get_all("Provides-Extra") or []
    assert "dora_vl/configs/llava/easyvqa_smollm2_dora.yaml" in names
    installed = {extra for group in re.findall(r"\.whl\)\[([\w,]+)\]", TEXT) for extra in group.split(",")}
    assert installed
    assert installed <= set(extras)
