"""Tiny random vision-language models of many families, each a folder with its processor and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from tests.backbones.tiny_families.family import SPECIAL, TEXT, resolved, why_not_here
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
