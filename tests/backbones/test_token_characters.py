"""Answers and pictures among tokens, where a processor tells no characters or counts from another beginning."""

from __future__ import annotations

from dora_vl.backbones.pieces import from_offsets, from_prefixes, from_token_types
from dora_vl.backbones.templates import Chat

TEXT = "<i>ask:yes.more:no."
CHAT = Chat(TEXT, ((7, 11), (16, 19)))
TRAINED = [False] * 9 + [True] * 4 + [False] * 5 + [True] * 3
LETTERS = list(range(100, 100 + len(TEXT)))


def letters_of(text: str) -> list[int]:
    """A token a letter, and five for a picture."""
    return [7] * 5 + LETTERS[3 : len(text)] if text.startswith("<i>") else []


def test_beginnings_tell_answers_and_the_end_of_pictures() -> None:
    assert from_prefixes(CHAT, letters_of(TEXT), letters_of, picture="<i>") == (TRAINED, 5)


def test_a_picture_after_an_answer_trains_nothing_before_it() -> None:
    text = "ask:yes.<i>more:no."
    ids = [number for number, _ in enumerate(text)]
    roles = from_prefixes(Chat(text, ((4, 8), (16, 19))), ids, lambda part: ids[: len(part)], picture="<i>")
    assert roles == ([False] * 4 + [True] * 4 + [False] * 8 + [True] * 3, 11)


def test_a_beginning_whose_last_token_is_joined_to_what_follows() -> None:
    def joined(text: str) -> list[int]:
        ids = letters_of(text)
        return [*ids[:8], 999, *ids[10:]] if len(ids) > 9 else ids  # ":y" is one token of the whole text

    trained, _ = from_prefixes(CHAT, joined(TEXT), joined, picture="<i>")
    assert trained[8:12] == [True] * 4  # the first of them too, since the answer begins in it


def test_a_text_that_begins_with_a_token_of_the_processor_s() -> None:
    chat = Chat("ab<i>c", ((5, 6),))
    told = [(0, 3), (3, 5), (5, 7), (7, 9), (9, 10)]  # <s> ab <i><i> c
    assert from_offsets(chat, told, [((5, 8), (5, 9))], begin="<s>") == ([False] * 4 + [True], 4)
    assert from_offsets(Chat("<s>ab", ((3, 5),)), [(0, 3), (3, 5)], [], begin="<s>") == ([False, True], 0)


def test_token_types() -> None:
    assert from_token_types([0, 0, 1, 1]) == ([False, False, True, True], 2)
