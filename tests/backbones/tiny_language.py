"""Tiny random language models of several families, and a folder of one with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.granite.configuration_granite import GraniteConfig

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0}),  # changes its logits
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
}


def tiny_language(family: str = "llama", *, vocab_size: int = 300, seed: int = 0, **sizes: int) -> Any:
    """A random model in eval mode whose weights are large enough to make logits differ; `sizes` replace `SIZES`."""
    kind, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **sizes}, vocab_size=vocab_size, **extra))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
    return model.eval()


def byte_tokenizer(*, begin: bool = True) -> PreTrainedTokenizerFast:
    """Splits like SmolLM2's, almost into bytes; puts `<s>` in front as LLaMA's does, if asked."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        ["the correct answer is answer1 ### Response: ### Instruction: Below is an instruction"] * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if begin:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_tiny_language(folder: Path, **sizes: int) -> Path:
    """A LLaMA folder with that tokenizer."""
    tokenizer = byte_tokenizer()
    tiny_language(vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
