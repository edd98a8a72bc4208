"""docs/design.md: every function on the two paths, of a row and of an answer, is where the page says, and is called."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

ROOT = Path(__file__).parents[1]
WAYS = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Where things are added")[0]
PATHS = WAYS.split("## Compared and drawn answers")[0]
NAMES, EVERYWHERE = (sorted(set(re.findall(r"`([a-z_]+(?:\.\w+){2,})`", text))) for text in (PATHS, WAYS))


def test_both_paths_are_told_in_at_most_25_lines() -> None:
    first, second = re.findall(r"^1\. .*?(?=^## |\Z)", PATHS, re.MULTILINE | re.DOTALL)
    assert max(len(path.strip().splitlines()) for path in (first, second)) <= 25
    assert len(NAMES) > 25


@pytest.mark.parametrize("name", EVERYWHERE)
def test_the_function_is_there(name: str) -> None:
    parts = name.split(".")
    length = next(
        n for n in range(1, len(parts)) if (ROOT / "dora_vl" / "/".join(parts[:n])).with_suffix(".py").is_file()
    )
    scope: ast.AST = ast.parse((ROOT / "dora_vl" / "/".join(parts[:length])).with_suffix(".py").read_text("utf-8"))
    for part in parts[length:]:
        kinds = (ast.FunctionDef, ast.ClassDef)
        scope = next(node for node in ast.iter_child_nodes(scope) if isinstance(node, kinds) and node.name == part)


TRACED = """
import json, runpy, sys
called = set()
def trace(frame, event, argument):
    code = frame.f_code
    if event == "call" and "/dora_vl/" in code.co_filename:
        module = code.co_filename.rpartition("/dora_vl/")[2].removesuffix(".py").replace("/", ".")
        called.add(f"{module}.{code.co_qualname}")
from dora_vl.heads import next_token
next_token.SMALL_VOCABULARY = 0  # losses in chunks, as of a published one
script, *sys.argv[1:] = sys.argv[1:]
sys.setprofile(trace)
try:
    runpy.run_path(script, run_name="__main__")
finally:
    sys.setprofile(None)
    print(json.dumps(sorted(called)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="a frame has no qualified name before Python 3.11")
def test_a_run_with_a_test_calls_every_function_of_both_paths(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data", samples=8)
    config = write_run(
        tmp_path / "run.yaml",
        write_tiny_llava(tmp_path / "base"),
        data,
        training={"max_steps": 2, "warmup_steps": 0},
        evaluation={"file": str(data), "image_folder": str(data.parent)},
    )
    run = subprocess.run(
        [sys.executable, "-c", TRACED, "dora_vl/cli.py", "train", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    called = set(json.loads(run.stdout.splitlines()[-1]))
    classes = {name.rpartition(".")[0] for name in called}
    assert [name for name in NAMES if name not in called | classes] == []
