"""Conversations with and without pictures and videos: what a processor and our encoder make of them, and labels."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import AutoProcessor

from dora_vl import DoRAConfig, apply_dora
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.families.targets import language_targets, projector_patterns
from dora_vl.backbones.model import DecoderBackbone, open_backbone
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.prompts import prompts_of
from dora_vl.backbones.video_inputs import metadata, pixels
from dora_vl.data.example import Example
from dora_vl.data.samples import BOOKKEEPING, Encoded, Sample
from dora_vl.data.turns import Clip, Turn
from tests.backbones.tiny_families.table import FAMILIES, LANGUAGE_MODELS
from tests.backbones.tiny_image_text import VIDEO, coloured_video
from tests.core.dense_dora import move_trained

RED, BLUE = Image.new("RGB", (40, 24), (200, 30, 30)), Image.new("RGB", (18, 35), (20, 40, 220))
ASKED, SAID = "What colour is it?", "It is red."

Conversation = tuple[Any, ...]
"""Turns, pictures and, where there are any, videos."""


def rounds(*texts: str) -> tuple[Turn, ...]:
    """Questions and answers in turn."""
    return tuple(Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts))


TWO_QUESTIONS = "two pictures, two questions"
TALKS: dict[str, Conversation] = {
    "one picture": (rounds(f"<image>\n{ASKED}", SAID), (RED,)),
    "no picture": (rounds("Say the colour red.", "red"), ()),
    "two pictures": (rounds("<image>\n<image>\nWhich is blue?", "Two."), (RED, BLUE)),
    TWO_QUESTIONS: (rounds("Is <image>\nor <image>\nblue?", "The second is blue.", "Sure?", "Yes"), (RED, BLUE)),
    "a picture later": (rounds("Say the colour red.", "red", f"<image>\n{ASKED}", SAID), (RED,)),
    "a picture each": (rounds(f"<image>\n{ASKED}", SAID, "<image>\nIs it blue?", "Yes"), (RED, BLUE)),
}
LONG, SHORT = coloured_video(4), coloured_video(3, step=11, size=(22, 30))
TURNS_RED = Turn("assistant", "It turns red.")
VIDEO_TALKS: dict[str, Conversation] = {
    "one video": (rounds("<video>\nWhat colour is it?", TURNS_RED.text), (), (LONG,)),
    "two videos": (
        rounds("Is <video>\nor <video>\nblue?", "The second is blue.", "Sure?", "Yes"),
        (),
        (LONG, coloured_video(4, step=5)),
    ),
    "video and picture": (rounds("Is <video>\nlike <image>\nhere?", TURNS_RED.text), (RED,), (LONG,)),
    "picture and video": (rounds("Is <image>\nlike <video>\nhere?", TURNS_RED.text), (RED,), (LONG,)),
    "no video": (rounds("Say the colour red.", "red"), (), ()),
    "one picture": (rounds("<image>\nWhat colour is it?", TURNS_RED.text), (RED,), ()),
}
SEVERAL_ROUNDS: Conversation = (rounds("Say the colour red.", "red", "Sure?", "Yes, it is."), ())


def talks_of(family: str) -> tuple[str, ...]:
    """The conversations that a family takes."""
    if FAMILIES[family].format == "paligemma":
        return ("one picture", "two pictures")
    return tuple(TALKS)


def all_talks_of(family: str) -> dict[str, Conversation]:
    """The same with what is said; of a family with videos, or of a language model too."""
    if family.endswith(VIDEO):
        return VIDEO_TALKS
    if family in LANGUAGE_MODELS:
        return {"no picture": TALKS["no picture"], "several rounds": SEVERAL_ROUNDS}
    return {name: TALKS[name] for name in talks_of(family)}


def encoder_of(folder: Path, max_tokens: int = 2048, template: str | None = None) -> Encoder:
    """The encoder of a tiny family's folder, with the prompt format that the family needs."""
    chosen = template or (FAMILIES[folder.name].format if folder.name in FAMILIES else None)
    if folder.name == "llava":  # as every other family goes; its own pieces have tests of their own
        processor = AutoProcessor.from_pretrained(folder)
        return Encoder(processor, prompts_of(processor, "llava", chosen, pictures=True), max_tokens=max_tokens)
    return open_encoder(str(folder), template=chosen, max_tokens=max_tokens)


def sample_of(encoder: Encoder, conversation: Conversation) -> Sample:
    turns, pictures, *videos = conversation
    names = tuple(f"{number}.png" for number in range(len(pictures)))
    clips = tuple(Clip(path=f"{number}.mp4") for number in range(len(videos[0] if videos else ())))
    encoded = encoder.encode(Example("conversation", names, turns, clips), pictures, *videos)
    return Sample(index=0, id="conversation", **vars(encoded))


def messages_of(conversation: Conversation) -> list[dict[str, Any]]:
    """The same in transformers' own form, written out apart from the encoder's."""
    turns, pictures, *videos = conversation
    left = {"image": iter(pictures), "video": iter(pixels(video) for video in (videos[0] if videos else ()))}
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(re.split("<(image|video)>", turn.text)):
            text = piece.removeprefix("\n") if number else piece
            if number % 2:
                parts.append({"type": piece, piece: next(left[piece])})
            elif text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": parts})
    return messages


def processor_inputs(encoder: Encoder, family: str, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """What the family's own processor makes of the conversations, padded on the right."""
    if family in LANGUAGE_MODELS:
        ((turns, _),) = conversations
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return dict(
            encoder.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        )
    family = family.removesuffix(VIDEO)
    many: dict[str, Any] = {"padding": True, "padding_side": "right"} if len(conversations) > 1 else {}
    processor, prompt = encoder.processor, FAMILIES[family].format
    many |= {"return_mm_token_type_ids": True} if family == "cosmos3_edge" else {}  # its model cannot do without
    if clips := [
        video for conversation in conversations for video in (conversation[2] if len(conversation) > 2 else ())
    ]:
        chosen = {"do_sample_frames": False, "video_metadata": [metadata(video) for video in clips]}
        many["videos_kwargs"] = chosen
    if prompt is None:
        conversations = [messages_of(conversation) for conversation in conversations]
        return dict(
            processor.apply_chat_template(
                conversations,
                chat_template=processor.chat_template,  # SmolVLM's takes another for videos
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=many,
            )
        )
    texts, suffixes = zip(*(_plain(conversation, encoder, prompt) for conversation in conversations), strict=True)
    many |= {"suffix": list(suffixes)} if prompt == "paligemma" else {}
    many |= {"return_for_text_completion": True} if family == "chameleon" else {}
    images = [list(pictures) for _, pictures in conversations if pictures] or None
    inputs = dict(processor(text=list(texts), images=images, return_tensors="pt", **many))
    inputs.pop("labels", None)
    return inputs


def _plain(conversation: Conversation, encoder: Encoder, prompt: str) -> tuple[str, str]:
    """A conversation in a prompt format, and the answer that PaliGemma's processor takes apart."""
    turns, _ = conversation
    token = encoder.processor.image_token
    texts = [turn.text.replace("<image>\n", token).replace("<image>", token) for turn in turns]
    if prompt == "paligemma":
        return texts[0], texts[1]
    rounds = zip(texts[::2], texts[1::2], strict=True)
    return "\n".join(f"Question: {question} Answer: {answer}<|im_end|>" for question, answer in rounds), ""


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in BOOKKEEPING}


def batch_of(encoder: Encoder, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """The conversations as training batches them, with the further row where no conversation has a picture."""
    dummy = encoder.dummy() if encoder.sees_pictures else None
    collate = replace(encoder.collate, dummy=dummy)
    return inputs_of(collate([sample_of(encoder, conversation) for conversation in conversations]))


def adapt(model: Any, **settings: Any) -> None:
    """Gives it an adapter away from its start, the projector too (Gemma 3's own projection begins with zeros)."""
    projector = projector_patterns(model)
    also = {"projector": projector} if projector else {}
    own = {"targets": language_targets(model), "rank": 3, "alpha": 7.0, "dropout": 0.0, "also_train": also}
    apply_dora(model, DoRAConfig(**{**own, **settings}))
    move_trained(model, amount=0.05)


def adapted_backbone(folder: Path) -> DecoderBackbone:
    backbone = open_backbone(str(folder))
    adapt(backbone.model)
    return backbone.train()


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
    """Its name lets an encoder be pickled."""
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
