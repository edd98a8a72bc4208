"""Rows of questions with answers: prompt/completion, The Cauldron's `texts`, instructions, plain columns, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dora_vl.data.clips import row_clips
from dora_vl.data.examples import Answer, Example, clip_fields
from dora_vl.data.readers.messages import MessageReader
from dora_vl.data.readers.row_pictures import row_pictures
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, shown

QUESTIONS = ("question", "query", "prompt")
ANSWERS = ("answer", "answers", "response", "label", "output")
CAPTIONS = ("caption", "captions", "text", "txt")


def first_of(row: Mapping[str, object], names: Sequence[str]) -> str | None:
    """The first of these columns that the row holds something in."""
    return next((name for name in names if row.get(name) is not None), None)


def read_prompt_completion(row: Mapping[str, object], sample_id: str) -> Example:
    """`prompt` and `completion`, each text or a list of messages (TRL)."""
    reader = MessageReader(row, sample_id)
    sides = {"prompt": "user", "completion": "assistant"}
    turns = [
        reader.turns([{"role": role, "content": row[key]}] if isinstance(row[key], str) else row[key])
        for key, role in sides.items()
    ]
    return reader.example((*turns[0], *turns[1]))


def read_texts(row: Mapping[str, object], sample_id: str) -> Example:
    """`texts`, a list of `user` and `assistant` (The Cauldron); its pictures come before the first question."""
    texts = row["texts"]
    if not isinstance(texts, Sequence) or isinstance(texts, str | bytes) or not texts:
        raise BadSample(sample_id, f"'texts' must be a list of user and assistant, got {shown(texts)}")
    turns: list[Turn] = []
    for number, entry in enumerate(texts, 1):
        sides = [entry.get(side) for side in ("user", "assistant")] if isinstance(entry, Mapping) else []
        if len(sides) != 2 or not all(isinstance(side, str) for side in sides):
            raise BadSample(sample_id, f"entry {number} of 'texts' must hold user and assistant, got {shown(entry)}")
        turns += [Turn("user", str(sides[0])), Turn("assistant", str(sides[1]))]
    return _with_media(row, sample_id, turns=tuple(turns))


def read_instructions(row: Mapping[str, object], sample_id: str) -> Example:
    """`instruction`, `input`, `output`, and where there is one `system` (Alpaca, LLaMA-Factory)."""
    parts = [_text(row[name], name, sample_id) for name in ("instruction", "input") if row.get(name) is not None]
    asked = "\n".join(part for part in parts if part)
    turns = (Turn("user", asked), Turn("assistant", _text(row["output"], "output", sample_id)))
    if row.get("history"):
        raise BadSample(sample_id, "it has a 'history' of earlier rounds; write the whole talk as 'messages'")
    system = row.get("system")
    if system:
        turns = (Turn("system", _text(system, "system", sample_id)), *turns)
    return _with_media(row, sample_id, turns=turns)


def read_columns(row: Mapping[str, object], sample_id: str) -> Example:
    """A question and an answer in columns of their own; of several answers the most frequent, the first of equals."""
    question, answer = first_of(row, QUESTIONS), first_of(row, ANSWERS)
    if question is None or answer is None:
        raise BadSample(sample_id, f"it needs one of {', '.join(QUESTIONS)} and one of {', '.join(ANSWERS)}")
    asked = _text(row[question], question, sample_id)
    return _with_media(row, sample_id, question=asked, answer=_answer(row[answer], answer, sample_id))


def read_caption(row: Mapping[str, object], sample_id: str) -> Example:
    """A picture with a caption and no question."""
    column = first_of(row, CAPTIONS)
    return _with_media(row, sample_id, answer=_answer(row[column], column, sample_id) if column else "")


def _with_media(
    row: Mapping[str, object], sample_id: str, *, turns: tuple[Turn, ...] = (), question: str = "", answer: str = ""
) -> Example:
    pictures = row_pictures(row, sample_id)
    return Example(
        id=sample_id,
        images=tuple(pictures.names),
        image_bytes=pictures.held,
        turns=turns,
        question=question,
        answers=() if turns else (Answer(text=answer),),
        **clip_fields(row_clips(row, sample_id)),
    )


def _answer(value: object, name: str, sample_id: str) -> str:
    listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [_text(one.get("answer") if isinstance(one, Mapping) else one, name, sample_id) for one in listed]
    counted = Counter(text for text in texts if text.strip())
    return counted.most_common(1)[0][0] if counted else ""


def _text(value: object, name: str, sample_id: str) -> str:
    """Text, or a number as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadSample(sample_id, f"{name!r} must hold text, got {shown(value)}")
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits
        raise BadSample(sample_id, f"{name!r} holds {shown(value)}") from None
