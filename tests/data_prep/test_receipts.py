"""Drawn receipts: one seed gives the same files, and every question has several answers that its pictures decide."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from data_prep.receipts import QUESTIONS, SHOPS, main


def test_the_table_says_what_the_pictures_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        main(["--to", str(tmp_path / name), "--count", "24"])
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*")) for name in ("a", "b")
    ]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / one).read_bytes() == (tmp_path / "b" / one).read_bytes() for one in files[0])
    with (tmp_path / "a" / "questions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [len({row["answer"] for row in rows if row["question"] == one}) > 1 for one in QUESTIONS] == [True] * 3
    for row in rows:
        picture = Image.open(tmp_path / "a" / "photos" / row["image"])
        if row["question"] == QUESTIONS[0]:
            band = picture.getpixel((80, 20))  # above the name, of the shop's colour, lighter or darker
            assert isinstance(band, tuple)
            best = max(SHOPS, key=lambda shop: _likeness(SHOPS[shop], band))
            assert row["answer"] == best
    with pytest.raises(SystemExit) as status:
        main(["--to", str(tmp_path / "a")])
    assert status.value.code == 2


def _likeness(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    length = (sum(part**2 for part in one) * sum(part**2 for part in other)) ** 0.5
    return sum(map(float.__mul__, map(float, one), map(float, other))) / length
