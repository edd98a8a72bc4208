"""How turns are put to a model: by its chat template, or by a format named in `model.template`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.loading import TrainOn
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.prompt_table import PROMPTS, TEMPLATES, Instruction
from dora_vl.backbones.templates import (
    BREAK,
    PROBE,
    VIDEO_MARK,
    Chat,
    Prompts,
    Span,
    check_ends,
    check_order,
    refuse_system,
    rendered_by,
    system_and_talk,
)
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Role, Turn
from dora_vl.errors import UserError

log = logging.getLogger(__name__)

PROCESSOR_PROBE = (
    Turn("user", "Which colour is it?"),
    Turn("assistant", "It is purple."),
    Turn("user", "Which shape has it?"),
    Turn("assistant", "It is a square."),
)
PICTURE_PROBE = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhich colour is it?"), Turn("assistant", "It is purple."))
SYSTEM_PROBE = Turn("system", "Look at its edges too.")
FORMS: tuple[frozenset[Role], ...] = (frozenset({"user", "assistant"}), frozenset(), frozenset({"user"}))
"""Whose messages without pictures are lists of parts, in the order in which they are tried."""
TEXT_FORMS = (FORMS[1], FORMS[0], FORMS[2])
"""The same for a language model's template."""
MEDIA = re.compile(f"({IMAGE_PLACEHOLDER}|{VIDEO_MARK})")
NO_MEDIA = re.compile(r"((?!))")


class ProcessorChat(Prompts):
    """Renders turns by the chat template of a processor, or of a language model's tokenizer.

    Tried once, with a question and with a picture, so that a template that cannot be trained on is refused before
    anything is loaded: one that leaves out what is said, or knows no pictures. Of one that writes an earlier answer
    differently once later turns follow (reasoning that is stripped) conversations of several questions are refused,
    since what the model saw there is in no single text. Where it opens an answer with other white space than it asks
    for one with (LLaVA-OneVision: a space and a line break, and a line break), the answer is trained behind what is
    asked. Where it closes an answer with no special token, the tokenizer's end token is put behind it, or a trained
    model would not stop. A system turn goes to the template's own place for one; where there is none, the sample is
    refused.

    A processor of pieces knows where the template's special tokens stand, so the same in a person's words are text: a
    mark splits each (`BREAK`) until the template has been applied. Other processors' samples with one are refused. To a
    language model's template a picture is `<image>` in the text.

    Args:
        name: of the model, for messages.
        pictures: whether the model sees any; a template that leaves them out is refused.
    """

    name = "tokenizer"

    def __init__(self, processor: Any, name: str, *, pictures: bool = True) -> None:
        self._processor = processor
        self._name = name
        self._pieces = isinstance(processor, PieceProcessor)
        self._media = NO_MEDIA if self._pieces else MEDIA
        self._template = processor.chat_template or processor.tokenizer.chat_template
        if not self._template:
            raise UserError(
                f"{name} has no chat template, which says how questions and answers are put to the model; put its "
                "chat_template.jinja into the folder, take a model that is made for chats (its -Instruct or -it), or "
                "set model.template: question_answer"
            )
        self.bos_token = processor.tokenizer.bos_token
        self._special = special_tokens(processor)
        self._closing = ""
        check_ends(partial(self._try, pictures=pictures), name)
        self._try(pictures=pictures)

    def _try(self, *, pictures: bool) -> None:
        self._in_parts = self._wanted_parts()
        self._in_parts = self._with_system()
        self._try_answers()
        if pictures:
            self._try_picture()

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """The turns as text, the first one the system's where it is; `generation_prompt` opens the next answer.

        Raises: ValueError if the turns do not fit the template, or hold one of the tokenizer's special tokens.
        """
        system, talk = system_and_talk(turns)
        check_order(talk, generation_prompt=generation_prompt)
        if self._pieces:
            turns = [replace(turn, text=self._special.sub(_broken, turn.text)) for turn in turns]
        else:
            refuse_special(turns, self._special)
        messages = [self._message(turn) for turn in turns]
        whole = self._apply(messages, generation_prompt=generation_prompt)
        self._check_nothing_lost(turns, whole)
        text, spans, place = "", [], 0
        first = 2 if system is None else 3
        for count in range(first, len(messages) + 1, 2):
            (opening, answer), asked, end = self._answer(messages[:count], whole)
            text += whole[place:opening] + asked
            start = len(text)
            text += whole[answer:end]
            spans.append((start, len(text)))
            place = end
        text += whole[place:]
        if not self._pieces:
            return Chat(text, tuple(spans))
        controls = [match.span() for match in self._special.finditer(text)]
        breaks = [match.start() for match in re.finditer(BREAK, text)]
        moved = partial(_without_breaks, breaks=breaks)
        return Chat(text.replace(BREAK, ""), tuple(map(moved, spans)), tuple(map(moved, controls)))

    def _message(self, turn: Turn) -> dict[str, Any]:
        pieces = self._media.split(turn.text)
        closing = self._closing if turn.role == "assistant" else ""
        if len(pieces) == 1 and turn.role not in self._in_parts:
            return {"role": turn.role, "content": turn.text + closing}
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                parts.append({"type": "image" if piece == IMAGE_PLACEHOLDER else "video"})
                continue
            if number:
                piece = piece.removeprefix("\n")  # what records write between a picture and its question
            if piece or len(pieces) == 1:
                parts.append({"type": "text", "text": piece})
        if closing:
            parts[-1]["text"] += closing
        return {"role": turn.role, "content": parts}

    def _answer(self, messages: list[dict[str, Any]], whole: str) -> tuple[Span, str, int]:
        """What opens the last answer, what replaces that (the generation prompt's end), and where the answer ends."""
        before = self._apply(messages[:-1], generation_prompt=True)
        after = self._apply(messages, generation_prompt=False)
        if not whole.startswith(after):
            raise ValueError("the chat template writes an earlier answer differently once later turns follow")
        differing = (place for place, (one, other) in enumerate(zip(before, after, strict=False)) if one != other)
        shared = next(differing, min(len(before), len(after)))
        asked, given = before[shared:], after[shared:]
        first = shared + (len(given) - len(given.lstrip()) if asked else 0)
        if asked.strip():
            raise ValueError("the chat template opens an answer otherwise when it is asked for than when it is given")
        closing = [match.end() for match in self._special.finditer(after) if match.start() >= first]
        if not closing:
            raise ValueError("the chat template closes an answer with no special token")
        return (shared, first), asked, closing[-1]

    def _check_nothing_lost(self, turns: Sequence[Turn], whole: str) -> None:
        contents = [self._message(turn)["content"] for turn in turns]
        if any(str(content) in whole for content in contents if not isinstance(content, str)):
            raise ValueError("the chat template writes a message's list of parts as it stands")
        pieces = [[piece.strip() for piece in self._media.split(turn.text)[::2]] for turn in turns]
        system, talk = system_and_talk(turns)
        if system is not None and (text := system.text.strip()):
            again = sum(piece.count(text) for turn in pieces[len(turns) - len(talk) :] for piece in turn)
            if whole.count(text) <= again:  # its words may be said again later
                raise ValueError("the chat template leaves out or changes the system turn")
        for number, turn in enumerate(pieces):
            if any(piece not in whole for piece in turn):
                raise ValueError(f"the chat template leaves out or changes the text of turn {number}")

    def _why_not(self, turns: Sequence[Turn]) -> str | None:
        """What the template loses of these turns in the present form, or why it refuses them; None: nothing."""
        try:
            self._check_nothing_lost(turns, self._apply([*map(self._message, turns)], generation_prompt=False))
        except ValueError as error:
            return str(error)
        return None

    def _wanted_parts(self) -> frozenset[Role]:
        """Whose messages without pictures are lists of parts to this template too; the others' must be strings."""
        reasons: list[str] = []
        for form in TEXT_FORMS if self._pieces else FORMS:
            self._in_parts = form
            if (reason := self._why_not(PROCESSOR_PROBE[:2])) is None:
                return form
            reasons.append(reason)
        raise UserError(
            f"the chat template of {self._name} cannot be used: {reasons[0]}; and as plain text {reasons[1]}"
        )

    def _with_system(self) -> frozenset[Role]:
        """Likewise with the system's, which some templates (GLM-4.1V's) write as it stands.

        It is tried before a question alone: some (Pixtral's) have no place for it once an answer follows. A template
        that takes none in either form refuses the samples that have one.
        """
        talk = self._in_parts
        whole: frozenset[Role] = frozenset((*talk, "system"))
        forms = (whole, talk) if talk else (talk, whole)
        for form in forms:
            self._in_parts = form
            if self._why_not((SYSTEM_PROBE, PROCESSOR_PROBE[0])) is None:
                return form
        return forms[0]

    def _try_answers(self) -> None:
        try:
            self.render(PROCESSOR_PROBE[:2])
        except ValueError:
            self._closing = str(self._processor.tokenizer.eos_token or "")
            log.info("the chat template of %s closes no answer; %r is put behind each", self._name, self._closing)
        try:
            self.render(PROCESSOR_PROBE[:2])
        except ValueError as error:
            raise UserError(
                f"{self._name}: {error}, so its answers cannot be trained on; change chat_template"
            ) from error
        if self.render(PROCESSOR_PROBE[:2]).text != self._apply(
            [*map(self._message, PROCESSOR_PROBE[:2])], generation_prompt=False
        ):
            log.info(
                "the chat template of %s opens an answer otherwise than it asks for it; taken as asked", self._name
            )
        try:
            self.render(PROCESSOR_PROBE)
        except ValueError as error:
            log.warning("%s: conversations of several questions are skipped: %s", self._name, error)

    def _try_picture(self) -> None:
        try:
            with_picture, without = self.render(PICTURE_PROBE).text, self.render(PROCESSOR_PROBE[:2]).text
        except ValueError as error:
            raise UserError(f"the chat template of {self._name} takes no pictures: {error}") from error
        if with_picture == without:
            raise UserError(f"the chat template of {self._name} leaves pictures out; it is a language model's")

    def _apply(self, messages: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        return rendered_by(
            partial(
                self._processor.apply_chat_template,
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        )


def _broken(special: re.Match[str]) -> str:
    """A special token in a person's words, split by a mark, so that it is not taken for the template's."""
    return special[0][0] + BREAK + special[0][1:]


def _without_breaks(span: Span, breaks: Sequence[int]) -> Span:
    start, end = (place - sum(mark < place for mark in breaks) for place in span)
    return start, end


def refuse_special(turns: Sequence[Turn], special: re.Pattern[str]) -> None:
    """Refuses words that the tokenizer would take for one of its special tokens.

    Raises: ValueError; it names the turn and the token.
    """
    for number, turn in enumerate(turns):
        if found := special.search(turn.text.replace(IMAGE_PLACEHOLDER, "")):
            raise ValueError(f"turn {number} holds {found[0]!r}, which is a special token of this model")


def special_tokens(processor: Any) -> re.Pattern[str]:
    """Matches whatever the tokenizer would take for a special token, and what the processor takes for a picture."""
    tokenizer = processor.tokenizer
    tokens = set(tokenizer.all_special_tokens)
    tokens |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = vars(processor)
    tokens |= {own[name] for name in ("image_token", "video_token", "audio_token") if isinstance(own.get(name), str)}
    tokens -= {"", IMAGE_PLACEHOLDER if isinstance(processor, PieceProcessor) else ""}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


FormatName = Literal["question_answer", "paligemma"]
USUAL = ("vicuna_v1", "chatml")


class QuestionAnswer(Prompts):
    """`Question: ... Answer: ...`, a line for each round, pictures where the question has them.

    An answer is closed by the tokenizer's end token; nothing else would stop a trained model.
    """

    name = "question_answer"

    def __init__(self, processor: Any, name: str, *, pictures: bool) -> None:
        self.bos_token = processor.tokenizer.bos_token
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


class PaliGemma(Prompts):
    """PaliGemma's two parts: pictures and question, seen in both directions, and the answer, seen from its left.

    The processor is given the answer apart, as `suffix`, and tells the parts from one another by token_type_ids. So
    a conversation has one question, and its pictures stand before it (google-research/big_vision, paligemma).
    """

    name = "paligemma"

    def __init__(self, processor: Any, name: str, *, pictures: bool) -> None:
        del name, pictures
        self.bos_token = processor.tokenizer.bos_token
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


def usual_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The format of a LLaVA that names none: the first of `USUAL` whose special tokens its tokenizer has."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for name in USUAL:
        probe = TEMPLATES[name].render(PROBE)
        if special.issuperset(probe.text[start:end] for start, end in probe.controls):
            return name
    return ProcessorChat.name


def prompts_of(
    processor: Any, name: str, template: str | None, *, pictures: bool, train_on: TrainOn = "all"
) -> Prompts:
    """How turns are put to this processor: by the format `template`, or else by its chat template."""
    own = OWN_FORMAT.get(type(processor).__name__)
    pieces = isinstance(processor, PieceProcessor)
    if template is None and pieces and pictures:
        template = usual_template(processor.tokenizer)
    chosen = template if template in FORMATS else own
    if chosen is not None:
        return FORMATS[chosen](processor, name, pictures=pictures)
    if template is None or template == ProcessorChat.name:
        return ProcessorChat(processor, name, pictures=pictures)
    if not pieces:
        raise UserError(
            f"model.template {template!r} is for a LLaVA-1.5 or a language model; {name} has its own chat template, or "
            f"{' or '.join(FORMATS)}; leave it out"
        )
    if template in TEMPLATES:
        return TEMPLATES[template]
    if template not in PROMPTS or pictures:
        raise UserError(
            f"model.template {template!r}: there are {', '.join((*TEMPLATES, *FORMATS))} and tokenizer (its own)"
        )
    end = processor.tokenizer.eos_token
    if not isinstance(end, str):
        raise UserError(f"{name} names no end token (eos_token), which closes every output")
    return Instruction(name=template, train_on=train_on, end=end)
