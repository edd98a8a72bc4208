"""easy-VQA to LLaVA JSON and in halves: held out by picture, shuffled by seed, nothing lost, the answers kept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.easy_vqa_halves import main as halve
from dora_vl.data.example import Example, iterate_examples
from dora_vl.errors import UserError
from dora_vl.start.easy_vqa import PLACEHOLDER, Question, balanced, convert, shows

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


def read(folder: Path, split: str) -> list[dict]:
    return json.loads((folder / f"{split}.json").read_text())


def question_in(record: dict) -> tuple[str, str]:
    """A record's question without the picture's placeholder, and its answer without what it says it sees first."""
    asked, answered = record["conversations"]
    assert (asked["from"], answered["from"]) == ("human", "gpt")
    assert asked["value"].count(PLACEHOLDER) == 1
    return asked["value"].removeprefix(f"{PLACEHOLDER}\n"), answered["value"].rpartition(", so ")[2]


def test_every_question_is_asked_once_about_its_own_picture(package: Path, tmp_path: Path) -> None:
    convert(package, tmp_path / "data", held_out=2, seed=5)
    train, validation = read(tmp_path / "data", "train"), read(tmp_path / "data", "validation")
    assert {r["image"] for r in train}.isdisjoint({r["image"] for r in validation})
    assert len({r["image"] for r in validation}) == 2
    rows = json.loads((package / "train/questions.json").read_text())
    published = Counter((f"train/images/{number}.png", text, answer) for text, answer, number in rows)
    written = Counter((record["image"], *question_in(record)) for record in train + validation)
    assert written == published  # as many ask for what is shown as for what is not: balance leaves none out
    assert len({r["id"] for r in train + validation}) == len(train + validation)
    test = read(tmp_path / "data", "test")  # the package's own, in another order
    rows = json.loads((package / "test/questions.json").read_text())
    for record in test:
        text, answer, number = rows[int(record["id"].rsplit("-", 1)[1])]
        assert (record["image"], *question_in(record)) == (f"test/images/{number}.png", text, answer)
    assert [record["id"] for record in test] != sorted(record["id"] for record in test)
    assert Counter(record["kind"] for record in test) == {"color": 3, "shape": 3, "yes/no": 9, "yes/no negated": 6}


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


@pytest.mark.parametrize(
    "questions",
    [
        '[["is it?", "maybe", 0]]',
        "[1",
        '[["what shape is it?", ["circle"], 0]]',
        '[["q", "circle", []]]',
        None,  # a picture that is not there
    ],
)
def test_broken_packages_are_refused(package: Path, tmp_path: Path, questions: str | None) -> None:
    if questions is None:
        (package / "train/images/4.png").unlink()
    else:
        (package / "train/questions.json").write_text(questions)
    with pytest.raises(UserError):
        convert(package, tmp_path / "data", held_out=1)
    (package / "answers.txt").unlink()
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
    splits = {split: read(tmp_path / "data", split) for split in ("train", "validation", "test")}
    assert splits == json.loads(Path(__file__).with_name("easy_vqa_splits.json").read_text(encoding="utf-8"))
    assert manifest["left_out_undescribed"] == 5


@pytest.fixture
def halves(tmp_path: Path) -> dict[str, list[Example]]:
    package = tmp_path / "easy_vqa"
    write_split(package, "train", 8)
    write_split(package, "test", 3)
    (package / "answers.txt").write_text("yes\nno\ncircle\ntriangle\nred\nblue\nteal")
    halve(["--from", str(package), "--to", str(tmp_path / "records")])
    manifest = json.loads((tmp_path / "records" / "manifest.json").read_text())
    splits = {
        name: list(iterate_examples(tmp_path / "records" / f"{name}.jsonl")) for name in ("pretrain", "adapt", "test")
    }
    assert {name: manifest[name]["questions"] for name in splits} == {name: len(rows) for name, rows in splits.items()}
    return splits


def test_no_picture_and_no_kind_is_in_both_halves(halves: dict[str, list[Example]]) -> None:
    pictures = {name: {example.images[0] for example in rows} for name, rows in halves.items()}
    kinds = {name: {example.extra["kind"] for example in rows} for name, rows in halves.items()}
    assert pictures["pretrain"].isdisjoint(pictures["adapt"])
    assert len(pictures["pretrain"] | pictures["adapt"]) == 8
    assert kinds == {"pretrain": {"yes/no", "yes/no negated"}, "adapt": {"color", "shape"}, "test": {"color", "shape"}}
    assert all(picture.startswith("test/images/") for picture in pictures["test"])


def test_pictures_of_the_second_half_can_be_held_out(tmp_path: Path) -> None:
    package = tmp_path / "easy_vqa"
    write_split(package, "train", 8)
    write_split(package, "test", 3)
    (package / "answers.txt").write_text("yes\nno\ncircle\ntriangle\n" + "\n".join(COLORS))
    halve(["--from", str(package), "--to", str(tmp_path / "all")])
    halve(["--from", str(package), "--to", str(tmp_path / "part"), "--validation", "1"])
    rows, (adapt, validation) = (
        [list(iterate_examples(tmp_path / folder / f"{name}.jsonl")) for name in names]
        for folder, names in (("all", ["adapt"]), ("part", ["adapt", "validation"]))
    )
    assert len({row.images for row in validation}) == 1
    assert not {row.images for row in validation} & {row.images for row in adapt}
    assert {row.id for row in rows[0]} == {row.id for row in [*adapt, *validation]}


def test_answers_are_the_packages_and_the_first_half_says_what_it_sees(halves: dict[str, list[Example]]) -> None:
    assert {example.answers[0].text for example in halves["adapt"]} <= {"red", "blue", "teal", "circle"}
    seen = {example.answers[0].text.partition(", so ")[0] for example in halves["pretrain"]}
    assert seen <= {f"{color} circle, {state}" for color in ("red", "blue", "teal") for state in ("present", "absent")}
    assert len(halves["adapt"]) == 4 * 2
    assert len(halves["test"]) == 3 * 2
