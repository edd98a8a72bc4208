"""docs/first_hour.ipynb: its cells parse and name commands that there are; the slow test runs them one by one."""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_documented_commands import ROOT, check

NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
ASSETS = ROOT / "runs" / "demo" / "assets"


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_parses(cell: str) -> None:
    if cell.startswith("!"):
        assert "\n" not in cell
        check(("first_hour.ipynb", tuple(shlex.split(cell[1:])), True))
    else:
        ast.parse(cell)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not ASSETS.is_dir(), reason="runs/demo/assets is not there; make demo leaves it")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the demo's assets alone, where programs find this checkout."""
    shutil.copytree(ASSETS, tmp_path / "runs" / "demo" / "assets", copy_function=os.link)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in CELLS:
        if cell.startswith("!"):
            done = subprocess.run(shlex.split(cell[1:]), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            exec(compile(cell, NOTEBOOK.name, "exec"), names)
    for run, least in (("demo", 70), ("my", 70)):
        (entry,) = json.loads((tmp_path / "runs" / run / "metrics.json").read_text())["sets"].values()
        assert entry["metrics"]["accuracy"]["value"] > least
    assert (tmp_path / "runs" / "my" / "report.html").is_file()
    assert "## Scores" in (tmp_path / "runs" / "my" / "hub" / "README.md").read_text()
