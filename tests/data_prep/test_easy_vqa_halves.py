"""easy-VQA in halves: no picture and no kind of question in both, and the test asks what was adapted to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.easy_vqa_halves import main
from dora_vl.data.example import Example, iterate_examples
from tests.data_prep.test_easy_vqa import write_split


@pytest.fixture
def halves(tmp_path: Path) -> dict[str, list[Example]]:
    package = tmp_path / "easy_vqa"
    write_split(package, "train", 8)
    write_split(package, "test", 3)
    (package / "answers.txt").write_text("yes\nno\ncircle\ntriangle\nred\nblue\nteal")
    main(["--from", str(package), "--to", str(tmp_path / "records")])
    manifest = json.loads((tmp_path / "records" / "manifest.json").read_text())
    found = {
        name: list(iterate_examples(tmp_path / "records" / f"{name}.jsonl")) for name in ("pretrain", "adapt", "test")
    }
    assert {name: manifest[name]["questions"] for name in found} == {name: len(rows) for name, rows in found.items()}
    return found


def test_no_picture_and_no_kind_is_in_both_halves(halves: dict[str, list[Example]]) -> None:
    pictures = {name: {example.images[0] for example in rows} for name, rows in halves.items()}
    kinds = {name: {example.extra["kind"] for example in rows} for name, rows in halves.items()}
    assert pictures["pretrain"].isdisjoint(pictures["adapt"])
    assert len(pictures["pretrain"] | pictures["adapt"]) == 8
    assert kinds == {
        "pretrain": {"yes/no", "yes/no negated"},
        "adapt": {"color", "shape"},
        "test": {"color", "shape"},
    }
    assert all(one.startswith("test/images/") for one in pictures["test"])


def test_answers_are_the_packages_and_the_first_half_says_what_it_sees(halves: dict[str, list[Example]]) -> None:
    assert {one.answers[0].text for one in halves["adapt"]} <= {"red", "blue", "teal", "circle"}
    said = {one.answers[0].text.partition(", so ")[0] for one in halves["pretrain"]}
    assert said <= {f"{color} circle, {there}" for color in ("red", "blue", "teal") for there in ("present", "absent")}
    assert len(halves["adapt"]) == 4 * 2
    assert len(halves["test"]) == 3 * 2
