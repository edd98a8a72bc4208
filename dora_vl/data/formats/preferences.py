"""Preferences: a chosen answer and what is worse, or an answer that is judged good or bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from dora_vl.data.column_names import Row, flag_of, is_empty, plain_name, without_nulls
from dora_vl.data.conversation import CALLING, ROLES, as_text, listed, with_thoughts
from dora_vl.data.example import Example
from dora_vl.data.formats.conversations import messages_in, prompt_completion
from dora_vl.data.formats.instructions import instruction_output
from dora_vl.data.formats.questions import question_answer
from dora_vl.data.formats.row_format import Candidates, Resolved, Roles, RowFormat, ends_asking
from dora_vl.data.pictures import picture_name
from dora_vl.data.turns import CALLS, Turn, Unusable, refuse_places
from dora_vl.errors import EMPTY_ANSWER, short_repr


def _messages(row: Row) -> Sequence[object]:
    """Returns the conversation that ends with the chosen, or the judged, answer, by the format that asks for it."""
    for prompt, reply, messages in (
        ("messages", "completion", partial(messages_in, key="messages")),
        ("conversations", "completion", partial(messages_in, key="conversations")),
        ("prompt", "completion", prompt_completion),
        ("instruction", "output", instruction_output),
        ("question", "answer", question_answer),
    ):
        if prompt in row:
            conversation = messages({**row, reply: row["chosen"]} if "chosen" in row else row)
            _refuse_other_turns(conversation, row)
            return conversation
    chosen, rejected = (messages_in(row, key) for key in ("chosen", "rejected"))
    if [*chosen[:-1]] != [*rejected[:-1]]:
        raise Unusable(OTHER_TURNS)
    return chosen


OTHER_TURNS = "its chosen and rejected conversations differ before their last answers"


def _refuse_other_turns(conversation: Sequence[object], row: Row) -> None:
    """Refuses rejected messages whose turns before the last are not those before the chosen answer."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(rejected, list) or not any(isinstance(message, Mapping) for message in rejected):
        return
    earlier = [*map(_bare, rejected[:-1])]
    before = [*map(_bare, conversation[:-1])]
    if before[len(before) - len(earlier) :] != earlier or (isinstance(chosen, list) and len(chosen) > len(rejected)):
        raise Unusable(OTHER_TURNS)


def _bare(message: object) -> object:
    """Returns a message's text, whatever its keys are called."""
    if isinstance(message, Turn):
        return {"role": message.role, "content": message.text}
    if not isinstance(message, Mapping):
        return message
    names = {"from": "role", "value": "content"}
    fields = {names.get(key, key): value for key, value in without_nulls(message).items()}
    speaker = fields.get("role")
    return {**fields, "role": ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker}


def _refuse_untrained(example: Example) -> None:
    last = example.turns[-1]
    if last.more or not last.is_trained:
        raise Unusable("its last answer calls a tool or is not to be trained; preferences compare only texts")


def _compared(example: Example, resolved: Resolved) -> Example:
    """Adds the rejected answers and the pictures that they are about; without answers the chosen one is about these."""
    _refuse_untrained(example)
    row, stored = resolved.fields, dict(example.image_bytes)
    names = [picture_name(value, "rejected_images", stored) for value in listed(row.get("rejected_images"))]
    others = () if names == [*example.images] else tuple(names)
    if others and len(others) != len(example.images):
        raise Unusable(f"it has {len(example.images)} pictures and {len(others)} rejected_images")
    chosen = example.turns[-1].text
    rejected = (chosen,) if is_empty(row.get("rejected")) and others else _rejected(row.get("rejected"))
    refuse_places(rejected, has_videos=bool(example.videos), kind="rejected answer")
    if not others and chosen.strip() in {text.strip() for text in rejected}:
        raise Unusable("its rejected answer is the chosen one")
    return replace(example, rejected=rejected, rejected_images=others, image_bytes=stored)


def _rejected(value: object) -> tuple[str, ...]:
    """Reads rejected answers: a text, a message, a conversation that ends with one, or a list of texts."""
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        texts = [*value]
    else:
        message = value[-1] if isinstance(value, list) and value else value
        fields = message if isinstance(message, Mapping) else {}
        if not is_empty(fields.get(CALLS)) or fields.get("from", fields.get("role")) in CALLING:
            raise Unusable("its rejected answer calls a tool; preferences compare only texts")
        text = fields.get("content", fields.get("value")) if fields else message
        if isinstance(text, list):  # a list of parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, Mapping))
        texts = [with_thoughts(as_text(text, "rejected"), fields)]
    if not all(text.strip() for text in texts):
        raise Unusable("its rejected answer is empty", EMPTY_ANSWER)
    return tuple(texts)


def _is_judged(row: Row, candidates: Candidates, roles: Roles) -> bool:
    """Tells whether a cell judges the answer: a label may also be the answer to the last question, or a class."""
    filled = [name for names in candidates["judged"] for name in names if not is_empty(row[name])]
    if not filled:
        return False
    name = filled[0]
    if "completion" in candidates or "kto_tag" in (plain_name(name), roles.get(name)):
        return True  # whatever it holds: what is not a flag makes a bad sample, where the answer could be a bad one
    # 1 and 0 do not say which it is.
    return not ends_asking(row) and (name in roles or flag_of(row[name], numbers=False) is not None)


def _judged(example: Example, resolved: Resolved) -> Example:
    """Adds whether the answer is one to learn or one to avoid."""
    _refuse_untrained(example)
    value = resolved.fields["judged"]
    is_good = flag_of(value)
    if is_good is None and not isinstance(value, bool):
        is_good = {"desirable": True, "undesirable": False, "-1": False, "-1.0": False}.get(str(value).strip().lower())
    if is_good is None:
        column = short_repr(resolved.column_of("judged"))
        raise Unusable(f"{column} says whether the answer is good: write true or false, got {short_repr(value)}")
    return replace(example, is_good=is_good)


_compares = partial(RowFormat, "preferences", messages=_messages, complete=_compared)
_judges = partial(RowFormat, "judged answers", messages=_messages, fits=_is_judged, complete=_judged)
PREFERENCES = (
    _compares(("conversations", "chosen", "rejected"), uses=("rejected_images",)),
    _compares(("messages", "chosen", "rejected"), uses=("rejected_images",), fits=ends_asking),
    _compares(("messages", "rejected"), uses=("rejected_images",)),
    _compares(("messages", "rejected_images")),
    _compares(("prompt", "chosen", "rejected"), uses=("history", "rejected_images")),
    _compares(("instruction", "chosen", "rejected"), uses=("input", "history")),
    _compares(("question", "chosen", "rejected"), uses=("hint", "history")),
    _compares(("chosen", "rejected")),
    _judges(("prompt", "completion", "judged"), uses=("history",)),
    _judges(("messages", "judged")),
    _judges(("conversations", "judged")),
    _judges(("instruction", "output", "judged"), uses=("input", "history")),
)
