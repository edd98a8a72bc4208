"""Turns as the text a language model was trained on, and which characters of it are supervised.

Strings of `vicuna_v1` and `plain`: LLaVA c121f04, `llava/conversation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import UserError

Span = tuple[int, int]

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROBE = (("user", "Which colour is it?"), ("assistant", "It is purple."))
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

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """The text of these turns; `generation_prompt` opens the next answer.

        Raises: ValueError if the turns do not fit the template.
        """
        ...


@dataclass
class _Text:
    """Text being put together, with the spans of its parts."""

    text: str = ""
    controls: list[Span] = field(default_factory=list)

    def add(self, part: str) -> None:
        self.text += part

    def control(self, token: str) -> None:
        if not token:
            return
        self.controls.append((len(self.text), len(self.text) + len(token)))
        self.text += token


@dataclass(frozen=True, kw_only=True)
class RoundTemplate:
    """Rounds of question and answer between fixed strings; `open` and `close` strings are special tokens."""

    name: str
    system: str = ""
    turn_open: str = ""
    user_role: str
    user_close: str = ""
    user_end: str
    assistant_role: str
    answer_lead: str = ""
    """Between the generation prompt and the answer; supervised, because generation has to produce it."""
    answer_close: str
    round_end: str = ""

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """See `Template.render`."""
        check_order(turns, generation_prompt=generation_prompt)
        text = _Text(self.system)
        answers: list[Span] = []
        for number, turn in enumerate(turns):
            if turn.role == "user":
                self._question(text, turn.text, first=number == 0)
            else:
                answers.append(self._answer(text, turn.text))
        if generation_prompt:
            self._open_answer(text)
        return Rendered(text.text, tuple(answers), tuple(text.controls))

    def _question(self, text: _Text, question: str, *, first: bool) -> None:
        if not first:
            text.add(self.round_end)
        text.control(self.turn_open)
        text.add(self.user_role + question)
        text.control(self.user_close)
        text.add(self.user_end)

    def _open_answer(self, text: _Text) -> None:
        text.control(self.turn_open)
        text.add(self.assistant_role)

    def _answer(self, text: _Text, answer: str) -> Span:
        self._open_answer(text)
        start = len(text.text)
        text.add(self.answer_lead + answer)
        text.control(self.answer_close)
        return start, len(text.text)


@dataclass(frozen=True, kw_only=True)
class PlainTemplate:
    """Projector pretraining: the pictures of the question, its text dropped, then the caption and a newline."""

    name: str = "plain"

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


TEMPLATES: dict[str, Template] = {
    "vicuna_v1": RoundTemplate(
        name="vicuna_v1",
        system=VICUNA_SYSTEM + " ",
        user_role="USER: ",
        user_end=" ",
        assistant_role="ASSISTANT:",
        answer_lead=" ",
        answer_close="</s>",
    ),
    "plain": PlainTemplate(),
    "chatml": RoundTemplate(
        name="chatml",
        turn_open="<|im_start|>",
        user_role="user\n",
        user_close="<|im_end|>",
        user_end="\n",
        assistant_role="assistant\n",
        answer_close="<|im_end|>",
        round_end="\n",
    ),
}


def get_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """A template by its name; `tokenizer` is the language model's own.

    Raises: UserError if there is none of that name.
    """
    if name == "tokenizer":
        return ChatTemplate(tokenizer)
    if name not in TEMPLATES:
        raise UserError(f"model.template {name!r}: there are {', '.join(TEMPLATES)} and tokenizer (the model's own)")
    return TEMPLATES[name]


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


class ChatTemplate:
    """The language model's own chat template, by its tokenizer.

    An answer's span runs from the generation prompt before it to the last special token of the text that it
    adds. That is only right where earlier turns read the same with and without later ones; a template that
    rewrites them (reasoning models drop old thoughts) is refused with the sample. Templates of models that take
    pictures want a message as a list of parts and leave a plain string out; which one it is, is tried.
    """

    name = "tokenizer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path} has no chat template; set model.template to {', '.join(TEMPLATES)}"
            )
        self._tokenizer = tokenizer
        tokens = {token for token in tokenizer.all_special_tokens if token != IMAGE_PLACEHOLDER}
        tokens |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens.discard(IMAGE_PLACEHOLDER)
        self._special = re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))
        self._as_parts = self._wants_parts()

    def _wants_parts(self) -> bool:
        """Whether a message is a list of parts to this template. Raises: UserError where it takes neither form."""
        said = [{"role": role, "content": text} for role, text in PROBE]
        for as_parts in (False, True):
            self._as_parts = as_parts
            try:
                text = self._apply(said, generation_prompt=False)
            except (TemplateError, TypeError):  # it takes no string, or no list
                continue
            if all(one["content"] in text for one in said):
                return as_parts
        raise UserError(
            f"the chat template of {self._tokenizer.name_or_path} leaves out what is said, as text and as a list of "
            f"parts; set model.template to one of {', '.join(TEMPLATES)}"
        )

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """See `Template.render`."""
        check_order(turns, generation_prompt=generation_prompt)
        messages = [{"role": turn.role, "content": self._broken(turn.text)} for turn in turns]
        whole = self._apply(messages, generation_prompt=generation_prompt)
        if lost := [number for number, one in enumerate(messages) if one["content"].strip() not in whole]:
            raise ValueError(f"the chat template leaves out or changes the text of turn {lost[0]}")
        spans = [self._answer_span(messages[:end], whole) for end in range(2, len(messages) + 1, 2)]
        controls = [match.span() for match in self._special.finditer(whole)]
        breaks = [match.start() for match in re.finditer(BREAK, whole)]

        def cleaned(span: Span) -> Span:
            start, end = (place - sum(mark < place for mark in breaks) for place in span)
            return start, end

        return Rendered(whole.replace(BREAK, ""), tuple(map(cleaned, spans)), tuple(map(cleaned, controls)))

    def _answer_span(self, messages: list[dict[str, str]], whole: str) -> Span:
        before = self._apply(messages[:-1], generation_prompt=True)
        after = self._apply(messages, generation_prompt=False)
        if not whole.startswith(before) or not whole.startswith(after):
            raise ValueError("the chat template writes earlier turns differently once later ones follow")
        closing = [match.end() for match in self._special.finditer(after) if match.start() >= len(before)]
        if not closing:
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path} closes an answer with no special token, so a "
                f"model trained on it would not stop; set model.template to one of {', '.join(TEMPLATES)}"
            )
        return len(before), closing[-1]

    def _broken(self, text: str) -> str:
        """The text with each special token in it split by a mark, so that it is not taken for the template's."""
        return self._special.sub(lambda match: match[0][0] + BREAK + match[0][1:], text)

    def _apply(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> str:
        said: list[dict[str, Any]] = [*messages]
        if self._as_parts:
            said = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=generation_prompt)
        if not isinstance(text, str):
            raise TypeError(f"the chat template gave {type(text).__name__}, not text")
        return text


def from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The language model's own chat template. Raises: UserError if it has none."""
    return ChatTemplate(tokenizer)
