"""Answers among tokens, where a processor tells no characters or counts from another beginning."""

from __future__ import annotations

from dora_vl.backbones.processor_chat import Chat
from dora_vl.backbones.text_processor import from_chat, from_prefixes, from_token_types

TEXT = "<i>ask:yes.more:no."
CHAT = Chat(TEXT, ((7, 11), (16, 19)))
LETTERS = list(range(100, 100 + len(TEXT)))


def letters_of(text: str) -> list[int]:
    """A token a letter, and five for a picture."""
    return [7] * 5 + LETTERS[3 : len(text)] if text.startswith("<i>") else []


def test_beginnings_tell_answers_and_the_end_of_pictures() -> None:
    ids = letters_of(TEXT)
    offsets, moves = from_prefixes(CHAT, ids, letters_of, picture="<i>")
    assert moves == [((0, 3), (0, 3))]
    assert offsets == [(0, 3)] * 5 + [(0, 0)] * 4 + [(7, 11)] * 4 + [(0, 0)] * 5 + [(16, 19)] * 3


def test_a_beginning_whose_last_token_is_joined_to_what_follows() -> None:
    def joined(text: str) -> list[int]:
        ids = letters_of(text)
        return [*ids[:8], 999, *ids[10:]] if len(ids) > 9 else ids  # ":y" is one token of the whole text

    offsets, _ = from_prefixes(CHAT, joined(TEXT), joined, picture="<i>")
    assert offsets[8:12] == [(7, 11)] * 4  # and is trained, since the answer begins in it


def test_a_text_that_begins_with_a_token_of_the_processor_s() -> None:
    chat = Chat("ab<i>c", ((5, 6),))
    told = [(0, 3), (3, 5), (5, 7), (7, 9), (9, 10)]  # <s> ab <i><i> c
    offsets, moves = from_chat(chat, told, [((5, 8), (5, 9))], begin="<s>")
    assert offsets == [(0, 0), (0, 2), (2, 4), (4, 6), (6, 7)]
    assert moves == [((2, 5), (2, 6))]
    same = from_chat(Chat("<s>ab", ((3, 5),)), [(0, 3), (3, 5)], [], begin="<s>")
    assert same.offsets == [(0, 3), (3, 5)]


def test_token_types() -> None:
    chat = Chat("ask", ((3, 4),), suffix="yes", by_token_types=True)
    offsets, moves = from_token_types(chat, [0, 0, 1, 1])
    assert offsets == [(0, 3), (0, 3), (3, 4), (3, 4)]
    assert moves == [((0, 3), (0, 3))]
