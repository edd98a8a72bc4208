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

from typing import Literal

from dora_vl.backbones.templates import (
    PlainTemplate,
    RoundTemplate,
    Template,
)

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


_ROWS: tuple[Template, ...] = (
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
TEMPLATES: dict[str, Template] = {row.name: row for row in _ROWS}
