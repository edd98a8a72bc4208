"""A language model's folder as Vicuna v1.5 is published: LLaMA weights, `tokenizer.model` and no `tokenizer.json`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_vl.backbones.families.formats import VICUNA_SYSTEM
from tests.backbones.tiny_language import SIZES

LESSONS = [
    VICUNA_SYSTEM,
    "/USER: What is in the picture? ASSISTANT: A red circle on a blue square",
    "/USER: Is it red? ASSISTANT: Yes, it is. No, it is not. ASSISTANT",
    "[INST] What is it? [/INST] <<SYS>> <</SYS>> ### Human: ### Assistant: system user assistant",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;?!'-<>/|_[]#",
    "a  b   c",
    "/USER:/USER:/USER:",  # as in LLaMA's, "USER" is a piece and "▁USER" is two
]
CONTROL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentencepiece_model() -> bytes:
    """BPE with LLaMA's own settings: byte fallback, a space mark in front, spaces kept as they are."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LESSONS * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    return written.getvalue()


def write_tokenizer_model(folder: Path, *, legacy: bool | None = False) -> Path:
    """`tokenizer.model`, and the `tokenizer_config.json` of Vicuna v1.5; `legacy` None leaves that entry out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: {**token, "content": content} for name, content in CONTROL.items()},
    }
    if legacy is not None:
        settings["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_tiny_vicuna(folder: Path) -> Path:
    """The tokenizer's folder with a random LLaMA of two layers, its vocabulary full as Vicuna's is."""
    write_tokenizer_model(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    config = LlamaConfig(**{**SIZES, **sizes}, vocab_size=480)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
