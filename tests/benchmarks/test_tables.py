"""The tables of docs/comparisons.md: those of a kept comparison, computed again from its scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tables import KEPT, PAGE, TABLE, keep, with_tables
from dora_vl.errors import UserError
from tests.report.test_compare import Trainings, compared


def test_a_kept_comparison_gives_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(monkeypatch)
    compared(tmp_path)
    keep(tmp_path / "out", tmp_path / "kept" / "tiny")
    page = with_tables("Text.\n<!-- results: tiny -->\nold\n<!-- end -->\nMore.\n", tmp_path / "kept")
    assert "old" not in page
    assert page.startswith("Text.\n<!-- results: tiny -->\n| ")
    assert page.endswith(" |\n<!-- end -->\nMore.\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "rate", "score", "to the untrained model", "to others"]
    assert [row[0] for row in rows[2:]] == ["dora r4", "dora r8", "lora r4", "lora r8", "untrained"]
    assert [cell.split(" (")[0] for cell in rows[4]] == ["lora r4", "0.0032", "50.0", "+50.0", "dora r4: -25.0"]
    assert with_tables(page, tmp_path / "kept") == page
    file = tmp_path / "kept" / "tiny" / "compare.json"
    record = json.loads(file.read_text())
    record["contrasts"][0]["difference"]["low"] -= 0.1
    file.write_text(json.dumps(record))
    with pytest.raises(UserError):
        with_tables(page, tmp_path / "kept")


def test_the_page_holds_the_tables_of_what_is_kept() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text
    assert {match[2] for match in TABLE.finditer(text)} == {path.name for path in KEPT.glob("*")}
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) < 3_000_000
