"""Turns as the text a language model was trained on, put together from a template's strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dora_vl.backbones.rendered import Rendered, Span, check_order
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn

_CONTROL = re.compile("|".join(map(re.escape, ("<s>", "</s>", "<|im_start|>", "<|im_end|>"))))
"""What is a special token where a template writes it, and text where a person does."""


@dataclass
class _Text:
    """Text being put together, with the places of its special tokens."""

    text: str = ""
    controls: list[Span] = field(default_factory=list)

    def own(self, part: str) -> None:
        """Adds what the template writes."""
        self.controls += [
            (len(self.text) + found.start(), len(self.text) + found.end()) for found in _CONTROL.finditer(part)
        ]
        self.text += part

    def filled(self, frame: str, said: str) -> None:
        """Adds one of the template's strings, with what a person said at its `{}`."""
        before, _, after = frame.partition("{}")
        self.own(before)
        self.text += said
        self.own(after)


@dataclass(frozen=True, kw_only=True)
class RoundTemplate:
    """Rounds of question and answer as strings; `{}` is where the question, the answer or the picture stands."""

    name: str
    system: str = ""
    """Before the first round."""
    first_question: str = ""
    """As `question`, where the first one differs."""
    question: str
    answer_role: str
    """Ends a generation prompt."""
    answer: str
    """Supervised, all of it: what generation has to produce."""
    between: str = ""
    """After a round that is not the last."""
    end: str = ""
    """After the last round."""
    picture: str = "{}"
    """Around each picture of a question."""
    stop: str = ""
    """Text that ends an answer, where no special token does."""

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """See `Template.render`."""
        check_order(turns, generation_prompt=generation_prompt)
        text = _Text()
        answers: list[Span] = []
        text.own(self.system)
        for number, turn in enumerate(turns):
            if turn.role == "user":
                text.own(self.between if number else "")
                self._ask(text, turn.text, first=number == 0)
            else:
                start = len(text.text)
                text.filled(self.answer, turn.text)
                answers.append((start, len(text.text)))
        if not generation_prompt:
            text.own(self.end)
        return Rendered(text.text, tuple(answers), tuple(text.controls))

    def _ask(self, text: _Text, question: str, *, first: bool) -> None:
        frame = self.first_question if first and self.first_question else self.question
        text.filled(frame, question.replace(IMAGE_PLACEHOLDER, self.picture.replace("{}", IMAGE_PLACEHOLDER)))
        text.own(self.answer_role)


@dataclass(frozen=True, kw_only=True)
class PlainTemplate:
    """Projector pretraining: the pictures of the question, its text dropped, then the caption and a newline."""

    name: str = "plain"
    stop: str = ""

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """See `Template.render`; takes one question with a picture, and its caption."""
        check_order(turns, generation_prompt=generation_prompt)
        if len(turns) + generation_prompt != 2 or IMAGE_PLACEHOLDER not in turns[0].text:
            raise ValueError(f"template plain needs one question with {IMAGE_PLACEHOLDER} and one caption")
        pictures = IMAGE_PLACEHOLDER * turns[0].text.count(IMAGE_PLACEHOLDER)
        if generation_prompt:
            return Rendered(pictures, (), ())
        text = pictures + turns[1].text + "\n"
        return Rendered(text, ((len(pictures), len(text)),), ())
