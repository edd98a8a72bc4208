"""Prompts of models whose processor has no chat template, by a name of `model.template`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

from dora_vl.backbones.processor_chat import Chat, ProcessorChat, refuse_special, special_tokens
from dora_vl.backbones.templates import check_order, refuse_system, system_and_talk
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import UserError

FormatName = Literal["question_answer", "paligemma"]


@runtime_checkable
class Prompts(Protocol):
    """Turns as the text that a processor takes."""

    bos_token: str | None

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """The turns as text; `generation_prompt` opens the next answer.

        Raises: ValueError if the turns do not fit.
        """
        ...


class QuestionAnswer:
    """`Question: ... Answer: ...`, a line for each round, pictures where the question has them.

    An answer is closed by the tokenizer's end token; nothing else would stop a trained model.

    Raises: UserError if the tokenizer has no end token, or the processor no token for a picture, or if it puts
        something behind every text.
    """

    def __init__(self, processor: Any, name: str, *, pictures: bool) -> None:
        self.bos_token: str | None = processor.tokenizer.bos_token
        self._end = str(processor.tokenizer.eos_token or "")
        self._picture = str(vars(processor).get("image_token") or "")
        self._special = special_tokens(processor)
        if not self._end or (pictures and not self._picture):
            lacking = "a token for a picture" if self._end else "an end token"
            raise UserError(f"model.template: question_answer needs {lacking}, and the processor of {name} names none")
        _refuse_text_behind(processor, name)

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """The turns as text; `generation_prompt` opens the next answer.

        Raises: ValueError if the turns do not alternate, begin with a system turn, or hold one of the tokenizer's
            special tokens.
        """
        refuse_system(turns, "question_answer")
        check_order(turns, generation_prompt=generation_prompt)
        refuse_special(turns, self._special)
        text, spans = "", []
        for turn in turns:
            if turn.role == "user":
                pieces = [piece.removeprefix("\n") for piece in turn.text.split(IMAGE_PLACEHOLDER)]
                text += ("\n" if text else "") + f"Question: {self._picture.join(pieces)} Answer:"
            else:
                start = len(text)
                text += f" {turn.text}{self._end}"
                spans.append((start, len(text)))
        return Chat(text, tuple(spans))


class PaliGemma:
    """PaliGemma's two parts: pictures and question, seen in both directions, and the answer, seen from its left.

    The processor is given the answer apart, as `suffix`, and tells the parts from one another by token_type_ids. So
    a conversation has one question, and its pictures stand before it (google-research/big_vision, paligemma).
    """

    def __init__(self, processor: Any, name: str, *, pictures: bool) -> None:
        del name, pictures
        self.bos_token: str | None = processor.tokenizer.bos_token
        self._picture = str(processor.image_token)
        self._special = special_tokens(processor)

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """The question as text and the answer as its suffix; `generation_prompt` leaves the answer to the model.

        Raises: ValueError if there are more turns, a picture stands in or behind the question, or the turns hold a
            special token.
        """
        if system_and_talk(turns)[0] is not None:
            raise ValueError("a PaliGemma has no place for a system turn; leave it out")
        check_order(turns, generation_prompt=generation_prompt)
        refuse_special(turns, self._special)
        if len(turns) > 2:
            raise ValueError(f"{len(turns)} turns, and a PaliGemma takes one question and one answer")
        question = turns[0].text
        asked = question.replace(IMAGE_PLACEHOLDER, "").lstrip("\n")
        pictures = question.count(IMAGE_PLACEHOLDER)
        before = question.rpartition(IMAGE_PLACEHOLDER)[0].replace(IMAGE_PLACEHOLDER, "")
        if before.strip():
            raise ValueError("a picture stands behind words, and a PaliGemma takes pictures before the question alone")
        if not pictures:
            raise ValueError("it has no picture, and a PaliGemma's processor takes no words without one")
        text = self._picture * pictures + asked
        if generation_prompt:
            return Chat(text, (), by_token_types=True)
        return Chat(text, ((len(text), len(text) + 1),), suffix=turns[1].text, by_token_types=True)


FORMATS: Mapping[str, type[QuestionAnswer] | type[PaliGemma]] = MappingProxyType(
    {"question_answer": QuestionAnswer, "paligemma": PaliGemma}
)
PROCESSOR_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"ChameleonProcessor": {"return_for_text_completion": True}}  # or it puts a separator behind every text
)


def _refuse_text_behind(processor: Any, name: str) -> None:
    """Before 5.23 transformers puts the separator behind a Chameleon's text whatever is asked: it would be trained."""
    options = PROCESSOR_OPTIONS.get(type(processor).__name__)
    if options is None:
        return
    told = [int(one) for one in processor(text=["."], **options)["input_ids"][0]]
    if told != processor.tokenizer(".")["input_ids"]:
        raise UserError(
            f"model.template: the processor of {name} puts a separator behind every text; "
            "take transformers 5.23 or later"
        )


OWN_FORMAT: Mapping[str, FormatName] = MappingProxyType({"PaliGemmaProcessor": "paligemma"})
"""Processors that take one format and no other, whatever the settings say of chat templates."""


def prompts_of(processor: Any, name: str, template: str | None, *, pictures: bool) -> Prompts:
    """How turns are put to this processor: by the format `template`, or else by its chat template.

    Raises: UserError if there is neither, or it cannot be trained on.
    """
    chosen = template if template in FORMATS else OWN_FORMAT.get(type(processor).__name__)
    if chosen is not None:
        return FORMATS[chosen](processor, name, pictures=pictures)
    return ProcessorChat(processor, name, pictures=pictures)
