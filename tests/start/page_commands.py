"""A page's code and commands, run as they stand in a folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def block(page: Path, mark: str) -> str:
    """The code behind a mark, `<!-- mark -->`."""
    (code,) = re.findall(rf"<!-- {mark} -->\n```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return code


def programs(page: Path, mark: str = "commands") -> list[list[str]]:
    """Each command behind a mark as words, its program this environment's, its script this checkout's."""
    own = {"dora-vl": [sys.executable, "-m", "dora_vl.cli"], "python": [sys.executable]}
    lines = [shlex.split(line) for line in block(page, mark).splitlines()]
    return [
        [*own[words[0]], *(str(ROOT / word) if word.startswith("tasks/") else word for word in words[1:])]
        for words in lines
    ]


def run_commands(page: Path, folder: Path, *, more: Mapping[int, Sequence[str]], mark: str = "commands") -> list[str]:
    """What each command of a page prints, one after the other, in `folder`.

    Args:
        more: words behind a command, by its number from 0.
    """
    printed = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / ".cache")}
    for number, words in enumerate(programs(page, mark)):
        words += more.get(number, ())
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
        printed.append(done.stdout)
    return printed
