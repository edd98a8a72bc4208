"""Tiny language models and tokenizers of the kinds that GGUF files hold, and a DoRA on each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dora_vl.adapters.adapter import Adapter, read_adapter
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.gguf import SPLITS
from dora_vl.core import DoRAConfig, apply_dora
from tests.core.dense_dora import move

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 256, "head_dim": 256, "num_attention_heads": 2, "sliding_window": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama of one key head": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma2": ("gemma2", {**GEMMA, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gemma3_text": (
        "gemma3_text",
        {**GEMMA, "tie_word_embeddings": True, "num_hidden_layers": 7, "num_key_value_heads": 1},
    ),
}


def language(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast, **more: Any) -> Path:
    """A model whose norms and biases are no ones and zeros."""
    model_type, changes = MODELS[name]
    settings = {**SIZES, **changes, **more, "vocab_size": len(tokenizer) + 3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def dora_on(base: Path, folder: Path) -> tuple[Adapter, Any]:
    """An adapter of all projections, and the model that it makes."""
    model = AutoModelForCausalLM.from_pretrained(base)
    apply_dora(model, DoRAConfig(targets=("*_proj",), rank=3, alpha=5.0, also_train={"norm": ("model.norm.weight",)}))
    move(model)
    model.model.norm.weight.mul_(1.2)
    save_adapter(model.eval(), folder, base_model=str(base))
    return read_adapter(folder), model


TEXTS = (
    "The 12345 answers aren't  right,\n\n twice: <s>Würde it?",
    " leading space",
    "tabs\tand 7 more",
    "def f(x):\n    return x",
)


def byte_level(*steps: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.BPE(unk_token=None))
    words.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator([*TEXTS, "12345 123 45 67 right answers aren't"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(*, prefix: bool) -> PreTrainedTokenizerFast:
    """As LLaMA 2's (with a space in front) or Gemma's: merges of characters, bytes for what no token has."""
    words = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    marks = normalizers.Replace(" ", "▁")
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marks]) if prefix else marks
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words.train_from_iterator([*TEXTS] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special))
    state = json.loads(words.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    words = Tokenizer.from_str(json.dumps(state))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPLIT = {name: pattern for pattern, name in SPLITS.items()}
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    **{
        name: lambda pattern=pattern: byte_level(
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        )
        for name, pattern in SPLIT.items()
    },
    "smollm": lambda: byte_level(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
    "spm": lambda: sentencepiece(prefix=True),
    "gemma": lambda: sentencepiece(prefix=False),
}
