"""What a row holds and no reader would use, though it belongs to the sample: named, never dropped without a word.

Columns of text or numbers that no format knows are notes (source, split, category), and stay out of the sample.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from dora_vl.data.media import numbered_columns
from dora_vl.errors import BadSample, shown

TALKS = ("conversations", "messages", "prompt", "completion")
"""Columns that may hold a list of turns."""
MARKS = ("loss", "weight")
"""How ms-swift and OpenAI's files say of an answer whether it is trained."""
BESIDE_A_QUESTION = ("choices", "options", "context", "input")


def refuse_media_left_out(row: Mapping[str, object], sample_id: str, read: Container[str]) -> None:
    """Refuses bytes, and objects of `bytes` and `path`, in any other column than those that are `read`.

    Numbered pictures are read too.

    Raises:
        BadSample: with the column's name.
    """
    found = [name for name, value in row.items() if name not in read and _is_media(value)]
    left = [name for name in found if name not in numbered_columns(found)]
    if left:
        told = "name it 'image' if it is a picture, else take it out of the file"
        raise BadSample(sample_id, f"its {shown(left[0], 30)} holds bytes that nothing reads; {told}")


def _is_media(value: object) -> bool:
    if isinstance(value, list):  # columns of a table hold one kind
        value = next((one for one in value if one is not None), None)
    if isinstance(value, dict):
        return _is_media(value.get("bytes")) or (value.keys() == {"bytes", "path"} and bool(value["path"]))
    return isinstance(value, bytes | bytearray) and bool(value)


def refuse_marked_turns(row: Mapping[str, object], sample_id: str) -> None:
    """Refuses an answer that its row marks as one not to be trained, or by another weight than 1; here every one is.

    Raises:
        BadSample: with the turn and the mark. Marks of the user's turns say nothing.
    """
    for column in TALKS:
        turns = row.get(column)
        for number, turn in enumerate(turns if isinstance(turns, list) else (), 1):
            if not isinstance(turn, dict) or ("loss" not in turn and "weight" not in turn):
                continue
            speaker = turn.get("from") if turn.get("role") is None else turn["role"]
            name = next((name for name in MARKS if _is_untrained(name, turn.get(name))), None)
            if name is not None and speaker not in ("user", "human", "system", "developer"):
                told = "but every answer is trained; leave out the mark, or the row"
                raise BadSample(sample_id, f"turn {number} has {name!r} {shown(turn[name])}, {told}")


def _is_untrained(name: str, mark: object) -> bool:
    if not isinstance(mark, int | float) or mark != mark:  # what pandas writes for nothing
        return False
    return mark == 0 if name == "loss" else mark != 1


def refuse_beside(row: Mapping[str, object], question: str, asked: str, sample_id: str) -> None:
    """Refuses choices and contexts that stand in columns beside a question, unless its own words hold them.

    Raises:
        BadSample: with the column's name.
    """
    for name in BESIDE_A_QUESTION:
        value = row.get(name)
        texts = value if isinstance(value, list) else [value]
        if any(not _is_said(text, asked) for text in texts):
            more = ", or use records (docs/data.md)" if name in ("choices", "options") else ""
            told = f"it has {name!r} that would not be asked with {question!r}; write both into {question!r}{more}"
            raise BadSample(sample_id, told)


def _is_said(value: object, asked: str) -> bool:
    """Whether the question's words hold these, as whole words; nothing is said by any."""
    if is_nothing(value):
        return True
    return isinstance(value, str) and re.search(rf"(?<!\w){re.escape(value.strip())}(?!\w)", asked) is not None


def is_nothing(value: object) -> bool:
    """Whether a column is empty: null, blank text, an empty list or object, or the NaN that pandas writes for them."""
    return value is None or (not value.strip() if isinstance(value, str) else value in ([], {}) or value != value)
