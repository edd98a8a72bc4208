"""A prompt format by its name: a row of the table, or the language model's own chat template, by its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.template_table import TEMPLATES
from dora_vl.backbones.templates import (
    BREAK,
    PROBE,
    Rendered,
    Span,
    Template,
    check_ends,
    check_order,
    rendered_by,
    system_and_talk,
)
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import UserError

USUAL = ("vicuna_v1", "chatml")


class ChatTemplate:
    """The language model's own chat template, by its tokenizer.

    An answer's span runs from the generation prompt before it to the last special token of the text that it
    adds. That is only right where earlier turns read the same with and without later ones; a template that
    rewrites them (reasoning models drop old thoughts) is refused with the sample. Templates of models that take
    pictures want a message as a list of parts and leave a plain string out; which one it is, is tried.
    """

    name = "tokenizer"
    stop = ""

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
        check_ends(self._wants_parts, tokenizer.name_or_path)
        self._as_parts = self._wants_parts()

    def _wants_parts(self) -> bool:
        """Whether a message is a list of parts to this template. Raises: UserError where it takes neither form."""
        said = [{"role": turn.role, "content": turn.text} for turn in PROBE]
        for as_parts in (False, True):
            self._as_parts = as_parts
            try:
                text = self._apply(said, generation_prompt=False)
            except ValueError:  # it takes no string, or no list
                continue
            if all(one["content"] in text for one in said):
                return as_parts
        raise UserError(
            f"the chat template of {self._tokenizer.name_or_path} leaves out what is said, as text and as a list of "
            f"parts; set model.template to one of {', '.join(TEMPLATES)}"
        )

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Rendered:
        """See `Template.render`."""
        system, talk = system_and_talk(turns)
        check_order(talk, generation_prompt=generation_prompt)
        messages = [{"role": turn.role, "content": self._broken(turn.text)} for turn in turns]
        whole = self._apply(messages, generation_prompt=generation_prompt)
        if lost := [number for number, one in enumerate(messages) if one["content"].strip() not in whole]:
            raise ValueError(f"the chat template leaves out or changes the text of turn {lost[0]}")
        spans = [
            self._answer_span(messages[:end], whole) for end in range(2 + (system is not None), len(messages) + 1, 2)
        ]
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
        return rendered_by(
            partial(self._tokenizer.apply_chat_template, said, tokenize=False, add_generation_prompt=generation_prompt)
        )


def get_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """A template by its name; `tokenizer` is the language model's own, and None the first of `USUAL` that it has the
    tokens of, else its own.

    Raises: UserError if there is none of that name.
    """
    if name is None:
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        probes = {usual: TEMPLATES[usual].render(PROBE) for usual in USUAL}
        fitting = (
            usual
            for usual, probe in probes.items()
            if special.issuperset(probe.text[a:b] for a, b in probe.control_spans)
        )
        name = next(fitting, "tokenizer")
    if name == "tokenizer":
        return ChatTemplate(tokenizer)
    if name not in TEMPLATES:
        raise UserError(f"model.template {name!r}: there are {', '.join(TEMPLATES)} and tokenizer (the model's own)")
    return TEMPLATES[name]
