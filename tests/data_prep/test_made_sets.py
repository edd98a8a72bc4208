"""Sets that are made: easy-VQA in halves, scenes of NLVR's kind; the same seed writes the same bytes."""

import hashlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from data_prep import nlvr_scenes
from data_prep.easy_vqa_halves import main as halve
from data_prep.nlvr_scenes import BOX, COLOURS, GAP, SceneShape, claim, draw, examples_of
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


def block(colour: str, level: int) -> SceneShape:
    return SceneShape("square", colour, 40, 80 - 21 * level, 20)


TOWERS = (
    [block("yellow", 0), block("black", 1), block("black", 2)],
    [block("blue", 0)],
    [block("yellow", 0), block("blue", 1)],
)
SHAPES = (
    [SceneShape("circle", "black", 0, 40, 30), SceneShape("circle", "blue", 50, 10, 10)],
    [SceneShape("triangle", "yellow", 30, 70, 30)],
    [SceneShape("square", "blue", 20, 20, 20), SceneShape("circle", "black", 70, 60, 20)],
)
TRUE = {
    "There are exactly two towers with a yellow block at the base",
    "There is a tower with a black block over a yellow block",
    "There is a tower with 3 blocks with a black block at the top",
    "There are 6 blocks",
    "There is a yellow block as the base of a tower with only two blocks",
    "There are two black circles",
    "There is a circle touching the left wall",
    "There is a box with one black circle and a blue circle",
    "Each box contains at least one item",
    "Two boxes contain a black circle",
    "There is no item touching the top",
}
FALSE = {
    "There is one tower with a yellow block at the base",
    "There is a tower with a yellow block over a black block",
    "There are at least three towers with a blue block at the top",
    "There is a tower with 4 blocks",
    "There are three black circles",
    "There is a circle touching the right wall",
    "One box contains a black circle",
    "Each box contains a circle",
}


def said_of(scene: tuple[list[SceneShape], ...], noun: str, draws: int) -> dict[str, bool]:
    order = random.Random(5)
    return {text: is_true(scene) for text, is_true in (claim(order, noun) for _ in range(draws))}


def test_sentences_are_true_of_the_scenes_that_they_describe() -> None:
    sentences = said_of(TOWERS, "block", 30_000) | said_of(SHAPES, "", 60_000)
    checked = {text: value for text, value in sentences.items() if text in TRUE | FALSE}
    assert {text for text, value in checked.items() if value} == TRUE & checked.keys()
    assert len(checked) >= 12  # of many thousand forms, most of these were drawn


def test_a_scene_is_drawn_where_its_items_lie() -> None:
    picture = draw(SHAPES)
    assert picture.size == (400, 100)
    for number, box in enumerate(SHAPES):
        for item in box:
            x, y = number * (BOX + GAP) + item.x + item.size // 2, item.y + 2 * item.size // 3
            assert picture.getpixel((x, y)) == COLOURS[item.colour]
    assert picture.getpixel((125, 50)) == picture.getpixel((275, 3)) == (128, 128, 128)
    assert picture.getpixel((30, 5)) == (211, 211, 211)


def test_words_alone_tell_nothing() -> None:
    rows = [row for number in range(500) for row in examples_of(number, 8, seed=1)[1]]
    labels = Counter(row.answers[0].text for row in rows)
    assert abs(labels["true"] / len(rows) - 0.5) < 0.03
    for word in ("least", "no", "each", "touching", "tower"):
        share = [row.answers[0].text == "true" for row in rows if word in row.question.lower().split()]
        assert len(share) > 30
        assert abs(sum(share) / len(share) - 0.5) < 0.15


def test_the_files_hold_scenes_that_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--to", str(tmp_path), "--scenes", "5", "--validation", "2", "--questions", "3"]
    monkeypatch.setattr(sys, "argv", ["nlvr_scenes", *words])
    nlvr_scenes.main()
    names = ("towers", "boxes", "validation", "questions", "question_talks", "sentence_talks")
    rows = {name: list(iterate_examples(tmp_path / f"{name}.jsonl")) for name in names}
    assert len(rows["towers"]) + len(rows["boxes"]) == 15
    assert [len(rows[name]) for name in ("validation", "questions")] == [6, 20]
    assert all("tower" in row.question for row in rows["towers"])
    assert not any("tower" in row.question for row in rows["boxes"])
    pictures = {name: {example.images[0] for example in examples} for name, examples in rows.items()}
    trained = pictures["towers"] | pictures["boxes"]
    assert not trained & pictures["validation"]
    assert trained == pictures["questions"]
    for name in trained | pictures["validation"]:
        assert Image.open(tmp_path / name).size == (400, 100)
    scene, more, _ = examples_of(0, 6, seed=0)
    expected = {
        "question_talks": [row for row in rows["questions"] if row.images == ("pictures/00000.png",)],
        "sentence_talks": [row for row in more if "tower" not in row.question][:3],
    }
    for name, about in expected.items():
        assert pictures[name] == trained
        turns = rows[name][0].turns
        assert [turn.role for turn in turns] == ["user", "assistant"] * len(about)
        assert [turn.text.count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        questions = [turn.text.removeprefix("<image>\n").partition("\n")[0] for turn in turns[::2]]
        answers = dict(zip(questions, (turn.text for turn in turns[1::2]), strict=True))
        assert answers == {row.question: row.answers[0].text for row in about}
    left = next(row for row in rows["questions"] if row.id == "0-left").answers[0].text
    assert Counter(word.split()[0] for word in left.split(", ")) == Counter(item.colour for item in scene[0])
