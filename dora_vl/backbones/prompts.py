"""How turns are put to a model: by its chat template, or by a format named in `model.template`."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.specs import FormatName, TrainOn
from dora_vl.backbones.template_trial import check_ends
from dora_vl.backbones.templates import (
    BREAK,
    PROBE,
    PROMPTS,
    TEMPLATES,
    VIDEO_MARK,
    Chat,
    Instruction,
    Prompts,
    Span,
    shared_beginning,
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
    takes_system = True

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
        check_ends(self._template, processor.tokenizer.special_tokens_map, name)
        self._try(pictures=pictures)

    def _try(self, *, pictures: bool) -> None:
        """Finds the messages' form and what closes an answer; refuses a template that cannot be trained on."""
        self._choose_parts()
        turns = PROCESSOR_PROBE[:2]
        if self._why_not(turns):
            self._closing = str(self._processor.tokenizer.eos_token or "")
            log.info("the chat template of %s closes no answer; %r is put behind each", self._name, self._closing)
        if reason := self._why_not(turns):
            raise UserError(f"{self._name}: {reason}, so its answers cannot be trained on; change chat_template")
        text = self.render(turns).text
        if text != self._apply(turns, generation_prompt=False):
            log.info(
                "the chat template of %s opens an answer otherwise than it asks for it; taken as asked", self._name
            )
        if reason := self._why_not(PROCESSOR_PROBE):
            log.warning("%s: conversations of several questions are skipped: %s", self._name, reason)
        if not pictures:
            return
        if reason := self._why_not(PROBE):
            raise UserError(f"the chat template of {self._name} takes no pictures: {reason}")
        if self.render(PROBE).text == text:
            raise UserError(f"the chat template of {self._name} leaves pictures out; it is a language model's")

    def _why_not(self, turns: Sequence[Turn], *, messages_alone: bool = False) -> str | None:
        """Why the template cannot render these turns, or write them in the present form alone; None: it can."""
        try:
            if messages_alone:
                self._check_nothing_lost(turns, self._apply(turns, generation_prompt=False))
            else:
                self.render(turns)
        except ValueError as error:
            return str(error)
        return None

    def _choose_parts(self) -> None:
        """Finds whose messages without pictures are lists of parts to this template too; the others' must be strings.

        The system's are tried after a talk's: some templates (GLM-4.1V's) write it as it stands. They are tried before
        a question alone: some (Pixtral's) have no place for it once an answer follows. A template that takes none in
        either form refuses the samples that have one.
        """
        reasons: list[str] = []
        for form in TEXT_FORMS if self._pieces else FORMS:
            self._in_parts = form
            if (reason := self._why_not(PROCESSOR_PROBE[:2], messages_alone=True)) is None:
                break
            reasons.append(reason)
        else:
            raise UserError(
                f"the chat template of {self._name} cannot be used: {reasons[0]}; and as plain text {reasons[1]}"
            )
        talk = self._in_parts
        with_system: frozenset[Role] = frozenset((*talk, "system"))
        forms = (with_system, talk) if talk else (talk, with_system)
        for form in forms:
            self._in_parts = form
            if self._why_not((SYSTEM_PROBE, PROCESSOR_PROBE[0]), messages_alone=True) is None:
                return
        self._in_parts = forms[0]

    def _render(self, system: Turn | None, talk: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        turns = [*([] if system is None else [system]), *talk]
        if self._pieces:  # each of a person's special tokens is split, so that it is not taken for the template's
            turns = [
                replace(turn, text=self._special.sub(lambda token: token[0][0] + BREAK + token[0][1:], turn.text))
                for turn in turns
            ]
        else:
            refuse_special(turns, self._special)
        whole = self._apply(turns, generation_prompt=generation_prompt)
        self._check_nothing_lost(turns, whole)
        text, spans, position = "", [], 0
        for count in range(len(turns) - len(talk) + 2, len(turns) + 1, 2):
            (opening, answer), prompt_end, end = self._answer(turns[:count], whole)
            text += whole[position:opening] + prompt_end
            start = len(text)
            text += whole[answer:end]
            spans.append((start, len(text)))
            position = end
        text += whole[position:]
        if not self._pieces:
            return Chat(text, tuple(spans))
        controls = [match.span() for match in self._special.finditer(text)]
        breaks = [match.start() for match in re.finditer(BREAK, text)]

        def moved(spans: Sequence[Span]) -> tuple[Span, ...]:
            return tuple((start - bisect_left(breaks, start), end - bisect_left(breaks, end)) for start, end in spans)

        return Chat(text.replace(BREAK, ""), moved(spans), moved(controls))

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

    def _answer(self, turns: Sequence[Turn], whole: str) -> tuple[Span, str, int]:
        """What opens the last answer, what replaces that (the generation prompt's end), and where the answer ends."""
        before = self._apply(turns[:-1], generation_prompt=True)
        after = self._apply(turns, generation_prompt=False)
        if not whole.startswith(after):
            raise ValueError("the chat template writes an earlier answer differently once later turns follow")
        shared = shared_beginning(before, after)
        prompt_end, answer = before[shared:], after[shared:]
        first = shared + (len(answer) - len(answer.lstrip()) if prompt_end else 0)
        if prompt_end.strip():
            raise ValueError("the chat template opens an answer otherwise when it is asked for than when it is given")
        closing = [match.end() for match in self._special.finditer(after) if match.start() >= first]
        if not closing:
            raise ValueError("the chat template closes an answer with no special token")
        return (shared, first), prompt_end, closing[-1]

    def _check_nothing_lost(self, turns: Sequence[Turn], whole: str) -> None:
        contents = [self._message(turn)["content"] for turn in turns]
        if any(str(content) in whole for content in contents if not isinstance(content, str)):
            raise ValueError("the chat template writes a message's list of parts as it stands")
        pieces = [[piece.strip() for piece in self._media.split(turn.text)[::2]] for turn in turns]
        if turns and turns[0].role == "system" and (text := turns[0].text.strip()):
            again = sum(piece.count(text) for turn in pieces[1:] for piece in turn)
            if whole.count(text) <= again:  # its words may be said again later
                raise ValueError("the chat template leaves out or changes the system turn")
        for number, turn in enumerate(pieces):
            if any(piece not in whole for piece in turn):
                raise ValueError(f"the chat template leaves out or changes the text of turn {number}")

    def _apply(self, turns: Sequence[Turn], *, generation_prompt: bool) -> str:
        """The text that the template makes. Raises: ValueError for whatever is wrong with it."""
        try:
            text = self._processor.apply_chat_template(
                [self._message(turn) for turn in turns],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except MemoryError:
            raise
        except Exception as error:  # it is a program, from elsewhere
            raise ValueError(f"the chat template refuses it: {error or type(error).__name__}") from error
        if not isinstance(text, str):
            raise ValueError(f"the chat template gave {type(text).__name__}, not text")
        return text


def refuse_special(turns: Sequence[Turn], special: re.Pattern[str]) -> None:
    """Raises a ValueError for words that the tokenizer would take for one of its special tokens."""
    for number, turn in enumerate(turns):
        if match := special.search(turn.text.replace(IMAGE_PLACEHOLDER, "")):
            raise ValueError(f"turn {number} holds {match[0]!r}, which is a special token of this model")


def special_tokens(processor: Any) -> re.Pattern[str]:
    """Matches whatever the tokenizer would take for a special token, and what the processor takes for a picture."""
    tokenizer = processor.tokenizer
    tokens = set(tokenizer.all_special_tokens)
    tokens |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = vars(processor)
    tokens |= {own[name] for name in ("image_token", "video_token", "audio_token") if isinstance(own.get(name), str)}
    tokens -= {"", IMAGE_PLACEHOLDER if isinstance(processor, PieceProcessor) else ""}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


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
        options = PROCESSOR_OPTIONS.get(type(processor).__name__)
        if options is None:
            return
        # Before 5.23 transformers puts the separator behind a Chameleon's text whatever is asked: it would be trained.
        alone = [int(token) for token in processor(text=["."], **options)["input_ids"][0]]
        if alone != processor.tokenizer(".")["input_ids"]:
            raise UserError(
                f"model.template: the processor of {name} puts a separator behind every text; "
                "take transformers 5.23 or later"
            )

    def _render(self, system: Turn | None, talk: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        refuse_special(talk, self._special)
        text, spans = "", []
        for turn in talk:
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

    def _render(self, system: Turn | None, talk: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        refuse_special(talk, self._special)
        if len(talk) > 2:
            raise ValueError(f"{len(talk)} turns, and a PaliGemma takes one question and one answer")
        question = talk[0].text
        words = question.replace(IMAGE_PLACEHOLDER, "").lstrip("\n")
        pictures = question.count(IMAGE_PLACEHOLDER)
        before = question.rpartition(IMAGE_PLACEHOLDER)[0].replace(IMAGE_PLACEHOLDER, "")
        if before.strip():
            raise ValueError("a picture stands behind words, and a PaliGemma takes pictures before the question alone")
        if not pictures:
            raise ValueError("it has no picture, and a PaliGemma's processor takes no words without one")
        text = self._picture * pictures + words
        if generation_prompt:
            return Chat(text, (), by_token_types=True)
        return Chat(text, ((len(text), len(text) + 1),), suffix=talk[1].text, by_token_types=True)


FORMATS: Mapping[str, type[QuestionAnswer] | type[PaliGemma]] = MappingProxyType(
    {"question_answer": QuestionAnswer, "paligemma": PaliGemma}
)
PROCESSOR_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"ChameleonProcessor": {"return_for_text_completion": True}}  # or it puts a separator behind every text
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
