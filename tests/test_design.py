"""docs/design.md: every function on the two paths, of a row and of an answer, is where the page says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WAYS = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Where things are added")[0]
NAMES = sorted(set(re.findall(r"`([a-z_]+(?:\.\w+){2,})`", WAYS)))


def test_the_page_tells_of_functions() -> None:
    assert len(NAMES) > 25


@pytest.mark.parametrize("name", NAMES)
def test_the_function_is_there(name: str) -> None:
    parts = name.split(".")
    length = next(
        n for n in range(1, len(parts)) if (ROOT / "dora_vl" / "/".join(parts[:n])).with_suffix(".py").is_file()
    )
    scope: ast.AST = ast.parse((ROOT / "dora_vl" / "/".join(parts[:length])).with_suffix(".py").read_text("utf-8"))
    for part in parts[length:]:
        kinds = (ast.FunctionDef, ast.ClassDef)
        scope = next(node for node in ast.iter_child_nodes(scope) if isinstance(node, kinds) and node.name == part)
