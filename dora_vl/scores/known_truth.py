"""Which examples can be scored: those whose right answer the file holds, and whole groups of them.

A test split has none, and its publisher scores it. A file that has most of them is scored without the others, which
are counted and named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.errors import UserError, shown

Group = Callable[[Example], Hashable]
NO_ANSWER = "its record holds no right answer"
GROUP_WITHOUT = "it is scored together with records of which one or more hold no right answer"


def has_answer(example: Example) -> bool:
    """Whether any right answer is there that is not blank."""
    people = example.extra.get("human_answers")
    texts = [answer.text for answer in example.answers]
    texts += [str(one) for one in people] if isinstance(people, list | tuple) else []
    return "correct" in example.extra or any(text.strip() for text in texts)


def right_answer(example: Example) -> str:
    """The first right answer's text.

    Raises:
        UserError: the record has none.
    """
    if not example.answers:
        raise UserError(f"example {shown(example.id)} has no right answer; prepare the set again")
    return example.answers[0].text


def has_right_choice(example: Example) -> bool:
    """Whether the record says which of its choices is right."""
    return "correct" in example.extra


def not_scored(
    examples: Sequence[Example],
    unreadable: Mapping[str, str],
    *,
    known: Callable[[Example], bool] = has_answer,
    together: Group | None = None,
    shared: bool = False,
) -> dict[str, str]:
    """The reason for each example that no score can take, by id.

    Args:
        unreadable: ids of records that count as wrong, whatever they hold.
        together: examples with equal values are scored as one (rotations of a question, items of a sentence).
        shared: one answer serves all of a group (captions of a clip); else each example needs its own.
    """
    bare = {one.id for one in examples if one.id not in unreadable and not known(one)}
    if together is None or not bare or len(bare) == len(examples):
        return {one.id: NO_ANSWER for one in examples if one.id in bare}
    groups: defaultdict[Hashable, list[str]] = defaultdict(list)
    for one in examples:
        groups[together(one)].append(one.id)
    reasons: dict[str, str] = {}
    for members in groups.values():
        without = [name for name in members if name in bare]
        if without and (not shared or len(without) == len(members)):
            reasons |= {name: NO_ANSWER if name in bare else GROUP_WITHOUT for name in members}
    return reasons
