"""Rewards by name against values written out, and functions of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.data.turns import Turn
from dora_vl.errors import SettingError, UserError
from dora_vl.evaluation.rewards import rewards_of

LETTERED = "What is it?\nA. a red cat\nB. a dog\nAnswer with the option's letter from the given choices directly."


def example_of(answer: str, question: str = "What is it?") -> Example:
    return Example("q", turns=(Turn("user", question),), question=question, answers=(Answer(text=answer),))


def points(name: str, right: str, answer: str, question: str = "What is it?", **how: str | None) -> float:
    options = {"answer_format": None, "answer_after": None, **how}
    return rewards_of([name], **options)[name](example_of(right, question), answer)


@pytest.mark.parametrize(
    ("name", "right", "answer", "expected"),
    [
        *(("exact", "Red cat.", " red  CAT", 1.0), ("exact", "red cat", "a red cat", 0.0)),
        *(
            ("anls", "colour", "color", 1 - 1 / 6),
            ("relaxed", "100", "104", 1.0),
            ("vqa", "2 dogs", "The two dogs.", 1.0),
        ),
        ("box", "[10, 20, 30, 40]", "[10, 20, 30, 40]", 1.0),
        ("box", "[0, 0, 10, 10]", "at 2 corners: (5, 0, 15, 10)", 50 / 150),
        ("box", "[0, 0, 10, 10]", "[10, 10, 0, 0]", 0.0),
        ("box", "[0, 0, 10, 10]", "I see none", 0.0),
    ],
)
def test_points_of_an_answer(name: str, right: str, answer: str, expected: float) -> None:
    assert points(name, right, answer) == pytest.approx(expected)


@pytest.mark.parametrize(("answer", "expected"), [("B", 1.0), ("B. a dog", 1.0), ("a dog", 1.0), ("A", 0.0), ("", 0.0)])
def test_a_choice_by_letter_or_text(answer: str, expected: float) -> None:
    assert points("choice", "B", answer, LETTERED) == expected
    with pytest.raises(UserError):
        points("choice", "B", answer)  # a question without choices


def test_the_end_of_an_answer_is_compared_and_a_format_fits_from_end_to_end() -> None:
    assert points("exact", "it is a cat, so no", "a dog, so no", answer_after=", so ") == 1.0
    assert points("exact", "it is a cat, so no", "a dog, so no") == 0.0
    pattern = "<think>.+</think>\\w+"
    assert points("format", "", "<think>a\nb</think>yes", answer_format=pattern) == 1.0
    assert points("format", "", "<think>a</think>yes and no", answer_format=pattern) == 0.0


CAPTIONS = {
    "a.png": ["A red cat sits on a mat.", "The cat is sitting."],
    "b.png": ["Two dogs run along the beach.", "Dogs on a beach in the sun."],
    "c.png": ["A man rides a red bicycle."],
}


def test_a_caption_by_cider_of_coco() -> None:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    rows = [
        Example(f"{image}-{number}", images=(image,), turns=(Turn("user", "Describe."), Turn("assistant", caption)))
        for image, captions in CAPTIONS.items()
        for number, caption in enumerate(captions)
    ]
    drawn = {"a.png": "A cat sits on a red mat.", "b.png": "Two dogs.", "c.png": "A man rides a red bicycle."}
    reward = rewards_of(["cider"], answer_format=None, answer_after=None, examples=lambda: rows)["cider"]
    official = CiderScorer()
    for image, captions in CAPTIONS.items():
        official += (words(drawn[image]), [words(caption) for caption in captions])
    expected = official.compute_score()[1] / 10
    by_picture = {row.images[0]: reward(row, drawn[row.images[0]]) for row in rows}
    assert [*by_picture.values()] == pytest.approx(expected.tolist())
    assert by_picture["c.png"] == pytest.approx(1.0)
    assert reward(rows[0], "") == 0.0


def words(caption: str) -> str:
    return caption.lower().replace(".", "")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(example, answer):\n    return len(answer) - len(example.answers[0].text)\n\n\n"
        "def broken(example, answer):\n    return answer[5]\n\n\n"
        "def endless(example, answer):\n    return float('inf')\n"
    )
    return path


def test_functions_of_a_file_and_of_a_module(own: Path) -> None:
    assert points(f"{own}:length", "cat", "a bird") == 3.0
    rewards = rewards_of(["exact", "os.path:exists"], answer_format=None, answer_after=None)
    assert list(rewards) == ["exact", "os.path:exists"]


@pytest.mark.parametrize("name", ["broken", "endless"])
def test_an_own_function_that_fails_names_the_sample(own: Path, name: str) -> None:
    with pytest.raises(UserError) as error:
        points(f"{own}:{name}", "cat", "dog")
    assert "'q'" in str(error.value)


@pytest.mark.parametrize("name", ["precise", "nowhere.py:f", "no.such.module:f", "os.path:nothing"])
def test_what_is_no_reward_is_refused(name: str) -> None:
    with pytest.raises(SettingError) as error:
        rewards_of([name], answer_format=None, answer_after=None)
    assert error.value.key == "objective.rewards"
