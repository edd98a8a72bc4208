"""Both normalisers rewrite answers as the official ones do, quirks included."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.evaluation.scores import vqa
from dora_vl.evaluation.scores.vqa import ARTICLES, CONTRACTIONS, DIGITS

SHARED = [
    ("The  Dogs", "dogs"),
    ("two", "2"),
    ("None", "0"),
    ("ten dogs", "10 dogs"),
    ("eleven", "eleven"),
    ("a an the", ""),
    ("dont", "don't"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),  # two apostrophes less: in no table
    ("somebody'd", "somebodyd"),  # loses its apostrophe
    ("Im", "im"),  # the key has a capital that lower-casing took away
    ("3.", "3"),  # the period that the pattern meant to keep
    (".5", ".5"),
    ("3.5", "3.5"),
    ("a.m.", "am"),
    ("red-white", "red white"),  # no space beside the mark: a space
    ("red - white-blue", "red whiteblue"),  # a space beside one: all of them vanish
    ("yes!", "yes"),
    ("yes\n", "yes"),
    ("x" + "." * 40 + "y", "x" + "." * 8 + "y"),  # 32 periods at most
]


@pytest.mark.parametrize(("answer", "expected"), SHARED)
@pytest.mark.parametrize("normalise", [vqa.normalise, vqa.normalise_evalai])
def test_what_both_do(normalise, answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("answer", "official", "evalai"),
    [
        ("1,2/3", "123", "12 3"),  # a comma between digits deletes all punctuation, but EvalAI has no comma left
        ("1,000", "1000", "1000"),
        ("she's", "she's", "she 's"),
        ("two's", "two's", "2 's"),
        ("ow's'at", "'ow's'at", "ow 's'at"),
        ("red,white", "red white", "redwhite"),
        ("what?yes", "what yes", "whatyes"),
        ("theyre?", "they're", "they're"),
        ("let's", "let's", "let 's"),
    ],
)
def test_where_they_differ(answer: str, official: str, evalai: str) -> None:
    assert vqa.normalise(answer) == official
    assert vqa.normalise_evalai(answer) == evalai


def test_the_table_of_contractions_is_the_published_one_without_its_empty_entries() -> None:
    assert len(CONTRACTIONS) == 118  # 120 less two that map to themselves
    assert {"Im", "Ive", "Id've", "I'dve"} < set(CONTRACTIONS)
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert not {"shed", "wed", "well", "id", "shell"} & set(CONTRACTIONS)  # words of their own


@given(st.text(max_size=60))
@pytest.mark.parametrize("normalise", [vqa.normalise, vqa.normalise_evalai])
def test_any_text_ends_in_plain_words(normalise, text: str) -> None:
    words = normalise(text).split(" ")
    assert words == [""] or all(words)
    for word in words:
        assert word not in ARTICLES
        assert word not in DIGITS
        assert word == word.lower()


@given(st.lists(st.sampled_from([*CONTRACTIONS, *DIGITS, *ARTICLES, "1,2", "-", "/", ".", "dog", "?"]), max_size=6))
@pytest.mark.parametrize("normalise", [vqa.normalise, vqa.normalise_evalai])
def test_white_space_around_an_answer_changes_nothing(normalise, words: list[str]) -> None:
    text = " ".join(words)
    assert normalise(f"\t{text} \n") == normalise(text)
