"""Conversations for tests of tokens and labels, and what the labels of one say."""

from __future__ import annotations

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.prompts import prompts_of
from dora_vl.data.example import Example
from dora_vl.data.samples import Encoded
from dora_vl.data.turns import Turn

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


PICTURE = Image.new("RGB", (8, 8))


def no_pixels(_: Image.Image) -> torch.Tensor:
    return torch.zeros(3, 8, 8)


def piece_encoder(
    tokenizer: PreTrainedTokenizerBase, template: str | None = "vicuna_v1", max_tokens: int = 2048, each: int = 4
) -> Encoder:
    """A LLaVA's encoder, without a model; a picture is so many tokens."""
    image = int(tokenizer.convert_tokens_to_ids("<image>"))
    processor = PieceProcessor(tokenizer, pixels=no_pixels, tokens_per_image=each, image_token_id=image)
    return Encoder(processor, prompts_of(processor, "test", template, pictures=True), max_tokens=max_tokens)


def encode_talk(encoder: Encoder, conversation: Example) -> Encoded:
    return encoder.encode(conversation, [PICTURE] * len(conversation.images))


def prompt_ids(encoder: Encoder, *turns: Turn) -> list[int]:
    pictures = [PICTURE] * sum(turn.text.count("<image>") for turn in turns)
    return encoder.encode_prompt(turns, pictures).input_ids.tolist()


def conversation(*texts: str, images: int = 0) -> Example:
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))
    return Example("sample-7", tuple(f"{n}.png" for n in range(images)), turns)


def answers_of(encoder: Encoder, labels: torch.Tensor, close: str) -> list[str]:
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
