"""Turns as the text a language model was trained on, put together from a template's strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from dora_vl.backbones.rendered import Rendered, Span, check_order, system_and_talk
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
    own_system: str = ""
    """What stands in its place where a sample brings a system turn, `{}` its text; empty: it has no place for one."""
    first_question: str = ""
    """As `question`, where the first one differs."""
    first_question_after_system: str = ""
    """As `first_question`, after a sample's own system turn."""
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
        system, talk = system_and_talk(turns)
        check_order(talk, generation_prompt=generation_prompt)
        text = _Text()
        answers: list[Span] = []
        first_question = self._begin(text, system)
        for number, turn in enumerate(talk):
            if turn.role == "user":
                text.own(self.between if number else "")
                self._ask(text, turn.text, frame=self.question if number else first_question)
            else:
                start = len(text.text)
                text.filled(self.answer, turn.text)
                answers.append((start, len(text.text)))
        if not generation_prompt:
            text.own(self.end)
        return Rendered(text.text, tuple(answers), tuple(text.controls))

    def _begin(self, text: _Text, system: Turn | None) -> str:
        """Writes what comes before the first round; returns the first question's frame."""
        if system is None:
            text.own(self.system)
            return self.first_question or self.question
        if not self.own_system:
            raise ValueError(f"template {self.name} has no place for a system turn; choose another model.template")
        text.filled(self.own_system, system.text)
        return self.first_question_after_system or self.first_question or self.question

    def _ask(self, text: _Text, question: str, *, frame: str) -> None:
        text.filled(frame, question.replace(IMAGE_PLACEHOLDER, self.picture.replace("{}", IMAGE_PLACEHOLDER)))
        text.own(self.answer_role)


@dataclass(frozen=True, kw_only=True)
class PlainTemplate:
    """Projector pretraining: the pictures of the question, its text dropped, then the caption and a newline."""

    name: str = "plain"
    stop: str = ""

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """See `Template.render`; takes one question with a picture, and its caption."""
        if system_and_talk(turns)[0] is not None:
            raise ValueError("template plain has no place for a system turn; choose another model.template")
        check_order(turns, generation_prompt=generation_prompt)
        if len(turns) + generation_prompt != 2 or IMAGE_PLACEHOLDER not in turns[0].text:
            raise ValueError(f"template plain needs one question with {IMAGE_PLACEHOLDER} and one caption")
        pictures = IMAGE_PLACEHOLDER * turns[0].text.count(IMAGE_PLACEHOLDER)
        if generation_prompt:
            return Rendered(pictures, (), ())
        text = pictures + turns[1].text + "\n"
        return Rendered(text, ((len(pictures), len(text)),), ())
