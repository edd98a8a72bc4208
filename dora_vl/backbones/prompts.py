"""Turns conversations into text: by the model's chat template, or by a format named in `model.template`."""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from dora_vl.backbones.families.boxes import BOX_FORMATS
from dora_vl.backbones.families.formats import (
    BREAK,
    FORMATS,
    OWN_TEMPLATE,
    PROBE,
    PROMPTS,
    TEMPLATES,
    VIDEO_MARK,
    CharSpan,
    Chat,
    Instruction,
    Prompts,
    refuse_special,
    shared_beginning,
    usual_template,
)
from dora_vl.backbones.families.table import quirks_of
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.specs import TrainOn
from dora_vl.backbones.template_trial import CALL, check_ends, variables_of
from dora_vl.data.turns import CALLS, END_THINK, IMAGE_PLACEHOLDER, KWARGS, THINK, TOOLS, Role, Turn
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
"""Messages of these roles are lists of parts even without pictures; the sets are tried in this order."""
MEDIA = re.compile(f"({IMAGE_PLACEHOLDER}|{VIDEO_MARK})")
_THOUGHT = re.compile(rf"\s*{THINK}(.*?){END_THINK}\n*(.*)", re.DOTALL)
_SWITCH = re.compile(r"(?<![.\w'\"])(?:enable_thinking|thinking)\b")
"""Finds the variable by which a template is asked for thoughts; a message's field of that name does not match."""


class ProcessorChat(Prompts):
    """Renders turns by the chat template of a processor, or of a language model's tokenizer.

    An answer is trained exactly as it will be generated: everything after the generation prompt, as the template writes
    it for a last turn, up to the token that closes it. If a later turn changes how the template writes that answer
    (drops its thoughts or its end token), the answer is trained in a text of its own that ends with it (`Chat.others`).
    Thoughts are what an answer has in `<think>` at its beginning; if the template drops them, even where the prompt
    opens them (DeepSeek-R1's), they are trained as they are. If the template closes no answer, the tokenizer's end
    token does, or a model would not stop.

    The template is tried once, with questions, thoughts and a picture, so that one that cannot be trained on is refused
    before anything is loaded: one that leaves out text, or knows no pictures. A system turn goes to the template's own
    place for one; if there is none, the sample is refused.

    A `PieceProcessor` knows where the template's special tokens are, so the same characters in a person's words are
    text: a mark (`BREAK`) splits each until the template has been applied. Other processors' samples with one are
    refused. To a language model's template a picture is `<image>` in the text.

    What a turn holds as `more` goes to the template by the names that transformers gives it; a template that writes no
    tools, no call or no result refuses the sample.

    Args:
        name: the model's name, for messages.
        pictures: True where the model sees pictures; a template that leaves them out is refused.
        thinking: value for a template's switch for thoughts; None leaves it as it is.
    """

    name = OWN_TEMPLATE
    takes_system = takes_tools = True

    def __init__(self, processor: Any, name: str, *, pictures: bool = True, thinking: bool | None = None) -> None:
        self._processor = processor
        self._name = name
        self._pieces = isinstance(processor, PieceProcessor)
        self._media = re.compile(r"((?!))") if self._pieces else MEDIA
        self._template = processor.chat_template or processor.tokenizer.chat_template
        if not self._template:
            raise UserError(
                f"{name} has no chat template, which says how questions and answers are put to the model; put its "
                "chat_template.jinja into the folder, take a model that is made for chats (its -Instruct or -it), or "
                "set model.template: question_answer"
            )
        self.bos_token = processor.tokenizer.bos_token
        self._special = special_tokens(processor)
        # A person may write a family's own boxes.
        allowed = {THINK, END_THINK, *(token for form in BOX_FORMATS.values() for token in form.tokens)}
        self._not_in_words = special_tokens(processor, allowed=allowed)
        self._switch: dict[str, bool] = {}
        self._arguments_as_text = self._writes_calls = False
        self._thoughts: Literal["fields", "part", ""] = ""
        self._added = self._before = self._opening = self._ending = self._closing = self._rest = ""
        check_ends(self._template, processor.tokenizer.special_tokens_map, name)
        fixed = {"messages", TOOLS, "documents", "add_generation_prompt", *processor.tokenizer.special_tokens_map}
        self._variables = variables_of(self._template, name) - fixed
        self._probe_template(thinking, pictures=pictures)

    def _probe_template(self, thinking: bool | None, *, pictures: bool) -> None:
        """Finds how messages, thoughts and ends are written; refuses a template that cannot be trained on."""
        self._choose_parts()
        try:
            self._choose_thinking(thinking)
            self._choose_calls()
            text = self._find_ends(*PROCESSOR_PROBE[:2])
        except ValueError as error:
            raise UserError(f"{self._name}: {error}, so it cannot be trained on; change chat_template") from None
        if self._switch or self._opening:
            log.info("%s: asked with %s, answered without thoughts by %r", self._name, self._switch, self._opening)
        if reason := self._render_error(PROCESSOR_PROBE):
            log.warning("%s: conversations of several questions are skipped: %s", self._name, reason)
        elif self.render(PROCESSOR_PROBE).others:
            log.info(
                "the chat template of %s rewrites earlier answers: each round of a conversation is a row", self._name
            )
        if not pictures:
            return
        if reason := self._render_error(PROBE):
            raise UserError(f"the chat template of {self._name} takes no pictures: {reason}")
        if self.render(PROBE).text == text:
            raise UserError(f"the chat template of {self._name} leaves pictures out; it is a language model's")

    def _choose_thinking(self, thinking: bool | None) -> None:
        """Finds the template's switch for thoughts, and the form in which it takes an answer's thoughts."""
        question, answer = PROCESSOR_PROBE[:2]
        thought = replace(answer, text=f"{THINK}\nIt shines.\n{END_THINK}\n\n{answer.text}")
        for name in dict.fromkeys(_SWITCH.findall(self._template)) if thinking is not None else ():
            texts = {self._apply([question], generation_prompt=True, **{name: on}) for on in (True, False)}
            if len(texts) == 2:
                self.thinking, self._switch = thinking, {name: bool(thinking)}
        for self._thoughts in ("fields", "part", ""):
            if self._render_error((question, thought), messages_alone=True) is None:
                break

    def _choose_calls(self) -> None:
        """Finds whether the template writes calls, takes their arguments as objects or JSON, and results as parts."""
        if CALLS not in self._template:
            return
        question, answer = PROCESSOR_PROBE[:2]
        call = replace(answer, text="", more=json.dumps({CALLS: [CALL]}))
        name, parts = CALL["function"]["name"], self._in_parts
        for self._arguments_as_text in (False, True):
            with suppress(ValueError):
                text = self._apply([question, call], generation_prompt=False)
                self._writes_calls = name in text and "'side'" not in text and '\\"side' not in text
            if self._writes_calls:
                break
        result = Turn("tool", "It measures 7 units.", more=json.dumps({"name": name, "tool_call_id": CALL["id"]}))
        for self._in_parts in (parts, parts | {"tool"}, parts):
            if self._render_error((question, call, result), messages_alone=True) is None:
                break

    def _find_ends(self, question: Turn, answer: Turn) -> str:
        """Finds what opens and closes an answer; returns the text that trains this one."""
        prompt, answered = self._prompt([question]), self._apply([question, answer], generation_prompt=False)
        self._added = prompt[shared_beginning(prompt, answered) :]
        self._ending = answered[answered.rfind(answer.text) + len(answer.text) :]
        closing = [match.end() for match in self._special.finditer(self._ending)]
        self._closing, self._rest = str(self._processor.tokenizer.eos_token or ""), ""
        if closing:
            self._closing, self._rest = self._ending[: closing[-1]], self._ending[closing[-1] :]
        if not self._closing:
            raise ValueError("the chat template closes an answer with no special token")
        text, start, _ = self._with_answer([question, answer])
        self._before = text[start : text.rfind(answer.text)]
        self._opening = self._special.sub("", self._before).strip()
        return text

    def _render_error(self, turns: Sequence[Turn], *, messages_alone: bool = False) -> str | None:
        """Says why the template cannot render these turns, or with `messages_alone` their messages; None if it can."""
        try:
            if messages_alone:
                self._check_nothing_lost(turns, self._apply(turns, generation_prompt=False))
            else:
                self.render(turns)
        except ValueError as error:
            return str(error)
        return None

    def _choose_parts(self) -> None:
        """Finds the roles whose messages without pictures must be lists of parts; the others' are strings.

        System turns are tried last: some templates (GLM-4.1V's) write a list of their parts as it is. They are tried
        with a question and no answer, since some (Pixtral's) have no place for them once an answer follows. A template
        that takes none in either form refuses the samples that have one.
        """
        reasons: list[str] = []
        for form in (FORMS[1], FORMS[0], FORMS[2]) if self._pieces else FORMS:
            self._in_parts = form
            if (reason := self._render_error(PROCESSOR_PROBE[:2], messages_alone=True)) is None:
                break
            reasons.append(reason)
        else:
            raise UserError(
                f"the chat template of {self._name} cannot be used: {reasons[0]}; and as plain text {reasons[1]}"
            )
        conversation = self._in_parts
        with_system: frozenset[Role] = frozenset((*conversation, "system"))
        forms = (with_system, conversation) if conversation else (conversation, with_system)
        for form in forms:
            self._in_parts = form
            if self._render_error((SYSTEM_PROBE, PROCESSOR_PROBE[0]), messages_alone=True) is None:
                return
        self._in_parts = forms[0]

    def _takes_greeting(self, *, with_system: bool) -> bool:
        question, *_, greeting = PROCESSOR_PROBE
        with suppress(ValueError):
            before = [SYSTEM_PROBE] if with_system else []
            return greeting.text in self._prompt([*before, greeting, question])
        return False

    def _render(self, system: Turn | None, conversation: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        turns = [*([] if system is None else [system]), *conversation]
        if self._pieces:  # each of a person's special tokens is split, so that it is not taken for the template's
            split = partial(self._not_in_words.sub, lambda token: token[0][0] + BREAK + token[0][1:])
            turns = [replace(turn, text=split(turn.text), more=split(turn.more)) for turn in turns]
        else:
            refuse_special(turns, self._not_in_words)
        if unknown := [name for name in turns[0].fields.get(KWARGS, ()) if name not in self._variables]:
            reason = f"its {KWARGS} name {unknown[0]!r}, which the chat template of {self._name} does not know"
            raise ValueError(f"{reason}; leave it out, or set data.ignore: [{KWARGS}.{unknown[0]}]")
        if not self._writes_calls and any(CALLS in turn.fields for turn in turns):
            raise ValueError(f"the chat template of {self._name} writes no tool calls; take a base whose template does")
        if generation_prompt:
            return self._chat(self._prompt(turns), (), ())
        texts: dict[str, dict[int, CharSpan]] = {}
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        for number, index in reversed([*enumerate(answers)]):
            if not turns[index].is_trained:
                continue
            text, start, end = self._with_answer(turns[: index + 1])
            longer = next((longer for longer in texts if longer.startswith(text[:end])), text)
            texts[longer] = {number: (start, end), **texts.get(longer, {})}
        last, *others = (self._chat(text, [*spans.values()], [*spans]) for text, spans in texts.items())
        return replace(last, others=tuple(others))

    def _chat(self, text: str, spans: Sequence[CharSpan], answers: Sequence[int]) -> Chat:
        if not self._pieces:
            return Chat(text, tuple(spans), answers=tuple(answers))
        controls = [match.span() for match in self._special.finditer(text)]
        breaks = [match.start() for match in re.finditer(BREAK, text)]

        def without_breaks(spans: Sequence[CharSpan]) -> tuple[CharSpan, ...]:
            return tuple((start - bisect_left(breaks, start), end - bisect_left(breaks, end)) for start, end in spans)

        return Chat(text.replace(BREAK, ""), without_breaks(spans), without_breaks(controls), answers=tuple(answers))

    def thought_and_answer(self, text: str) -> tuple[str, str]:
        """Splits an answer as `Prompts` does; an empty thought counts if the template itself writes such."""
        match, knows_them = _THOUGHT.fullmatch(text), self.thinking is not None or END_THINK in self._opening
        return (match[1].strip(), match[2]) if match and (match[1].strip() or knows_them) else ("", text)

    def answer_in(self, text: str) -> str:
        """Cuts the answer, with any thoughts, out of decoded text."""
        text = text.strip()
        return "" if self._opening.startswith(text) else text.removeprefix(self._opening).lstrip()

    def _message(self, turn: Turn) -> dict[str, Any]:
        text, more = turn.text, turn.fields
        message: dict[str, Any] = {"role": turn.role}
        message |= {name: more[name] for name in ("name", "tool_call_id", CALLS) if name in more}
        for call in more.get(CALLS, ()) if self._arguments_as_text else ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        parts: list[dict[str, str]] = []
        if turn.role == "assistant":
            thought, answer = self.thought_and_answer(text)
            text = answer if self._thoughts or not thought else text
            if thought and self._thoughts == "fields":
                message |= {"reasoning_content": thought, "thinking": thought}
            elif thought and self._thoughts == "part":
                parts.append({"type": "thinking", "thinking": thought})
        pieces = self._media.split(text)
        if len(pieces) == 1 and turn.role not in self._in_parts and not parts:
            return {**message, "content": text}
        for number, piece in enumerate(pieces):
            if number % 2:
                parts.append({"type": "image" if piece == IMAGE_PLACEHOLDER else "video"})
                continue
            if number:
                piece = piece.removeprefix("\n")  # what records write between a picture and its question
            if piece or len(pieces) == 1:
                parts.append({"type": "text", "text": piece})
        return {**message, "content": parts}

    def _prompt(self, turns: Sequence[Turn]) -> str:
        """Returns the text up to where the next answer begins."""
        text = self._apply(turns, generation_prompt=True)
        self._check_nothing_lost(turns, text)
        if TOOLS in turns[0].fields and self._apply(turns, generation_prompt=True, tools=False) == text:
            reason = f"the chat template of {self._name} writes no tools; take a base whose template does"
            raise ValueError(f"{reason}, or set data.ignore: [{TOOLS}]")
        return text

    def _with_answer(self, turns: Sequence[Turn]) -> tuple[str, int, int]:
        """Returns a text that ends with the last answer as it will be generated, and the answer's span."""
        prompt, whole = self._prompt(turns[:-1]), self._apply(turns, generation_prompt=False)
        thought, answer = self.thought_and_answer(turns[-1].text)
        switches = {**self._switch, **turns[0].fields.get(KWARGS, {})}
        thinking = next((switches[name] for name in self._switch), None)
        if thought and thinking is False:
            reason = "it has thoughts, but none of the inspected samples has"
            raise ValueError(f"{reason}; put a sample with thoughts among the first")
        functions = [call["function"] for call in turns[-1].fields.get(CALLS, ())]
        ending, closing, rest_of_text = self._end_of(whole, turns[-1])
        answered = whole.removesuffix(ending)
        opened = prompt.rstrip().endswith(THINK)
        before = None if opened else self._opening_after_calls(turns, answered)
        if before is not None or answered.startswith(prompt):
            written = answered[len(prompt if before is None else before) :]
        else:
            before = prompt.rstrip().removesuffix(THINK) if opened else prompt.removesuffix(self._added)
            is_known = opened or not self._added.strip() or thinking is False
            if before == prompt or not answered.startswith(before) or not is_known:
                where = "in a generation prompt and in a conversation"
                raise ValueError(f"the chat template opens an answer differently {where}")
            written = answered[len(before) :].lstrip().removeprefix(THINK if opened else "").lstrip()
        is_lost = thought not in written or (opened and END_THINK not in written)
        if thought and functions and not is_lost:  # it may be only in the call
            without = self._apply([*turns[:-1], replace(turns[-1], text=answer)], generation_prompt=False)
            is_lost = without == whole
        if is_lost:
            rest = written.lstrip().removeprefix(END_THINK).lstrip()
            written = ("" if opened else f"{THINK}\n") + f"{thought}\n{END_THINK}\n\n{rest}"
        if answer.strip() not in written or thought not in written:
            raise ValueError(f"the chat template leaves out or changes the text of turn {len(turns) - 1}")
        self._check_calls(written, functions)
        text = prompt + written + closing
        return text + rest_of_text, len(prompt), len(text)

    def _check_calls(self, written: str, functions: Sequence[Mapping[str, Any]]) -> None:
        for name in (names := [function["name"] for function in functions]):
            is_whole = all(
                has_words(written, leaf) for function in functions for leaf in leaves_of(function["arguments"])
            )
            if not is_whole or written.count(name) < names.count(name):
                reason = f"the chat template of {self._name} leaves out or changes the call of {name!r}"
                raise ValueError(f"{reason}; take a base whose template writes such calls")

    def _opening_after_calls(self, turns: Sequence[Turn], answered: str) -> str | None:
        """Returns what precedes an answer after calls, if it can be found; the template may rewrite the calls.

        Once an answer follows, gpt-oss drops the calls' thoughts, and Gemma 4 begins a turn that no prompt has.
        """
        if not any(turn.role == "tool" or CALLS in turn.fields for turn in turns):
            return None
        first, second = (
            self._apply([*turns[:-1], Turn("assistant", text)], generation_prompt=False) for text in ("It is.", "No.")
        )
        before = first[: shared_beginning(first, second)]
        opening = before.removesuffix(self._before)
        return opening if before.endswith(self._before) and answered.startswith(opening) else None

    def _end_of(self, answered: str, turn: Turn) -> tuple[str, str, str]:
        """Returns what follows a text's last answer, what of that is trained, and what is not.

        Calls may have a closing token of their own (gpt-oss).
        """
        if answered.endswith(self._ending):
            return self._ending, self._closing, self._rest
        last = [*self._special.finditer(answered)][-1:] if CALLS in turn.fields else []
        if not last or answered[last[0].end() :].strip():
            raise ValueError("the chat template closes this answer differently from others")
        return answered[last[0].start() :], last[0][0], answered[last[0].end() :]

    def _check_nothing_lost(self, turns: Sequence[Turn], rendered: str) -> None:
        contents = [self._message(turn)["content"] for turn in turns]
        if any(str(content) in rendered for content in contents if not isinstance(content, str)):
            raise ValueError("the chat template writes a message's list of parts as it is")
        texts = [self.thought_and_answer(turn.text) if turn.role == "assistant" else ("", turn.text) for turn in turns]
        pieces = [[piece.strip() for text in pair for piece in self._media.split(text)[::2]] for pair in texts]
        if turns and turns[0].role == "system" and (text := turns[0].text.strip()):
            again = sum(piece.count(text) for turn in pieces[1:] for piece in turn)
            if rendered.count(text) <= again:  # its words may be said again later
                raise ValueError("the chat template leaves out or changes the system turn")
        for number, turn in enumerate(pieces):  # earlier answers are rewritten by many templates
            is_checked = turns[number].role != "assistant" or number == len(turns) - 1
            has = has_words if turns[number].role == "tool" else str.__contains__
            if is_checked and not all(has(rendered, piece) for piece in turn):
                raise ValueError(f"the chat template leaves out or changes the text of turn {number}")

    def _apply(self, turns: Sequence[Turn], *, generation_prompt: bool, tools: bool = True, **switch: bool) -> str:
        """Applies the template. Raises ValueError for whatever is wrong with it."""
        first_fields = turns[0].fields
        try:
            text = self._processor.apply_chat_template(
                [self._message(turn) for turn in turns],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                tools=first_fields.get(TOOLS) if tools else None,
                **(switch or {**self._switch, **first_fields.get(KWARGS, {})}),
            )
        except MemoryError:
            raise
        except Exception as error:  # it is a program, from elsewhere
            raise ValueError(f"the chat template refuses it: {error or type(error).__name__}") from error
        if not isinstance(text, str):
            raise ValueError(f"the chat template gave {type(text).__name__}, not text")
        return text


def leaves_of(value: Any) -> Iterator[Any]:
    """Yields the keys, strings, numbers and other leaves of a JSON value, at every depth."""
    if not isinstance(value, dict | list):
        yield value
        return
    inner_values = (*value, *value.values()) if isinstance(value, dict) else value
    for inner in inner_values:
        yield from leaves_of(inner)


def has_words(text: str, value: Any) -> bool:
    """Tells whether a text holds words or a number, as they are or as JSON writes them."""
    return str(value) in text or json.dumps(value, ensure_ascii=False).removeprefix('"').removesuffix('"') in text


def special_tokens(processor: Any, allowed: Collection[str] = ()) -> re.Pattern[str]:
    """Compiles a pattern of the tokenizer's special tokens and the processor's picture tokens."""
    tokenizer = processor.tokenizer
    tokens = set(tokenizer.all_special_tokens)
    tokens |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = vars(processor)
    tokens |= {own[name] for name in ("image_token", "video_token", "audio_token") if isinstance(own.get(name), str)}
    tokens -= {"", IMAGE_PLACEHOLDER if isinstance(processor, PieceProcessor) else "", *allowed}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _check_no_separator(processor: Any, name: str) -> None:
    """Refuses transformers before 5.23 for a Chameleon: the separator that it puts after a text would be trained."""
    if options := quirks_of(processor).options:
        encoded = [int(token) for token in processor(text=["."], **options)["input_ids"][0]]
        if encoded != processor.tokenizer(".")["input_ids"]:
            raise UserError(
                f"model.template: the processor of {name} puts a separator after every text; "
                "take transformers 5.23 or later"
            )


def prompts_of(
    processor: Any,
    name: str,
    template: str | None,
    *,
    pictures: bool,
    train_on: TrainOn = "all",
    thinking: bool | None = None,
) -> Prompts:
    """Chooses how a processor's turns become text: by the format `template`, or else by its chat template."""
    pieces = isinstance(processor, PieceProcessor)
    if template is None and pieces and pictures:
        template = usual_template(processor.tokenizer)
    chosen = template if template in FORMATS else quirks_of(processor).format
    if chosen is not None:
        _check_no_separator(processor, name)
        return FORMATS[chosen](processor, name, special_tokens(processor), tells_special=pieces)
    if template is None or template == ProcessorChat.name:
        return ProcessorChat(processor, name, pictures=pictures, thinking=thinking)
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
