"""Tiny random vision-language models of many families, videos too, each a folder with processor and chat template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)

from dora_vl.backbones.video_inputs import Video
from tests.backbones.tiny_families.family import SPECIAL, TABLE, TEXT, resolved, why_not_here
from tests.backbones.tiny_families.table import FAMILIES, LANGUAGE_MODELS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(names: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with every family's special tokens."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator(["user assistant What colour is it? It is red green blue. Say the colour."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>",
        extra_special_tokens=dict(names),
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def write_tiny(
    model_type: str,
    folder: Path,
    *,
    template: str | None = None,
    width: int = TEXT["hidden_size"],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Model and processor of one family; the same weights at every call.

    Args:
        width: of the language model's hidden states.
        dtype: of the stored weights.
    """
    family = FAMILIES[model_type]
    if why := why_not_here(family.since):
        pytest.skip(why)
    tokenizer = tiny_tokenizer(family.names)
    settings = resolved(family.config, tokenizer)
    if "text_config" in settings:  # Chameleon's stands in the config itself
        settings["text_config"] = {"vocab_size": len(tokenizer), **settings["text_config"]}
    if width != TEXT["hidden_size"]:
        heads = width // 8
        settings["text_config"] |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width}
        if "out_hidden_size" in settings["vision_config"]:
            settings["vision_config"] = {**settings["vision_config"], "out_hidden_size": width}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_gate", "correct_output_scale")):  # begin with zeros, which nothing passes
                parameter.fill_(0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(dtype).save_pretrained(folder)
    processor = family.processor(tokenizer)
    if family.format is None:
        processor.chat_template = (template or CHATML).replace("PICTURE", family.picture)
    processor.save_pretrained(folder)
    return folder


def write_tiny_language(model_type: str, folder: Path, *, template: str = CHATML) -> Path:
    """A language model of one type and its tokenizer; the same weights at every call."""
    tokenizer = tiny_tokenizer({})
    settings = {**TEXT, "vocab_size": len(tokenizer), **LANGUAGE_MODELS[model_type]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


PICTURE_PART = "{% if part.type == 'image' %}PICTURE{% else %}"
VIDEO = "+video"
"""Behind a family's name: with a place for videos in its template."""


@dataclass(frozen=True)
class VideoFamily:
    """What differs from the family's set-up for pictures."""

    picture: str = "<image>"
    video: str = "<video>"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its video processor: sizes that give few tokens."""
    one_length: bool = False
    """The videos of a batch must have equally many frames."""
    one_kind: bool = False
    """Its model cannot tell pictures from videos of one batch."""
    since: str = ""
    """The first version of transformers whose processor takes them rightly, where an older one is taken too."""


VIDEO_FAMILIES: Mapping[str, VideoFamily] = {name: VideoFamily(**row) for name, row in TABLE["videos"].items()}


def video_template(picture: str, video: str) -> str:
    """ChatML with a place for pictures and one for videos."""
    both = PICTURE_PART.replace("PICTURE", picture).replace(
        "{% else %}", "{% elif part.type == 'video' %}VIDEO{% else %}".replace("VIDEO", video)
    )
    assert PICTURE_PART in CHATML
    return CHATML.replace(PICTURE_PART, both)


def write_tiny_video(model_type: str, folder: Path) -> Path:
    """Model and processor of one family; the same weights at every call."""
    model_type = model_type.removesuffix(VIDEO)
    family = VIDEO_FAMILIES[model_type]
    if why := why_not_here(family.since):
        pytest.skip(why)
    template = video_template(family.picture, family.video)
    write_tiny(model_type, folder, template=template)
    processor = AutoProcessor.from_pretrained(folder)
    for name, value in family.settings.items():
        setattr(processor.video_processor, name, value)
    processor.save_pretrained(folder)
    return folder


def coloured_video(
    frames: int, *, step: int = 7, rate: float = 25.0, count: int = 100, size: tuple[int, int] = (30, 22)
) -> Video:
    """Frames that differ, taken from a file of steady rate; its first is the file's fourth."""
    indices = tuple(3 + step * number for number in range(frames))
    return Video(
        pictures=tuple(Image.new("RGB", size, (index * 2 % 256, 255 - index, 60 + index)) for index in indices),
        indices=indices,
        seconds=tuple(index / rate for index in indices),
        backend="pyav",
        duration=count / rate,
        count=count,
        span=(0.0, count / rate),
    )
