"""Makes each change of CONTRIBUTING.md in a copy of the code, from the page alone, and checks what it brings."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
THERE = ("dora_vl/backbones/families/table.py", "tests/backbones/tiny_families/families.yaml")
"""The page's diffs of these files show what the code has already."""


def diffs() -> Iterator[tuple[str, str]]:
    """Path and lines of each file that the page changes."""
    for block in re.findall(r"^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        for change in block.removeprefix("+++ ").split("\n+++ "):
            path, _, lines = change.partition("\n")
            yield path, lines


def changed(text: str, lines: str, *, back: bool = False) -> str:
    """A file's text with a diff's hunks made in it, or taken back."""
    old, new = (" +", " -") if back else (" -", " +")
    for hunk in lines.split("@@\n"):
        before, after = (
            "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] in kinds) for kinds in (old, new)
        )
        assert text.count(before) == 1 or not text, f"these lines do not stand in the file once:\n{before}"
        text = text.replace(before, after) if text else after
    return text


def checked(tree: Path, checks: str) -> None:
    """Runs a file of checks on the copy."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", checks)
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code and its tests."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("dora_vl", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_what_the_page_adds_works_as_printed(tree: Path) -> None:
    additions = [(path, lines) for path, lines in diffs() if path not in THERE]
    assert len(additions) >= 13
    for path, lines in additions:
        file = tree / path
        file.write_text(changed(file.read_text() if file.exists() else "", lines), encoding="utf-8")
    checked(tree, "tests/contributing_checks.py")


@pytest.mark.slow
def test_the_family_s_lines_stand_in_the_code_and_are_needed(tree: Path) -> None:
    shown = dict(diffs())
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in THERE}
    without = {path: changed(text, shown[path], back=True) for path, text in texts.items()}
    assert {path: changed(text, shown[path]) for path, text in without.items()} == texts
    (tree / THERE[0]).write_text(without[THERE[0]], encoding="utf-8")
    with pytest.raises(AssertionError, match="assert False == True"):
        checked(
            tree, "tests/backbones/test_decoder.py::test_every_linear_of_the_decoder_is_adapted_and_no_other[smolvlm]"
        )
