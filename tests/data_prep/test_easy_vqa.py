"""easy-VQA to LLaVA JSON and in halves: held out by picture, shuffled by seed, nothing lost, the answers kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data_prep.easy_vqa_halves import main as halve
from dora_vl.data.example import iterate_examples
from dora_vl.errors import UserError
from dora_vl.start.easy_vqa import Question, balanced, convert, shows

ROUNDS_OF_A_PICTURE = [
    ("what color is the shape?", "{color}"),
    ("what is the {color} shape?", "circle"),
    ("is there a circle?", "yes"),
    ("is no circle present?", "no"),
    ("does the image not contain a triangle?", "yes"),
    ("is a triangle present?", "no"),
    ("is there a {color} shape?", "yes"),
]
COLORS = ("red", "blue", "teal")


def write_split(folder: Path, split: str, pictures: int) -> None:
    """Questions in the package's layout: `pictures` circles, seven questions each."""
    (folder / split / "images").mkdir(parents=True)
    rows = []
    for number in range(pictures):
        (folder / split / "images" / f"{number}.png").write_bytes(b"png")
        color = COLORS[number % 3]
        rows += [(text.format(color=color), answer.format(color=color), number) for text, answer in ROUNDS_OF_A_PICTURE]
    (folder / split / "questions.json").write_text(json.dumps(rows))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "easy_vqa"
    write_split(folder, "train", 8)
    write_split(folder, "test", 3)
    (folder / "answers.txt").write_text("yes\nno\ncircle\ntriangle\n" + "\n".join(COLORS))
    return folder


def test_the_same_seed_writes_the_same_bytes_and_the_manifest_says_which(package: Path, tmp_path: Path) -> None:
    manifests = [
        convert(package, tmp_path / name, held_out=2, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert manifests[0] == manifests[1] != manifests[2]
    assert json.loads((tmp_path / "a/manifest.json").read_text()) == manifests[0]
    for split in ("train", "validation", "test"):
        content = (tmp_path / f"a/{split}.json").read_bytes()
        assert manifests[0]["splits"][split]["sha256"] == hashlib.sha256(content).hexdigest()
        assert content != (tmp_path / f"c/{split}.json").read_bytes()


def test_a_package_that_was_not_fetched_is_refused(package: Path, tmp_path: Path) -> None:
    (package / "test/questions.json").unlink()
    with pytest.raises(UserError):
        convert(package, tmp_path / "data", held_out=1)
    assert not (tmp_path / "data").exists()


def test_balance_leaves_out_absent_things_only() -> None:
    samples = [
        Question(index=0, text="is there a circle?", answer="yes", picture=0),
        Question(index=1, text="is no circle present?", answer="no", picture=0),
        Question(index=2, text="what color is the shape?", answer="red", picture=0),
        *(Question(index=i, text="is there a teal shape?", answer="no", picture=i) for i in range(3, 8)),
        *(Question(index=i, text="is no teal shape present?", answer="yes", picture=i) for i in range(8, 13)),
    ]
    assert [shows(question) for question in samples[:2] + samples[3:4] + samples[8:9]] == [True, True, False, False]
    kept = balanced(samples, seed=1)
    assert [question.index for question in kept[:3]] == [0, 1, 2]
    assert len(kept) == 3 + 2
    assert balanced(samples[:3], seed=1) == samples[:3]


def test_splits_are_the_written_ones(package: Path, tmp_path: Path) -> None:
    """Answers with reasons, those about pictures that nobody described left out, the test's as published."""
    rows = json.loads((package / "train/questions.json").read_text())
    undescribed = [row for row in rows if row[2] != 5 or row[1] in {"yes", "no"}]
    (package / "train/questions.json").write_text(json.dumps(undescribed))
    manifest = convert(package, tmp_path / "data", held_out=2)
    names = ("train", "validation", "test")
    splits = {split: json.loads((tmp_path / "data" / f"{split}.json").read_text()) for split in names}
    assert splits == json.loads(Path(__file__).with_name("easy_vqa_splits.json").read_text(encoding="utf-8"))
    assert manifest["left_out_undescribed"] == 5


def test_halves_share_no_picture_and_no_kind_and_some_pictures_are_held_out(package: Path, tmp_path: Path) -> None:
    halve(["--from", str(package), "--to", str(tmp_path / "records"), "--validation", "1"])
    manifest = json.loads((tmp_path / "records" / "manifest.json").read_text())
    names = ("pretrain", "adapt", "validation", "test")
    halves = {name: list(iterate_examples(tmp_path / "records" / f"{name}.jsonl")) for name in names}
    assert {name: manifest[name]["questions"] for name in names} == {name: len(rows) for name, rows in halves.items()}
    pictures = {name: {example.images[0] for example in rows} for name, rows in halves.items()}
    assert [len(pictures[name]) for name in names] == [4, 3, 1, 3]
    assert len(pictures["pretrain"] | pictures["adapt"] | pictures["validation"]) == 8
    kinds = {name: {example.extra["kind"] for example in rows} for name, rows in halves.items()}
    words = {"color", "shape"}
    assert kinds == {"pretrain": {"yes/no", "yes/no negated"}, "adapt": words, "validation": words, "test": words}
    assert {example.answers[0].text for example in halves["adapt"]} <= {*COLORS, "circle"}
    seen = {example.answers[0].text.partition(", so ")[0] for example in halves["pretrain"]}
    assert seen <= {f"{color} circle, {state}" for color in COLORS for state in ("present", "absent")}
