"""Every prompt format by its name, a row of strings each, as LLaVA c121f04 trains with them.

Strings: `llava/conversation.py`; where `preprocess` in `llava/train/train.py` writes others, those. The original has
more names for the same: `v1` is vicuna_v1, `llava_v0` is v0, `v0_plain` is plain, `mistral_direct` is chatml_direct.
`chatml` is Qwen's and SmolLM's, without a system line.

What is labelled is in every row the answer with what closes it. The original labels the same for the vicuna_v1, llama_2
and plain kinds. Its other masks are wrong, and ours are not:

- mpt, chatml_direct: its lengths leave the last "<|im_end|>" out. It drops the sample as a mismatch, or with a legacy
  tokenizer labels one place too early.
- v0, v0_mmtag: it counts a begin token for every turn, and so is one place further off with each; at first it labels
  "Assistant:" too. It trains "###" to close an answer, as here: no special token does, so an answer is read up to that
  text. And it asks with "###Human: ", which it never trains; here a prompt is the beginning of a training text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dora_vl.backbones.loading import TrainOn
from dora_vl.backbones.templates import Chat, PlainTemplate, Prompts, RoundTemplate
from dora_vl.data.turns import Turn

TemplateName = Literal[
    "vicuna_v1",
    "llava_v1",
    "v1_mmtag",
    "llama_2",
    "llava_llama_2",
    "mistral_instruct",
    "mpt",
    "chatml_direct",
    "chatml",
    "v0",
    "v0_mmtag",
    "plain",
    "tokenizer",
]

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM = VICUNA_SYSTEM.replace("user", "human")
MMTAG_SYSTEM = (  # no space between the last two sentences, as published
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAMA_2_SYSTEM = (  # two spaces before "Your", as published
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)


def _v1(name: str, system: str, *, picture: str = "{}") -> RoundTemplate:
    return RoundTemplate(
        name=name,
        system=f"{system} ",
        own_system="{} ",
        question="USER: {} ",
        answer_role="ASSISTANT:",
        answer=" {}</s>",
        picture=picture,
    )


def _llama_2(name: str, system: str) -> RoundTemplate:
    return RoundTemplate(
        name=name,
        own_system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n",
        first_question=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{{}} [/INST]",
        first_question_after_system="{} [/INST]",
        question="[INST] {} [/INST]",
        answer_role="",
        answer=" {} </s>",
        between="<s>",
    )


def _mpt(name: str, system: str) -> RoundTemplate:
    return RoundTemplate(
        name=name,
        system=f"<|im_start|>system\n{system}<|im_end|>",
        own_system="<|im_start|>system\n{}<|im_end|>",
        question="<|im_start|>user\n{}<|im_end|>",
        answer_role="<|im_start|>assistant\n",
        answer="{}<|im_end|>",
    )


def _v0(name: str, system: str, *, picture: str = "{}") -> RoundTemplate:
    return RoundTemplate(
        name=name,
        system=f"{system}\n\n### ",
        own_system="{}\n\n### ",
        question="Human: {}\n### ",
        answer_role="Assistant:",
        answer=" {}\n###",
        between=" ",
        end=" ",
        picture=picture,
        stop="###",
    )


_ROWS: tuple[RoundTemplate | PlainTemplate, ...] = (
    _v1("vicuna_v1", VICUNA_SYSTEM),
    _v1("llava_v1", HUMAN_SYSTEM),
    _v1("v1_mmtag", MMTAG_SYSTEM, picture="<Image>{}</Image>"),
    _llama_2("llama_2", LLAMA_2_SYSTEM),
    _llama_2("llava_llama_2", LLAVA_LLAMA_2_SYSTEM),
    RoundTemplate(name="mistral_instruct", question="[INST] {} [/INST]", answer_role="", answer=" {} </s>"),
    _mpt("mpt", MPT_SYSTEM),
    _mpt("chatml_direct", "Answer the questions."),
    RoundTemplate(
        name="chatml",
        own_system="<|im_start|>system\n{}<|im_end|>\n",
        question="<|im_start|>user\n{}<|im_end|>\n",
        answer_role="<|im_start|>assistant\n",
        answer="{}<|im_end|>",
        between="\n",
    ),
    _v0("v0", HUMAN_SYSTEM),
    _v0("v0_mmtag", MMTAG_SYSTEM, picture="<Image>{}</Image>"),
    PlainTemplate(),
)
TEMPLATES: Mapping[str, RoundTemplate | PlainTemplate] = {row.name: row for row in _ROWS}


# Instructions as text: the published prompts, to the last space.
#
# Sources: AGI-Edgerunners/LLM-Adapters, `finetune.py` and `commonsense_evaluate.py`; NVlabs/DoRA, the files of the same
# names in `commonsense_reasoning/`. Their training prompt is indented by 16 spaces, its blank lines hold 16 spaces too,
# and its first line ends in white space (in LLM-Adapters in a linter's comment); the test prompt ends its first line
# otherwise and has empty blank lines. Both are kept as they are: a model trained with the one is asked with the other.


PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@dataclass(frozen=True, kw_only=True)
class InstructionPrompt:
    """What stands before an output, in training and in a test; `{instruction}` and `{input}` are filled in."""

    train: str
    train_with_input: str
    test: str
    test_with_input: str

    def before_output(self, instruction: str, context: str, *, test: bool) -> str:
        """The text up to where the output begins; `context` is the record's `input`."""
        plain, paired = (self.test, self.test_with_input) if test else (self.train, self.train_with_input)
        pieces = (paired if context else plain).split("{instruction}")
        return instruction.join(piece.replace("{input}", context) for piece in pieces)


def _laid_out(first_line: str, *, blank: str, indent: str, with_input: bool) -> str:
    """Alpaca's sections, each line indented; `blank` is what stands on the lines between them."""
    sections = ["### Instruction:\n{instruction}", *(["### Input:\n{input}"] if with_input else []), "### Response:\n"]
    body = f"\n{blank}\n".join(f"{indent}{section}".replace("\n", f"\n{indent}") for section in sections)
    return f"{first_line}\n\n{body}"


def _published(*, train_ends: tuple[str, str], test_ends: tuple[str, str]) -> InstructionPrompt:
    """The indented prompts; the pairs are how the first line ends, without and with an input."""
    spaces = " " * 16
    return InstructionPrompt(
        train=_laid_out(PLAIN + train_ends[0], blank=spaces, indent=spaces, with_input=False),
        train_with_input=_laid_out(PAIRED + train_ends[1], blank=spaces, indent=spaces, with_input=True),
        test=_laid_out(PLAIN + test_ends[0], blank="", indent=spaces, with_input=False),
        test_with_input=_laid_out(PAIRED + test_ends[1], blank="", indent=spaces, with_input=True),
    )


_ALPACA = (
    _laid_out(PLAIN, blank="", indent="", with_input=False),
    _laid_out(PAIRED, blank="", indent="", with_input=True),
)
PROMPTS: Mapping[str, InstructionPrompt] = {
    "nvlabs": _published(train_ends=("  ", " "), test_ends=(" ", "")),
    "llm_adapters": _published(train_ends=("  # noqa: E501", "  # noqa: E501"), test_ends=(" ", "")),
    "alpaca": InstructionPrompt(
        train=_ALPACA[0], train_with_input=_ALPACA[1], test=_ALPACA[0], test_with_input=_ALPACA[1]
    ),
}
"""`nvlabs` is the DoRA paper's; `alpaca` is Stanford's own, the same in training and test."""


@dataclass(frozen=True, kw_only=True)
class Instruction(Prompts):
    """A published prompt: one question, its output, and the tokenizer's end token.

    Args:
        name: in `PROMPTS`.
        train_on: `all` labels prompt and output, as the published runs do; `answer` the output and its end alone.
        end: the tokenizer's end token.
        test: whether the test's wording asks, whatever is rendered.
    """

    name: str
    train_on: TrainOn
    end: str
    test: bool = False

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool = False) -> Chat:
        """See `Prompts.render`; takes one question, and its output."""
        if len(turns) + generation_prompt != 2 or turns[0].role != "user":
            raise ValueError("a prompt of instructions holds one question and its output; ask one question at a time")
        if not turns[0].instruction.strip():
            raise ValueError("'instruction' is empty")
        prompt, test = PROMPTS[self.name], self.test or generation_prompt
        before = prompt.before_output(turns[0].instruction, turns[0].input, test=test)
        if generation_prompt:
            return Chat(before, ())
        text = before + turns[1].text + self.end
        start = 0 if self.train_on == "all" else len(before)
        return Chat(text, ((start, len(text)),), controls=((len(text) - len(self.end), len(text)),))

    def in_test(self) -> Instruction:
        """See `Prompts.in_test`."""
        return replace(self, train_on="answer", test=True)

    def answer_in(self, text: str) -> str:
        """All of it."""
        return text
