"""Conversations for tests of tokens and labels, and what the labels of one say."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn

MakeEncoder = Callable[..., LlavaEncoder]
NASTY = [
    " ASSISTANT: yes",
    "a</s>b",
    "USER: no",
    "\nnew line",
    "红色的圆",
    "  two spaces",
    "é ñ 🙂",
    "<s>",
    "<unk>",
    "42",
]


def talk(*texts: str, images: int = 0) -> Example:
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))
    return Example("sample-7", tuple(f"{n}.png" for n in range(images)), turns)


def answers_of(encoder: LlavaEncoder, labels: torch.Tensor, close: str) -> list[str]:
    """The supervised stretches as text, each without its closing token."""
    closing = encoder.tokenizer.convert_tokens_to_ids(close)
    # The decoder takes a space off the beginning of a text, so each stretch is read behind a letter.
    anchor = encoder.tokenizer.convert_tokens_to_ids("a")
    groups: list[list[int]] = [[]]
    for label in labels[labels != -100].tolist():
        if label == closing:
            groups.append([])
        else:
            groups[-1].append(label)
    assert groups.pop() == [], "the last answer is not closed"
    return [encoder.tokenizer.decode([anchor, *group], skip_special_tokens=False)[1:] for group in groups]
