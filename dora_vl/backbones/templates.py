"""Turns as text: what a template is, and rounds of question and answer put together from a template's strings."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dora_vl.data.samples import TrainedAnswer
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import UserError

Span = tuple[int, int]

VIDEO_MARK = "\ufdd1"  # as BREAK; stands where a video goes, since `<video>` is also what HTML's text holds
BREAK = "\ufdd0"  # a Unicode noncharacter: no text may hold it, so it can mark one that must not become a token


@dataclass(frozen=True)
class Chat:
    """A conversation's text, pictures as the template marks them, and what its characters are.

    `answer_spans` are supervised: from the end of the generation prompt before an answer through what closes it. A
    separating space before the answer belongs to the span, because generation has to produce it.
    `controls` are the special tokens that the template wrote; where a processor of pieces makes the tokens, the same
    text anywhere else is only text.
    """

    text: str
    answer_spans: tuple[Span, ...]
    controls: tuple[Span, ...] = ()
    suffix: str | None = None
    """An answer that the processor takes apart from the text; its span then stands behind the text."""
    by_token_types: bool = False
    """Whether the processor marks the answer's tokens itself, by `token_type_ids` of one."""


class Prompts:
    """How turns become text."""

    name: str = ""
    """The value of `model.template` that chooses it."""
    bos_token: str | None = None
    stop: str = ""
    """Text that ends an answer, where no special token does."""

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """The turns as text; `generation_prompt` opens the next answer. Raises: ValueError if the turns do not fit."""
        raise NotImplementedError

    def in_test(self) -> Prompts:
        """The same as a test asks, which differs for the published prompts of instructions."""
        return self

    def answer_in(self, text: str) -> str:
        """What of decoded text is the answer."""
        return (text.partition(self.stop)[0] if self.stop else text).strip()


def system_and_talk(turns: Sequence[Turn]) -> tuple[Turn | None, Sequence[Turn]]:
    """The system turn, where the first one is that, and the turns after it."""
    return (turns[0], turns[1:]) if turns and turns[0].role == "system" else (None, turns)


def refuse_system(turns: Sequence[Turn], name: str) -> None:
    """Refuses a system turn. Raises: ValueError that names the format, which has no place for one."""
    if system_and_talk(turns)[0] is not None:
        raise ValueError(f"template {name} has no place for a system turn; choose another model.template")


PROBE = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhich colour is it?"), Turn("assistant", "It is purple."))


SECONDS, MEMORY = 2, 1 << 30
"""Of a processor and in bytes, that trying a chat template takes at most; it takes a fiftieth of the first."""


def rendered_by(render: Callable[[], object]) -> str:
    """The text that a model's chat template makes. Raises: ValueError for whatever is wrong with it."""
    try:
        text = render()
    except MemoryError:
        raise
    except Exception as error:  # it is a program, from elsewhere
        raise ValueError(f"the chat template refuses it: {error or type(error).__name__}") from error
    if not isinstance(text, str):
        raise ValueError(f"the chat template gave {type(text).__name__}, not text")
    return text


def check_ends(render: Callable[[], object], name: str) -> None:
    """Refuses a chat template that does not end, or fills the memory: it is tried in a process of its own.

    Args:
        render: tries it; what it raises is left to who calls it again.
        name: of the model, for the message.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child needs none of theirs
        child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            raise UserError(
                f"the chat template of {name} does not end within {SECONDS} s, or takes more than {MEMORY >> 30} GiB; "
                "repair its chat_template.jinja (or tokenizer_config.json), or take another base"
            )
        return
    status = 0
    try:
        logging.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20 * SECONDS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for limit, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, SECONDS),
            (resource.RLIMIT_AS, used + MEMORY),
        ):
            resource.setrlimit(limit, (most, most))
        render()
    except MemoryError:
        status = 1
    finally:
        os._exit(status)


def framed(answers: Sequence[Turn], probe: str) -> list[TrainedAnswer]:
    """Answers with what is trained before and behind each, by what is trained of `PROBE`'s."""
    opening, _, closing = probe.rpartition(PROBE[1].text)
    return [TrainedAnswer(opening, turn.text, closing) for turn in answers]


def refuse_marks(turns: Sequence[Turn]) -> None:
    """Refuses words that hold what stands for marks here (`BREAK`, `VIDEO_MARK`, stand-ins): Unicode's noncharacters.

    Raises: ValueError.
    """
    if any(0xFDD0 <= ord(character) <= 0xFDEF for turn in turns for character in turn.text):
        raise ValueError("its text holds a Unicode noncharacter (U+FDD0 to U+FDEF)")


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
class RoundTemplate(Prompts):
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

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """See `Prompts.render`."""
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
        return Chat(text.text, tuple(answers), tuple(text.controls))

    def _begin(self, text: _Text, system: Turn | None) -> str:
        """Writes what comes before the first round; returns the first question's frame."""
        if system is None:
            text.own(self.system)
            return self.first_question or self.question
        if not self.own_system:
            refuse_system((system,), self.name)
        text.filled(self.own_system, system.text)
        return self.first_question_after_system or self.first_question or self.question

    def _ask(self, text: _Text, question: str, *, frame: str) -> None:
        text.filled(frame, question.replace(IMAGE_PLACEHOLDER, self.picture.replace("{}", IMAGE_PLACEHOLDER)))
        text.own(self.answer_role)


@dataclass(frozen=True, kw_only=True)
class PlainTemplate(Prompts):
    """Projector pretraining: the pictures of the question, its text dropped, then the caption and a newline."""

    name: str = "plain"
    stop: str = ""

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """See `Prompts.render`; takes one question with a picture, and its caption."""
        refuse_system(turns, self.name)
        check_order(turns, generation_prompt=generation_prompt)
        if len(turns) + generation_prompt != 2 or IMAGE_PLACEHOLDER not in turns[0].text:
            raise ValueError(f"template plain needs one question with {IMAGE_PLACEHOLDER} and one caption")
        pictures = IMAGE_PLACEHOLDER * turns[0].text.count(IMAGE_PLACEHOLDER)
        if generation_prompt:
            return Chat(pictures, ())
        text = pictures + turns[1].text + "\n"
        return Chat(text, ((len(pictures), len(text)),))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The encoder's text. `subtitles` may be cut at their end so that the whole fits; `text` follows them."""

    subtitles_before: str = ""
    subtitles: str = ""
    text: str
