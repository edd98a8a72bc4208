"""Prompt formats: the classes, and every format by its name.

`TEMPLATES` are LLaVA's, as LLaVA c121f04 trains with them; `FORMATS` are for models without a chat template, `PROMPTS`
the published prompts of instructions. The chat templates of models are in `prompts`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.specs import TrainOn
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn, out_of_order
from dora_vl.errors import UserError, log_once

_log = logging.getLogger(__name__)

CharSpan = tuple[int, int]

VIDEO_MARK = "\ufdd1"  # marks a video like BREAK, since `<video>` may be HTML in a text
BREAK = "\ufdd0"  # a Unicode noncharacter: no text may hold it, so it can mark one that must not become a token
PROBE = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhich colour is it?"), Turn("assistant", "It is purple."))


@dataclass(frozen=True)
class Chat:
    """A conversation's text, pictures as the template marks them, with the spans of answers and special tokens.

    `answer_spans` are supervised: from the end of the generation prompt before an answer through what closes it. A
    separating space before the answer belongs to the span, because generation has to produce it.
    `controls` are the special tokens that the template wrote; where a processor of pieces makes the tokens, the same
    text anywhere else is only text.
    """

    text: str
    answer_spans: tuple[CharSpan, ...]
    controls: tuple[CharSpan, ...] = ()
    others: tuple[Chat, ...] = ()
    """These are shorter texts, for answers that the template rewrites once later turns follow; no answer is in two."""
    answers: tuple[int, ...] = ()
    """The spans belong to the answers at these indices, where `others` have some too."""
    suffix: str | None = None
    """The processor takes this answer apart from the text; its span then follows the text."""
    by_token_types: bool = False
    """True where the processor marks the answer's tokens itself, by `token_type_ids` of one."""

    def after_greeting(self) -> Chat:
        """Returns the chat with its answers counted behind a greeting that it leaves out."""
        answers = tuple(number + 1 for number in self.answers or range(len(self.answer_spans)))
        return replace(self, answers=answers, others=tuple(other.after_greeting() for other in self.others))


class Prompts:
    """Turns a conversation into text."""

    name: str = ""
    """`model.template` chooses the format by this name."""
    bos_token: str | None = None
    takes_system: bool = False
    """True where the format has a place for a system turn."""
    takes_tools: bool = False
    """True where the format writes more than turns say: tools, their calls and results."""
    thinking: bool | None = None
    """True or False where the format asks for thoughts or for none; None if it leaves that to the model."""

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """Renders turns as text up to the last answer that is trained; `generation_prompt` opens the next answer.

        A greeting, an answer before the first question, is untrained context; a format without a place leaves it out.

        Raises: ValueError if they do not alternate from the user, after one system turn where there is a place for it,
            end differently than asked, an answer holds nothing, or the format has no place for them.
        """
        self._refuse_tools(turns)
        system, conversation = (turns[0], turns[1:]) if turns and turns[0].role == "system" else (None, turns)
        if system is not None and not self.takes_system:
            raise ValueError(
                f"template {self.name} has no place for a system turn; leave it out, or choose another template"
            )
        greeting = [replace(turn, is_trained=False) for turn in conversation[:1] if turn.role == "assistant"]
        rounds = conversation[len(greeting) :]
        if reason := out_of_order(rounds):
            raise ValueError(reason)
        if greeting and rounds and not self._takes_greeting(with_system=system is not None):
            log_once(_log, logging.WARNING, f"template {self.name} has no place for a greeting: it is left out")
            others = [*turns[: -len(conversation)], replace(rounds[0], more=greeting[0].more), *rounds[1:]]
            return self.render(others, generation_prompt=generation_prompt).after_greeting()
        conversation = [*greeting, *rounds]
        answers = [index for index, turn in enumerate(conversation) if turn.role == "assistant"]
        for number, index in enumerate(answers, 1):
            if not conversation[index].text.strip() and not conversation[index].more:
                raise ValueError(f"answer {number} is empty")
        if not conversation or (conversation[-1].role == "assistant") == generation_prompt:
            last = "a question" if generation_prompt else "an answer"
            raise ValueError(f"{len(conversation)} turns, but {last} must be last")
        if generation_prompt:
            return self._render(system, conversation, generation_prompt=True)
        trained = tuple(number for number, index in enumerate(answers) if conversation[index].is_trained)
        if not trained:
            raise ValueError("none of its answers is to be trained on")
        chat = self._render(system, conversation[: answers[trained[-1]] + 1], generation_prompt=False)
        if chat.answers or len(trained) == len(answers):
            return chat
        return replace(chat, answers=trained, answer_spans=tuple(chat.answer_spans[number] for number in trained))

    def _refuse_tools(self, turns: Sequence[Turn]) -> None:
        if not self.takes_tools and any(turn.more or turn.role == "tool" for turn in turns):
            reason = f"template {self.name} has no place for tools, calls, results and arguments of chat templates"
            raise ValueError(f"{reason}; take a base whose own template writes them (model.template: tokenizer)")

    def _takes_greeting(self, *, with_system: bool) -> bool:
        return False

    def _render(self, system: Turn | None, conversation: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        raise NotImplementedError

    def in_test(self) -> Prompts:
        """Returns the format that tests ask with; only the published prompts of instructions have another."""
        return self

    def thought_and_answer(self, text: str) -> tuple[str, str]:
        """Splits an answer into its `<think>` part, where the format knows thoughts, and the rest."""
        return "", text

    def answer_in(self, text: str) -> str:
        """Cuts the answer out of decoded text."""
        return text.strip()


def shared_beginning(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Counts the characters or ids that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(first), len(second)))


@dataclass(frozen=True, kw_only=True)
class RoundTemplate(Prompts):
    """Writes rounds of question and answer; `{}` marks where question or answer goes.

    Special tokens count only where the template writes them; in a person's text they stay text.
    """

    name: str
    system: str = ""
    """This text precedes the first round."""
    own_system: str = ""
    """Replaces `system` by a sample's system turn, `{}`; empty refuses such samples."""
    first_question: str = ""
    """Replaces `question` in the first round, where it differs."""
    first_question_after_system: str = ""
    """Replaces `first_question` after a sample's own system turn."""
    question: str
    answer_role: str
    """This text ends the generation prompt."""
    answer: str
    """This text is supervised: generation has to produce it."""
    between: str = ""
    """This text follows every round but the last."""
    picture: str | None = None
    """Replaces each `<image>` and a line end after it by the processor's token and text around it; None leaves both."""
    special: tuple[str, ...] = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    """Special tokens among these strings."""
    refused: re.Pattern[str] | None = None
    """Samples whose words hold such a token are refused, where the processor would take it for the template's."""
    bos_token: str | None = None

    @property
    def takes_system(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Prompts`."""
        return bool(self.own_system)

    def _takes_greeting(self, *, with_system: bool) -> bool:
        return bool(self.answer_role)  # else only its question shows who speaks

    def _render(self, system: Turn | None, conversation: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        if self.refused is not None:
            refuse_special(conversation, self.refused)
        first_question = self.first_question or self.question
        # The template's strings, what a person said at the `{}` of each, and whether it is an answer.
        frames = [(self.system, "", False)]
        if system is not None:
            first_question = self.first_question_after_system or first_question
            frames = [(self.own_system, system.text, False)]
        for number, turn in enumerate(conversation):
            if turn.role == "user":
                frames.append((self.between if number else "", "", False))
                frames.append((self.question if number else first_question, turn.text, False))
                frames.append((self.answer_role, "", False))
            else:
                frames += [] if number else [(self.answer_role, "", False)]
                frames.append((self.answer, turn.text, True))
        special = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        text, answers, controls = "", [], []
        for frame, content, is_answer in frames:
            before, _, after = frame.partition("{}")
            words = [content]
            if self.picture is not None and not is_answer:
                words = [piece.removeprefix("\n") for piece in content.split(IMAGE_PLACEHOLDER)]
            written = [before, *[self.picture or ""] * (len(words) - 1), after]
            start = len(text)
            for own, said in zip(written, [*words, ""], strict=True):
                controls += [(len(text) + match.start(), len(text) + match.end()) for match in special.finditer(own)]
                text += own + said
            if is_answer:
                answers.append((start, len(text)))
        return Chat(text, tuple(answers), tuple(controls))


def refuse_special(turns: Sequence[Turn], special: re.Pattern[str]) -> None:
    """Raises a ValueError for words that the tokenizer would take for one of its special tokens."""
    for number, turn in enumerate(turns):
        if match := special.search(turn.text.replace(IMAGE_PLACEHOLDER, "")) or special.search(turn.more):
            raise ValueError(f"turn {number} holds {match[0]!r}, which is a special token of this model")


@dataclass(frozen=True, kw_only=True)
class PlainTemplate(Prompts):
    """Renders pairs for projector pretraining: the question's pictures without its text, the caption and a newline."""

    name: str = "plain"

    def _render(self, system: Turn | None, conversation: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        if len(conversation) + generation_prompt != 2 or IMAGE_PLACEHOLDER not in conversation[0].text:
            raise ValueError(f"template plain needs one question with {IMAGE_PLACEHOLDER} and one caption")
        pictures = IMAGE_PLACEHOLDER * conversation[0].text.count(IMAGE_PLACEHOLDER)
        if generation_prompt:
            return Chat(pictures, ())
        text = pictures + conversation[1].text + "\n"
        return Chat(text, ((len(pictures), len(text)),))


# Every template, a row of strings each. Strings: `llava/conversation.py`; where `preprocess` in `llava/train/train.py`
# writes others, those. The original has more names for the same: `v1` is vicuna_v1, `v0_plain` is plain,
# `mistral_direct` is chatml_direct. `chatml` is Qwen's and SmolLM's, without a system line.
#
# What is labelled is in every row the answer with what closes it. The original labels the same but for chatml_direct:
# its lengths leave the last "<|im_end|>" out. It drops the sample as a mismatch, or with a legacy tokenizer labels one
# place too early.

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2_SYSTEM = (  # two spaces before "Your", as published
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)


def _v1(name: str, system: str) -> RoundTemplate:
    return RoundTemplate(
        name=name,
        system=f"{system} ",
        own_system="{} ",
        question="USER: {} ",
        answer_role="ASSISTANT:",
        answer=" {}</s>",
    )


_ROWS: tuple[RoundTemplate | PlainTemplate, ...] = (
    _v1("vicuna_v1", VICUNA_SYSTEM),
    _v1("llava_v1", VICUNA_SYSTEM.replace("user", "human")),
    RoundTemplate(
        name="llama_2",
        own_system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n",
        first_question=f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n{{}} [/INST]",
        first_question_after_system="{} [/INST]",
        question="[INST] {} [/INST]",
        answer_role="",
        answer=" {} </s>",
        between="<s>",
    ),
    RoundTemplate(name="mistral_instruct", question="[INST] {} [/INST]", answer_role="", answer=" {} </s>"),
    RoundTemplate(
        name="chatml_direct",
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        own_system="<|im_start|>system\n{}<|im_end|>",
        question="<|im_start|>user\n{}<|im_end|>",
        answer_role="<|im_start|>assistant\n",
        answer="{}<|im_end|>",
    ),
    RoundTemplate(
        name="chatml",
        own_system="<|im_start|>system\n{}<|im_end|>\n",
        question="<|im_start|>user\n{}<|im_end|>\n",
        answer_role="<|im_start|>assistant\n",
        answer="{}<|im_end|>",
        between="\n",
    ),
    PlainTemplate(),
)
TEMPLATES: Mapping[str, RoundTemplate | PlainTemplate] = {row.name: row for row in _ROWS}


# Instructions as text: the published prompts, to the last space. Sources: AGI-Edgerunners/LLM-Adapters, `finetune.py`
# and `commonsense_evaluate.py`; NVlabs/DoRA, the same in `commonsense_reasoning/`. Their training prompt is indented by
# 16 spaces, its blank lines hold 16 spaces too, and its first line ends in white space (in LLM-Adapters in a linter's
# comment); the test prompt ends its first line differently and has empty blank lines. Both are kept as they are: a
# model trained with the one is asked with the other.

PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True, kw_only=True)
class InstructionPrompt:
    """Writes Alpaca's sections before an output; the first lines depend on split and input."""

    train: tuple[str, str] = (PLAIN, PAIRED)
    test: tuple[str, str] = (PLAIN, PAIRED)
    indent: str = ""
    between = ""
    """This text is between the prompt and the output."""

    def before_output(self, instruction: str, context: str, *, test: bool) -> str:
        """Returns the text up to where the output begins; `context` is the record's `input`."""
        sections = [("Instruction", instruction), *([("Input", context)] if context else []), ("Response", "")]
        blank = "" if test else self.indent
        body = f"\n{blank}\n".join(f"{self.indent}### {title}:\n{self.indent}{content}" for title, content in sections)
        return f"{(self.test if test else self.train)[bool(context)]}\n\n{body}"


class ClozePrompt(InstructionPrompt):
    """Writes only the instruction and a space before the output, as lm-eval does."""

    between = " "

    def before_output(self, instruction: str, context: str, *, test: bool) -> str:
        """Returns the text up to the space before the output."""
        return f"{instruction}\n{context}" if context else instruction


PROMPTS: Mapping[str, InstructionPrompt] = {
    "nvlabs": InstructionPrompt(train=(f"{PLAIN}  ", f"{PAIRED} "), test=(f"{PLAIN} ", PAIRED), indent=" " * 16),
    "llm_adapters": InstructionPrompt(
        train=(f"{PLAIN}  # noqa: E501", f"{PAIRED}  # noqa: E501"), test=(f"{PLAIN} ", PAIRED), indent=" " * 16
    ),
    "alpaca": InstructionPrompt(),
    "cloze": ClozePrompt(),
}
"""These prompts were published: `nvlabs` is the DoRA paper's; `alpaca` is Stanford's, the same in training and test."""


@dataclass(frozen=True, kw_only=True)
class Instruction(Prompts):
    """Renders a prompt of `PROMPTS`: one question, its output, and the tokenizer's end token.

    Args:
        train_on: `all` labels prompt and output, as the published runs do; `answer` only the output and its end.
        test: uses the test's wording in any case.
    """

    name: str
    train_on: TrainOn
    end: str
    test: bool = False

    def _render(self, system: Turn | None, conversation: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        if len(conversation) + generation_prompt != 2:
            raise ValueError("a prompt of instructions holds one question and its output; ask one question at a time")
        question = conversation[0]
        if not question.instruction.strip():
            raise ValueError("'instruction' is empty")
        prompt, test = PROMPTS[self.name], self.test or generation_prompt
        before = prompt.before_output(question.instruction, question.input, test=test)
        if generation_prompt:
            return Chat(before, ())
        text = before + prompt.between + conversation[1].text + self.end
        start = 0 if self.train_on == "all" else len(before)
        return Chat(text, ((start, len(text)),), controls=((len(text) - len(self.end), len(text)),))

    def in_test(self) -> Instruction:
        """Returns the format with the test's wording."""
        return replace(self, train_on="answer", test=True)

    def answer_in(self, text: str) -> str:
        """Returns all of the text."""
        return text


def question_answer(processor: Any, name: str, special: re.Pattern[str], *, tells_special: bool) -> RoundTemplate:
    """Returns `Question: ... Answer: ...`, a line for each round, pictures where the question has them.

    The tokenizer's end token closes an answer; nothing else would stop a trained model.

    Args:
        name: the model's name, for messages.
        special: matches the model's special tokens.
        tells_special: the processor tells those that the template wrote from the same characters in a text.
    """
    end, picture = str(processor.tokenizer.eos_token or ""), str(vars(processor).get("image_token") or "")
    if not end or not (picture or tells_special):
        lacking = "a token for a picture" if end else "an end token"
        raise UserError(f"model.template: question_answer needs {lacking}, and the processor of {name} names none")
    return RoundTemplate(
        name="question_answer",
        bos_token=processor.tokenizer.bos_token,
        question="Question: {} Answer:",
        answer_role="",
        answer=f" {{}}{end}",
        between="\n",
        picture=picture,
        special=(end,) if tells_special else (),
        refused=special,
    )


class PaliGemma(Prompts):
    """Makes PaliGemma's two parts: pictures and question, seen in both directions, and the answer, seen from its left.

    The processor gets the answer apart, as `suffix`, and tells the parts from one another by token_type_ids. So a
    conversation has one question, and its pictures come before it (google-research/big_vision, paligemma).
    """

    name = "paligemma"

    def __init__(self, processor: Any, name: str, special: re.Pattern[str], *, tells_special: bool) -> None:
        del name, tells_special
        self.bos_token = processor.tokenizer.bos_token
        self._picture = str(processor.image_token)
        self._special = special

    def _render(self, system: Turn | None, conversation: Sequence[Turn], *, generation_prompt: bool) -> Chat:
        refuse_special(conversation, self._special)
        if len(conversation) > 2:
            raise ValueError(f"{len(conversation)} turns, and a PaliGemma takes one question and one answer")
        question = conversation[0].text
        words = question.replace(IMAGE_PLACEHOLDER, "").lstrip("\n")
        pictures = question.count(IMAGE_PLACEHOLDER)
        before = question.rpartition(IMAGE_PLACEHOLDER)[0].replace(IMAGE_PLACEHOLDER, "")
        if before.strip():
            raise ValueError("a picture comes after words, and a PaliGemma takes pictures only before the question")
        if not pictures:
            raise ValueError("it has no picture, and a PaliGemma's processor takes no words without one")
        text = self._picture * pictures + words
        if generation_prompt:
            return Chat(text, (), by_token_types=True)
        return Chat(text, ((len(text), len(text) + 1),), suffix=conversation[1].text, by_token_types=True)


FORMATS: Mapping[str, Callable[..., Prompts]] = MappingProxyType(
    {"question_answer": question_answer, "paligemma": PaliGemma}
)
USUAL, OWN_TEMPLATE = ("vicuna_v1", "chatml"), "tokenizer"


def usual_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the format of a LLaVA that names none: the first of `USUAL` whose special tokens its tokenizer has."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for name in USUAL:
        probe = TEMPLATES[name].render(PROBE)
        if special.issuperset(probe.text[start:end] for start, end in probe.controls):
            return name
    return OWN_TEMPLATE
