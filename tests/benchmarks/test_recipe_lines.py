"""The recipes repeat each other little, as the script counts it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.structure import Counted, count

ROOT = Path(__file__).parents[2]


def test_counts_by_hand(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("a: 1\n\nvariants:\n  x: {b: 1}\n  y: {b: 2}\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "two.yaml").write_text("a: 1\n\nb: 3\n")
    assert count(tmp_path) == Counted(files=2, runs=3, lines=8, distinct=6)


def test_recipes_are_few_and_mostly_their_own() -> None:
    found = count(ROOT / "configs")
    assert found.files <= 20
    assert found.share >= 0.6
