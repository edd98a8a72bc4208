"""Answers in a column, of which there may be several right ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dora_vl.data.column_names import lost_content
from dora_vl.data.conversation import UnreadKey, as_text
from dora_vl.data.example import Answer, Example

ANSWER_KEYS = ("answer", "text", "start", "answer_start", "answer_id", "answer_confidence")
"""An object of an answer may hold these keys besides bookkeeping (SQuAD, VQA)."""


def answer_in(value: object, name: str = "answer") -> str:
    """Returns the most frequent of several answers, the first of equals."""
    return next(iter(answers_in(value, name)), "")


def answers_in(value: object, name: str = "answer") -> list[str]:
    """Returns the distinct answers, the most frequent first; each is text or an object, SQuAD's a list in an object."""
    value = _in_object(value)
    listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [as_text(_in_object(entry), name) for entry in listed]
    return [text for text, _ in Counter(text for text in texts if text.strip()).most_common()]


def _in_object(value: object) -> object:
    """Returns the answer or text in an object; anything else unchanged."""
    if not isinstance(value, Mapping):
        return value
    text = next((text for key in ANSWER_KEYS[:2] if (text := value.get(key)) is not None), None)
    for key, entry in value.items() if text is not None else ():
        if key not in ANSWER_KEYS and (loss := lost_content(key, entry)):
            raise UnreadKey(value, *loss)
    return value if text is None else text


def with_answers(example: Example, texts: Iterable[str]) -> Example:
    """Returns the example with its right answers, the trained one first, where there are several."""
    # A half of a surrogate pair, which no file can hold, is spelled out.
    written = [text.encode("utf-8", "backslashreplace").decode() for text in dict.fromkeys(texts)]
    return replace(example, answers=tuple(Answer(text=text) for text in written)) if len(written) > 1 else example
