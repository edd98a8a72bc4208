"""Conversations: lists of messages, or a prompt and its completion (LLaVA, OpenAI, ms-swift, TRL, The Cauldron)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from dora_vl.data.column_names import Row, is_empty
from dora_vl.data.example import Example
from dora_vl.data.formats.answers import answer_in, answers_in, with_answers
from dora_vl.data.formats.row_format import Resolved, RowFormat, ends_asking
from dora_vl.data.turns import Unusable
from dora_vl.errors import short_repr

ASKING, REPLYING = ("user", "human", "question"), ("assistant", "gpt", "answer")
"""A round may be one object with these keys (The Cauldron, ms-swift)."""


def messages_in(row: Row, key: str) -> Sequence[object]:
    """Returns a column that must be a list of turns, or of rounds, each an object of a question and its answer."""
    messages = row.get(key)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise Unusable(f"{key!r} must be a list of turns, got {short_repr(messages)}")
    if key not in ("prompt", "completion") and (reply := row.get("completion")):
        replies = reply if isinstance(reply, list) and {*map(type, reply)} == {dict} else [reply]
        said = ({"role": "assistant", "content": entry} for entry in replies)
        messages = [*messages, *(replies if isinstance(replies[0], Mapping) else said)]
    first = messages[0]
    if not isinstance(first, dict) or "role" in first or "from" in first:
        return messages
    turns: list[object] = []
    for number, entry in enumerate(messages, 1):
        fields = entry if isinstance(entry, Mapping) else {}
        asking, replying = ([key for key in keys if key in fields] for keys in (ASKING, REPLYING))
        if len(asking) != 1 or len(replying) != 1:
            known = "role and content, or the user's and the assistant's words"
            raise Unusable(f"entry {number} of {key!r} must hold {known}, got {short_repr(entry)}")
        more = {name: value for name, value in fields.items() if name not in (*asking, *replying)}
        question, answer = round_of(fields[asking[0]], fields[replying[0]])
        turns += [{**more, **question}, answer]
    return turns


def round_of(question: object, answer: object) -> list[dict[str, object]]:
    """Returns a question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def earlier_rounds(row: Row) -> list[object]:
    """Reads `history`, pairs of a question and its answer (ms-swift)."""
    history = row.get("history")
    messages: list[object] = []
    for pair in history if isinstance(history, list) else [] if is_empty(history) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable(f"'history' must hold pairs of a question and an answer, got {short_repr(pair)}")
        messages += round_of(*pair)
    return messages


def prompt_completion(row: Row) -> list[object]:
    """Reads `prompt` and `completion`, each text or a list of messages (TRL)."""
    messages = earlier_rounds(row)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        messages += [{"role": role, "content": row[key]}] if isinstance(row[key], str) else messages_in(row, key)
    return messages


def _answered(
    name: str, key: str, messages: Callable[[Row], Sequence[object]], uses: tuple[str, ...] = ()
) -> RowFormat:
    """Returns the format of messages that an answer in a column of its own ends (TRL's and ms-swift's `solution`)."""

    def with_answer(row: Row) -> Sequence[object]:
        return messages({**row, "completion": answer_in(row["answer"])})

    def complete(example: Example, resolved: Resolved) -> Example:
        return with_answers(example, answers_in(resolved.fields["answer"]))

    return RowFormat(name, (key, "answer"), with_answer, uses, fits=ends_asking, complete=complete)


_CONVERSATIONS, _MESSAGES, _TEXTS = (partial(messages_in, key=key) for key in ("conversations", "messages", "texts"))
CONVERSATIONS = (
    _answered("conversations", "conversations", _CONVERSATIONS),
    _answered("messages", "messages", _MESSAGES),
    _answered("prompt/completion", "prompt", prompt_completion, ("history",)),
    RowFormat("conversations", ("conversations",), _CONVERSATIONS, ("completion",)),
    RowFormat("messages", ("messages",), _MESSAGES, ("completion",)),
    RowFormat("texts", ("texts",), _TEXTS),
    RowFormat("prompt/completion", ("prompt", "completion"), prompt_completion, ("history",)),
)
