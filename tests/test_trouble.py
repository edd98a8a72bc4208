"""docs/trouble.md: every line that it shows is one that the code prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.test_documented_commands import blocks

ROOT = Path(__file__).parents[1]
LINES = [
    line
    for block in blocks((ROOT / "docs" / "trouble.md").read_text(encoding="utf-8"), "text")
    for line in block.splitlines()
]
LEAST = 8
"""Letters that a message has beside what is put into it; a shorter one would fit any line."""
PUT_IN = re.compile(r"%[-\d.]*[sdfg]|\{[^{}]*\}")


def messages(tree: ast.AST) -> Iterator[list[str]]:
    """The texts of a module, each as the parts that stand between what is put in."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "%s" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            text = node.value
        else:
            continue
        parts = PUT_IN.split(text)
        if len(re.findall("[A-Za-z]", "".join(parts))) >= LEAST:
            yield parts


@cache
def printed() -> list[list[str]]:
    files = (ROOT / "dora_vl").rglob("*.py")
    return [parts for path in files for parts in messages(ast.parse(path.read_text(encoding="utf-8")))]


def said(line: str) -> float:
    """The share of a line's letters that stand in messages of the code, each of them whole."""
    covered: set[int] = set()
    for parts in printed():
        if all(part in line for part in parts):
            match = re.search(".+?".join(f"({re.escape(part)})" for part in parts), line)
            spans = [match.span(number) for number in range(1, len(parts) + 1)] if match else []
            covered |= {place for start, end in spans for place in range(start, end)}
    letters = {place for place, letter in enumerate(line) if letter.isalpha()}
    return len(letters & covered) / len(letters)


def test_there_are_lines() -> None:
    assert len(LINES) > 15


@pytest.mark.parametrize("line", LINES)
def test_the_code_prints_it(line: str) -> None:
    assert said(line) > 0.3


@pytest.mark.parametrize("line", LINES[2:8])
def test_another_wording_is_found(line: str) -> None:
    assert said(re.sub(r"\b(the|is|of|to|a)\b", "some", line)) < said(line) - 0.2
