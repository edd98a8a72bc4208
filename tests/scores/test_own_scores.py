"""Scores for one's own benchmarks, against values written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.example import Answer, Example
from dora_vl.evaluation.scores import exact as own_scores


def asked(name: str, *answers: str, **extra: object) -> Example:
    return Example(id=name, answers=tuple(Answer(text=text) for text in answers), extra=extra)


@pytest.mark.parametrize(
    ("said", "true", "points"),
    [
        ("Hello World", " hello  world", 1.0),
        ("hello worle", "hello world", 10 / 11),
        ("kitten", "sitting", 4 / 7),  # three edits
        ("abcd", "abxy", 0.0),  # one half is not above one half
        ("abcde", "abcxy", 0.6),
        ("", "a", 0.0),
        ("", "", 1.0),
        ("a" * 1_000_000, "b", 0.0),
    ],
)
def test_anls(said: str, true: str, points: float) -> None:
    assert own_scores.similarity(said, true) == pytest.approx(points)
    assert own_scores.similarity(true, said) == pytest.approx(points)


WORDS = st.text(alphabet="ab c", max_size=7)


def distance(first: str, second: str) -> int:
    """Levenshtein's recursion as it is defined."""
    if not first or not second:
        return len(first) + len(second)
    rest = distance(first[1:], second[1:]) + (first[0] != second[0])
    return min(rest, distance(first[1:], second) + 1, distance(first, second[1:]) + 1)


@given(first=st.text(alphabet="abc", max_size=5), second=st.text(alphabet="abc", max_size=5))
def test_anls_is_by_the_edit_distance(first: str, second: str) -> None:
    longer = max(len(first), len(second), 1)
    share = 1 - distance(first, second) / longer
    assert own_scores.similarity(first, second) == pytest.approx(share if share > 0.5 else 0.0)


@pytest.mark.parametrize(
    ("said", "true", "right"),
    [
        ("105", "100", True),
        ("95.0", "100", True),
        ("105.1", "100", False),
        ("-105", "-100", True),
        ("10.2%", "0.1", True),
        ("12%", "12", False),
        ("0", "0", True),
        ("0.001", "0", False),  # nothing is within five percent of zero
        ("Yes", "yes ", True),
        ("yess", "yes", False),
        ("nan", "100", False),
        ("12 apples", "12", False),
    ],
)
def test_relaxed(said: str, true: str, right: bool) -> None:
    assert own_scores.is_close(said, true) is right


def test_the_best_of_several_right_answers_counts_and_kinds_are_shown() -> None:
    examples = [asked("1", "a dog", "Dog", kind="animal"), asked("2", "4", kind="number"), asked("3", "x")]
    scored = own_scores.exact(examples, {"1": "dog.", "2": "5"})
    assert scored.metrics == pytest.approx({"accuracy": 100 / 3, "kind/animal": 100.0, "kind/number": 0.0})
    assert scored.failed == ("3",)
    assert own_scores.anls(examples, {"1": "dogs", "2": "4"}).metrics["anls"] == pytest.approx(100 * (0.75 + 1) / 3)
    assert own_scores.relaxed(examples, {"2": "4.1"}).metrics["relaxed accuracy"] == pytest.approx(100 / 3)


def test_choices_by_letter_or_text() -> None:
    examples = [Example(id=str(n), choices=("red", "pale blue"), extra={"correct": n % 2}) for n in range(4)]
    scored = own_scores.choice(examples, {"0": "A.", "1": "it is pale blue", "2": "B", "3": "neither"})
    assert list(scored.per_item.values()) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("said", "choices", "right"),
    [
        ("10", ("1", "10"), 1),
        ("unknown", ("no", "unknown"), 1),
        ("Cats and dogs.", ("cat", "cats and dogs"), 1),
        ("cat", ("cat", "cats and dogs"), 0),
        ("b", ("yes", "no"), 1),
        ("a.", ("red", "blue"), 0),
        (" B.", ("red", "blue"), 1),
        ("A) red", ("red", "blue"), 0),
        ("CO", ("Co", "CO"), 1),
        ("A", ("B", "A"), 0),  # the prompt asks for a letter
        ("a", ("b", "a"), 1),
        ("10 or 1", ("1", "10"), None),
        ("co", ("Co", "CO"), None),
    ],
)
def test_a_choice_that_is_said_exactly_is_that_choice(said: str, choices: tuple[str, ...], right: int | None) -> None:
    for correct in range(len(choices)):
        example = Example(id="1", choices=choices, extra={"correct": correct})
        assert own_scores.choice([example], {"1": said}).metrics["accuracy"] == 100.0 * (correct == right)


TEXTS = st.text(alphabet="aB10 .", min_size=2, max_size=5).filter(lambda text: len(own_scores.normalised(text)) > 1)
"""No letters alone: as answers they are letters, whatever the choices' texts."""


@given(choices=st.lists(TEXTS, min_size=2, max_size=4, unique_by=own_scores.normalised), data=st.data())
def test_the_text_of_any_choice_is_that_choice(choices: list[str], data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, len(choices) - 1))
    text = choices[correct]
    said = data.draw(st.sampled_from([text, text.upper(), f" {text}.", "ABCD"[correct], "abcd"[correct]]))
    example = Example(id="1", choices=tuple(choices), extra={"correct": correct})
    assert own_scores.choice([example], {"1": said}).metrics["accuracy"] == 100.0
