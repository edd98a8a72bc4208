"""Turns as text: what a template makes of them, and which turns it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dora_vl.data.turns import Turn

Span = tuple[int, int]

VIDEO_MARK = "\ufdd1"  # as BREAK; stands where a video goes, since `<video>` is also what HTML's text holds
BREAK = "\ufdd0"  # a Unicode noncharacter: no text may hold it, so it can mark one that must not become a token


@dataclass(frozen=True)
class Rendered:
    """A prompt's text and what its characters are.

    `answer_spans` are supervised: everything after a generation prompt, through the token that closes the
    answer. A separating space before the answer belongs to the span, because generation has to produce it.
    `control_spans` are the special tokens that the template wrote; the same text anywhere else is only text.
    """

    text: str
    answer_spans: tuple[Span, ...]
    control_spans: tuple[Span, ...]


@runtime_checkable
class Template(Protocol):
    """How turns become text."""

    @property
    def name(self) -> str:
        """The value of `model.template` that chooses it."""
        ...

    @property
    def stop(self) -> str:
        """Text that ends an answer, where no special token does; else nothing."""
        ...

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """The text of these turns; `generation_prompt` opens the next answer.

        Raises: ValueError if the turns do not fit the template.
        """
        ...


def system_and_talk(turns: Sequence[Turn]) -> tuple[Turn | None, Sequence[Turn]]:
    """The system turn, where the first one is that, and the turns after it."""
    return (turns[0], turns[1:]) if turns and turns[0].role == "system" else (None, turns)


def check_order(turns: Sequence[Turn], *, generation_prompt: bool) -> None:
    """Refuses turns that do not alternate from the user, or answers that hold nothing."""
    for number, turn in enumerate(turns):
        if turn.role != ("assistant" if number % 2 else "user"):
            raise ValueError(f"turn {number} is from the {turn.role}; they must alternate, the user first")
        if turn.role == "assistant" and not turn.text.strip():
            raise ValueError(f"answer {number // 2 + 1} is empty")
    if len(turns) % 2 != (1 if generation_prompt else 0):
        raise ValueError(
            f"{len(turns)} turns, but " + ("a question" if generation_prompt else "an answer") + " must be last"
        )
